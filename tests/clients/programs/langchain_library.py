"""LangChain's chat models of both APIs: bound tools, a stream, structured output."""

from common import MODEL, QUESTION, URL, Weather, report
from common import weather as ask
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return ask(city)


models = {
    "openai": ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key="none", stream_usage=True),
    "responses": ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key="none", use_responses_api=True),
    "anthropic": ChatAnthropic(model=MODEL, base_url=URL, api_key="none", max_tokens=2048),
}
seen = {}
for name, model in models.items():
    bound = model.bind_tools([get_weather])
    messages = [HumanMessage(QUESTION)]
    message = None
    for chunk in bound.stream(messages):
        message = chunk if message is None else message + chunk
    (call,) = message.tool_calls
    messages += [message, get_weather.invoke(call)]
    answer = bound.invoke(messages)
    details = answer.usage_metadata["input_token_details"]
    seen[name] = {
        "call": call["name"],
        "arguments": call["args"],
        "answer": answer.text if isinstance(answer.text, str) else answer.text(),
        "cached": details["cache_read"],
    }
structured = models["openai"].with_structured_output(Weather).invoke(f"{QUESTION} Answer in JSON.")
by_tool = models["openai"].with_structured_output(Weather, method="function_calling").invoke(QUESTION)
report(**seen, structured=structured.model_dump(), by_tool=by_tool.model_dump())
