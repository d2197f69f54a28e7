"""The official OpenAI SDK: chat, streams, structured output, Responses."""

import openai
from common import MODEL, QUESTION, TOO_LONG, TOOL, URL, Weather, report, weather

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
messages = [{"role": "user", "content": QUESTION}]
tools = [{"type": "function", "function": TOOL}]
with client.chat.completions.stream(model=MODEL, messages=messages, tools=tools) as stream:
    for _ in stream:
        pass
    message = stream.get_final_completion().choices[0].message
(call,) = message.tool_calls
messages += [
    message.model_dump(exclude_none=True),
    {
        "role": "tool",
        "tool_call_id": call.id,
        "content": weather(**call.function.parsed_arguments or {"city": "Geneva"}),
    },
]
answer = client.chat.completions.create(model=MODEL, messages=messages, tools=tools)
parsed = client.chat.completions.parse(
    model=MODEL, messages=[{"role": "user", "content": f"{QUESTION} Answer in JSON."}], response_format=Weather
)
responses = client.responses.create(model=MODEL, input=QUESTION, tools=[{"type": "function", **TOOL}])
(wanted,) = [item for item in responses.output if item.type == "function_call"]
result = {"type": "function_call_output", "call_id": wanted.call_id, "output": weather("Geneva")}
goes_on = client.responses.create(
    model=MODEL, input=[result], previous_response_id=responses.id, tools=[{"type": "function", **TOOL}]
)
try:
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": TOO_LONG}])
except openai.BadRequestError as error:
    overflow = error.code
report(
    call=call.function.name,
    arguments=call.function.arguments,
    answer=answer.choices[0].message.content,
    cached=answer.usage.prompt_tokens_details.cached_tokens,
    reasoning=message.model_extra["reasoning_content"],
    structured=parsed.choices[0].message.parsed.model_dump(),
    responses=goes_on.output_text,
    overflow=overflow,
)
