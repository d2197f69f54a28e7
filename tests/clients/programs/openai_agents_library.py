"""openai-agents over Responses and over chat completions: a streamed tool loop."""

import asyncio

from common import MODEL, QUESTION, URL, report
from common import weather as ask
from openai import AsyncOpenAI

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none")


@function_tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return ask(city)


async def answer(model: object) -> dict[str, object]:
    agent = Agent(name="weather", instructions="Be brief.", model=model, tools=[get_weather])
    running = Runner.run_streamed(agent, QUESTION)
    async for _ in running.stream_events():
        pass
    kinds = [item.type for item in running.new_items if item.type != "reasoning_item"]
    return {"answer": running.final_output, "items": kinds}


async def main() -> None:
    report(
        responses=await answer(OpenAIResponsesModel(MODEL, client)),
        openai=await answer(OpenAIChatCompletionsModel(MODEL, client)),
    )


asyncio.run(main())
