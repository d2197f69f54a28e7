"""smolagents' ToolCallingAgent: a tool, then its final answer."""

from common import MODEL, QUESTION, URL, report
from common import weather as ask
from smolagents import OpenAIModel, ToolCallingAgent, tool


@tool
def get_weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: The city's name.
    """
    return ask(city)


model = OpenAIModel(MODEL, api_base=f"{URL}/v1", api_key="none")
agent = ToolCallingAgent(tools=[get_weather], model=model, max_steps=3, verbosity_level=0)
answer = agent.run(QUESTION)
report(answer=answer, steps=len(agent.memory.steps))
