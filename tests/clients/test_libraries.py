"""The libraries that people use, in environments of their own (`--clients`), against a server on loopback.

Each program of ``programs/`` does with one library what its users do, and prints what the library made of it.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.installing import INSTALL_SECONDS, environment
from tests.clients.server import ANSWER, weather_server

HERE = Path(__file__).parent
SECONDS = 300.0
RECORD = {"city": "Geneva", "degrees": 21}

pytestmark = pytest.mark.timeout(INSTALL_SECONDS + SECONDS)


@pytest.fixture(scope="module")
def url(clients: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not clients:
        pytest.skip("installs clients' libraries: --clients")
    with weather_server(tmp_path_factory.mktemp("server")) as url:
        yield url


def reported(name: str, url: str, requirements: str = "requirements.txt") -> dict[str, Any]:
    command = [environment(requirements), HERE / "programs" / f"{name}.py", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def check_loop(seen: dict[str, Any]) -> None:
    """A tool loop: the call, and the answer to its result, whose prompt was found in the cache up to the question."""
    arguments = seen["arguments"]
    assert (seen["call"], json.loads(arguments) if isinstance(arguments, str) else arguments) == (
        "get_weather", {"city": "Geneva"},
    )  # fmt: skip
    assert seen["answer"] == ANSWER
    assert seen["cached"] > 100


def test_the_openai_sdk(url: str) -> None:
    seen = reported("openai_sdk", url)
    check_loop(seen)
    assert seen["reasoning"] == "I should look."
    assert (seen["structured"], seen["responses"]) == (RECORD, ANSWER)
    assert seen["overflow"] == "context_length_exceeded"


def test_the_anthropic_sdk(url: str) -> None:
    seen = reported("anthropic_sdk", url)
    check_loop(seen)
    assert seen["reasoning"] == "I should look."
    assert seen["overflow"].startswith("prompt is too long: ")


def test_litellm(url: str) -> None:
    seen = reported("litellm_library", url)
    for name in ("openai", "anthropic"):
        check_loop(seen[name])
        assert (seen[name]["reasoning"], seen[name]["overflow"]) == ("I should look.", "ContextWindowExceededError")
    assert (json.loads(seen["structured"]), seen["responses"]) == (RECORD, ANSWER)


def test_langchain(url: str) -> None:
    seen = reported("langchain_library", url)
    for name in ("openai", "responses", "anthropic"):
        check_loop(seen[name])
    assert (seen["structured"], seen["by_tool"]) == (RECORD, RECORD)


def test_openai_agents(url: str) -> None:
    seen = reported("openai_agents_library", url)
    items = ["tool_call_item", "tool_call_output_item", "message_output_item"]
    assert seen == {name: {"answer": ANSWER, "items": items} for name in ("responses", "openai")}


def test_instructor(url: str) -> None:
    assert reported("instructor_library", url) == dict.fromkeys(("tools", "schema", "anthropic"), RECORD)


def test_smolagents(url: str) -> None:
    assert reported("smolagents_library", url) == {"answer": ANSWER, "steps": 3}


def test_dspy(url: str) -> None:
    assert reported("dspy_library", url) == {"answer": ANSWER}


def test_llama_index(url: str) -> None:
    assert reported("llama_index_library", url, "requirements-llama-index.txt") == {
        "call": "get_weather", "result": "21 degrees in Geneva", "streamed": ANSWER,
    }  # fmt: skip


def test_pydantic_ai(url: str) -> None:
    seen = reported("pydantic_ai_library", url, "requirements-pydantic-ai.txt")
    loop = {"answer": ANSWER, "requests": 2}
    assert seen == {**dict.fromkeys(("openai", "responses", "anthropic"), loop), "structured": RECORD}


def test_lm_eval(url: str) -> None:
    assert reported("lm_eval_harness", url, "requirements-llama-index.txt") == {"exact_match": 1.0, "samples": 2}
