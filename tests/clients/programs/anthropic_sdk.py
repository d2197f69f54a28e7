"""The official Anthropic SDK: a streamed tool loop with thoughts, and an overflow."""

import anthropic
from common import MODEL, QUESTION, TOO_LONG, TOOL, URL, report, weather

client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
tools = [{"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]}]
thinking = {"type": "enabled", "budget_tokens": 1024}
messages = [{"role": "user", "content": QUESTION}]
with client.messages.stream(model=MODEL, max_tokens=2048, messages=messages, tools=tools, thinking=thinking) as stream:
    message = stream.get_final_message()
thought, call = message.content
result = {"type": "tool_result", "tool_use_id": call.id, "content": weather(**call.input)}
messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
answer = client.messages.create(model=MODEL, max_tokens=2048, messages=messages, tools=tools, thinking=thinking)
try:
    client.messages.create(model=MODEL, max_tokens=9, messages=[{"role": "user", "content": TOO_LONG}])
except anthropic.BadRequestError as error:
    overflow = error.body["error"]["message"]
report(
    call=call.name,
    arguments=call.input,
    answer=answer.content[-1].text,
    cached=answer.usage.cache_read_input_tokens,
    reasoning=thought.thinking,
    overflow=overflow,
)
