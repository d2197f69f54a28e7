"""What the programs share. Each prints one line of JSON: what its library made of the server's answers."""

import json
import sys
from typing import Any

from pydantic import BaseModel

URL = sys.argv[1]
MODEL = "scripted"
QUESTION = "How warm is it in Geneva?"
TOO_LONG = "warm " * 200_000
TOOL = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Weather(BaseModel):
    city: str
    degrees: int


def weather(city: str) -> str:
    return f"21 degrees in {city}"


def report(**seen: Any) -> None:
    print(json.dumps(seen))
