"""A server whose model answers every question about the weather, for the clients' libraries."""

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from emberkv.serving.app import create_app
from emberkv.serving.server import bind_socket
from tests.agents.server import agent_settings, scripted_lifecycle, scripted_model

THOUGHT = "<think>\nI should look.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Geneva"}}\n</tool_call>'
RECORD = '{"city": "Geneva", "degrees": 21}'
ANSWER = "It is 21 degrees in Geneva."


def answer(prompt: str) -> str:
    """Calls the tool, then answers; gives a record where one is asked for."""
    tools = set(re.findall(r'"name": "(\w+)"', prompt.partition("<|im_start|>user")[0]))
    if "[[ ## answer ## ]]" in prompt:  # DSPy's own form
        return f"[[ ## answer ## ]]\n{ANSWER}\n\n[[ ## completed ## ]]"
    if "21 degrees in" in prompt.rpartition("How warm")[2]:
        return _call("final_answer", f'{{"answer": "{ANSWER}"}}') if "final_answer" in tools else THOUGHT + ANSWER
    if "get_weather" in tools:
        return THOUGHT + CALL
    return _call(min(tools), RECORD) if tools else RECORD if "JSON" in prompt else THOUGHT + ANSWER


def _call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@contextmanager
def weather_server(folder: Path) -> Iterator[str]:
    """Serve on loopback, and yield the URL."""
    with scripted_model(answer, folder) as model:
        bound = bind_socket("127.0.0.1", 0)
        app = create_app(scripted_lifecycle(model), agent_settings())
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
