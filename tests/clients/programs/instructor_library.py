"""instructor: a record by a named tool, by JSON schema, and by Anthropic's tools."""

import anthropic
import instructor
import openai
from common import MODEL, QUESTION, URL, Weather, report

gpt = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")
claude = anthropic.Anthropic(base_url=URL, api_key="none")
question = [{"role": "user", "content": f"{QUESTION} Answer in JSON."}]
clients = {
    "tools": instructor.from_openai(gpt, mode=instructor.Mode.TOOLS),
    "schema": instructor.from_openai(gpt, mode=instructor.Mode.JSON_SCHEMA),
    "anthropic": instructor.from_anthropic(claude, mode=instructor.Mode.ANTHROPIC_TOOLS),
}
seen = {
    name: client.chat.completions.create(
        model=MODEL, messages=question, response_model=Weather, max_tokens=2048, max_retries=0
    ).model_dump()
    for name, client in clients.items()
}
report(**seen)
