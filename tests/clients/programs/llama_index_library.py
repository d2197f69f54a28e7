"""LlamaIndex' OpenAILike: a call by its function-calling interface, and a stream."""

from common import MODEL, QUESTION, URL, report
from common import weather as ask
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


def get_weather(city: str) -> str:
    """The weather in a city."""
    return ask(city)


model = OpenAILike(
    model=MODEL, api_base=f"{URL}/v1", api_key="none", is_chat_model=True, is_function_calling_model=True,
    context_window=131072,
)  # fmt: skip
answer = model.predict_and_call([FunctionTool.from_defaults(get_weather)], QUESTION)
streamed = "".join(chunk.delta or "" for chunk in model.stream_chat([ChatMessage(role="user", content=QUESTION)]))
report(call=str(answer.sources[0].tool_name), result=str(answer), streamed=streamed)
