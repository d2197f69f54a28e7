"""Record a coding agent's requests, with its own prompts replaced by words of ours, for the tests that replay them.

    PYTHONPATH=src:. python scripts/record_agents.py claude /tmp/clients-claude/node_modules/.bin/claude

The agent runs on this machine alone, against a server of the tests whose answers are scripted: it reads a file, runs
two commands at once, edits the file and says so; then it is asked again in the same session. What it sent is written
to tests/agents/sessions; with --raw FOLDER it is also written there as it was.
"""

import argparse
import asyncio
import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tests.agents.scenario import AGENTS, Agent, Scenario
from tests.agents.server import agent_settings, scripted_lifecycle, scripted_model
from tests.agents.session_file import Exchange, Replacement, Session, ids_in

from emberkv.serving.app import create_app
from emberkv.serving.server import HttpServer, bind_socket

HOME = Path("/tmp/agent-home")  # noqa: S108 - agents write such paths into their prompts: they are the same everywhere
TIMEOUT = 300.0
KEPT_HEADERS = re.compile(
    r"accept|content-type|anthropic-.*|user-agent|openai-.*|originator|x-app|.*session.*|.*thread.*"
)


class Recorder:
    """Passes requests to ``app`` one at a time, and keeps them with their responses."""

    def __init__(self, app: ASGIApp, scenario: Scenario) -> None:
        self.exchanges: list[Exchange] = []
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
        status = 0

        async def receive_and_keep() -> Message:
            message = await receive()
            sent.extend(message.get("body", b""))
            return message

        async def send_and_keep(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            got.extend(message.get("body", b""))
            await send(message)

        self._scenario.begin_request()
        await self._app(scope, receive_and_keep, send_and_keep)
        query = scope["query_string"].decode()
        self.exchanges.append(
            Exchange(
                scope["method"],
                scope["path"] + (f"?{query}" if query else ""),
                {name.decode(): value.decode() for name, value in scope["headers"]},
                json.loads(sent) if sent else None,
                status,
                self._scenario.answer,
                self._scenario.follows,
                ids_in(got.decode()),
            )
        )


def recorded(agent: Agent, program: str) -> list[Exchange]:
    """What the agent sends while it is asked twice."""
    scenario = Scenario(agent)
    with tempfile.TemporaryDirectory() as folder, scripted_model(scenario.say, Path(folder)) as model:
        lifecycle = scripted_lifecycle(model)
        recorder = Recorder(create_app(lifecycle, agent_settings()), scenario)
        server = HttpServer(recorder, lifecycle, bind_socket(port=0), drain_seconds=1.0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            _use(agent, program, server.url)
        finally:
            server.stop()
            thread.join()
        return recorder.exchanges


def _use(agent: Agent, program: str, url: str) -> None:
    for folder in (HOME, agent.project):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    agent.prepare(url, HOME)
    environment = {"HOME": str(HOME), "PATH": f"{Path(program).parent}:/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
    for arguments in (agent.setup, agent.first, agent.second):
        if arguments:
            line = [program, *(each.format(url=url, home=HOME) for each in arguments)]
            variables = {name: value.format(url=url, home=HOME) for name, value in agent.variables.items()}
            done = subprocess.run(
                line, cwd=agent.project, env={**environment, **variables}, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=TIMEOUT, check=False,
            )  # fmt: skip
            print(f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def replaced(exchange: Exchange, replacement: Replacement) -> Exchange:
    headers = {
        name: re.sub(r" ?\([^)]*\)", "", replacement.text(value) if "session" in name or "thread" in name else value)
        for name, value in exchange.headers.items()
        if KEPT_HEADERS.fullmatch(name)
    }
    return replace(exchange, headers=headers, body=replacement.of(exchange.body))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("agent", choices=sorted(AGENTS))
    parser.add_argument("program", help="the agent's program")
    parser.add_argument("--raw", type=Path, help="a folder for the requests as they were")
    given = parser.parse_args(arguments)
    agent = AGENTS[given.agent]
    version = subprocess.run([given.program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+\.\d+[.\w-]*", version)
    assert found is not None, version
    exchanges = recorded(agent, given.program)
    if given.raw is not None:
        given.raw.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(each) for each in exchanges], indent=1, ensure_ascii=False)
        (given.raw / f"{agent.name}.json").write_text(text)
    replacement = Replacement([*agent.own_texts, *(each_id for each in exchanges for each_id in each.ids)])
    session = Session(agent.name, found[0], [replaced(each, replacement) for each in exchanges])
    session.write()
    for each in session.exchanges:
        print(each.status, each.method, each.path, "follows" if each.follows else "", repr(each.answer or "")[:80])
    print(session.file, session.file.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
