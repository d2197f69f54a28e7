"""LiteLLM over both APIs: a streamed tool loop, thoughts, structured output, and its own class of overflow."""

import litellm
from common import MODEL, QUESTION, TOO_LONG, TOOL, URL, Weather, report, weather

both = {"openai": {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": "none"}}
both["anthropic"] = {"model": f"anthropic/{MODEL}", "api_base": URL, "api_key": "none"}
tools = [{"type": "function", "function": TOOL}]
seen = {}
for name, model in both.items():
    messages = [{"role": "user", "content": QUESTION}]
    chunks = list(litellm.completion(**model, messages=messages, tools=tools, stream=True))
    message = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": weather("Geneva")}
    messages += [message.model_dump(exclude_none=True), result]
    answer = litellm.completion(**model, messages=messages, tools=tools)
    try:
        litellm.completion(**model, messages=[{"role": "user", "content": TOO_LONG}])
    except litellm.ContextWindowExceededError as error:
        overflow = type(error).__name__
    seen[name] = {
        "call": call.function.name,
        "arguments": call.function.arguments,
        "answer": answer.choices[0].message.content,
        "cached": answer.usage.prompt_tokens_details.cached_tokens,
        "reasoning": message.reasoning_content,
        "overflow": overflow,
    }
parsed = litellm.completion(
    **both["openai"], messages=[{"role": "user", "content": f"{QUESTION} Answer in JSON."}], response_format=Weather
)
responses = litellm.responses(**both["openai"], input=QUESTION)
report(**seen, structured=parsed.choices[0].message.content, responses=responses.output[-1].content[0].text)
