"""pydantic-ai's agents over three APIs: a tool loop, and structured output."""

from anthropic import AsyncAnthropic
from common import MODEL, QUESTION, URL, Weather, report
from common import weather as ask
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
models = {
    "openai": OpenAIChatModel(MODEL, provider=provider),
    "responses": OpenAIResponsesModel(MODEL, provider=provider),
    "anthropic": AnthropicModel(
        MODEL, provider=AnthropicProvider(anthropic_client=AsyncAnthropic(base_url=URL, api_key="none"))
    ),
}
seen = {}
for name, model in models.items():
    agent = Agent(model)

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return ask(city)

    run = agent.run_sync(QUESTION)
    seen[name] = {
        "answer": run.output,
        "requests": run.usage.requests if not callable(run.usage) else run.usage().requests,
    }
structured = Agent(models["openai"], output_type=Weather).run_sync(QUESTION).output
report(**seen, structured=structured.model_dump())
