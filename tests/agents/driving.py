"""Uses a coding agent's program on this machine alone, against a server whose answers are scripted."""

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emberkv.serving.app import create_app
from emberkv.serving.server import HttpServer, bind_socket
from tests.agents.scenario import Agent, Scenario
from tests.agents.server import FAMILY, agent_settings, scripted_lifecycle, scripted_model
from tests.agents.session_file import Exchange, ids_in
from tests.serving.parsing.families import Family

SECONDS = 300.0


@dataclass(frozen=True)
class Answered:
    """A request, and the whole response to it."""

    exchange: Exchange
    response: httpx.Response


@dataclass(frozen=True)
class Driven:
    """What an agent did. commands: those that were run, in order. requests: in the order of their answers."""

    commands: list[subprocess.CompletedProcess[str]]
    requests: list[Answered]


class Recorder:
    """Passes requests to ``app`` one at a time, and keeps them with their responses."""

    def __init__(self, app: ASGIApp, scenario: Scenario) -> None:
        self.requests: list[Answered] = []
        self._app = app
        self._scenario = scenario
        self._one_at_a_time = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        async with self._one_at_a_time:
            await self._record(scope, receive, send)

    async def _record(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent, got = bytearray(), bytearray()
        status, headers = 0, []

        async def receive_and_keep() -> Message:
            message = await receive()
            sent.extend(message.get("body", b""))
            return message

        async def send_and_keep(message: Message) -> None:
            nonlocal status, headers
            status, headers = message.get("status", status), message.get("headers", headers)
            got.extend(message.get("body", b""))
            await send(message)

        self._scenario.begin_request()
        await self._app(scope, receive_and_keep, send_and_keep)
        query = scope["query_string"].decode()
        exchange = Exchange(
            scope["method"],
            scope["path"] + (f"?{query}" if query else ""),
            {name.decode(): value.decode() for name, value in scope["headers"]},
            json.loads(sent) if sent else None,
            status,
            self._scenario.answer,
            self._scenario.follows,
            ids_in(got.decode()),
        )
        self.requests.append(Answered(exchange, httpx.Response(status, headers=headers, content=bytes(got))))


def drive(agent: Agent, program: Path, home: Path, family: Family = FAMILY) -> Driven:
    """Have the agent do the scenario in new folders: ``home`` and its project's, whose former content is removed."""
    for folder in (home, agent.project):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    scenario = Scenario(agent)
    with tempfile.TemporaryDirectory() as folder, scripted_model(scenario.say, Path(folder), family) as model:
        lifecycle = scripted_lifecycle(model)
        recorder = Recorder(create_app(lifecycle, agent_settings()), scenario)
        server = HttpServer(recorder, lifecycle, bind_socket(port=0), drain_seconds=1.0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            commands = _commands(agent, program, home, server.url)
        finally:
            _end_those_left(home)
            server.stop()
            thread.join()
    return Driven(commands, recorder.requests)


def _end_those_left(home: Path) -> None:
    """End what the agent's commands have left running, such as cline's hub; it is known by its home."""
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("HOME") == str(home):
            process.kill()


def _commands(agent: Agent, program: Path, home: Path, url: str) -> list[subprocess.CompletedProcess[str]]:
    agent.prepare(url, home)
    node = shutil.which("node")
    folders = [str(program.parent), *([str(Path(node).parent)] if node else []), "/usr/local/bin", "/usr/bin", "/bin"]
    environment = {  # nothing else: no proxy, and no keys
        "HOME": str(home),
        "PATH": os.pathsep.join(folders),
        "LANG": "C.UTF-8",
        **{name: value.format(url=url, home=home) for name, value in agent.variables.items()},
    }
    return [
        subprocess.run(
            [program, *(each.format(url=url, home=home) for each in arguments)],
            cwd=agent.project, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )
        for arguments in (agent.setup, agent.first, agent.second)
        if arguments
    ]  # fmt: skip
