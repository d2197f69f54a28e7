"""Record a coding agent's requests, with its own prompts replaced by words of ours, for the tests that replay them.

    PYTHONPATH=src:. python scripts/record_agents.py claude /tmp/clients-claude/node_modules/.bin/claude

The agent runs on this machine alone, against a server of the tests whose answers are scripted: it reads a file, runs
two commands at once, edits the file and says so; then it is asked again in the same session. What it sent is written
to tests/agents/sessions; with --raw FOLDER it is also written there as it was.
"""

import argparse
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tests.agents.driving import drive
from tests.agents.scenario import AGENTS
from tests.agents.session_file import Exchange, Replacement, Session

HOME = Path("/tmp/agent-home")  # noqa: S108 - agents write such paths into their prompts: they are the same everywhere
KEPT_HEADERS = re.compile(
    r"accept|content-type|anthropic-.*|user-agent|openai-.*|originator|x-app|.*session.*|.*thread.*"
)


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
    parser.add_argument("program", type=Path, help="the agent's program")
    parser.add_argument("--raw", type=Path, help="a folder for the requests as they were")
    given = parser.parse_args(arguments)
    agent = AGENTS[given.agent]
    version = subprocess.run([given.program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+\.\d+[.\w-]*", version)
    assert found is not None, version
    driven = drive(agent, given.program, HOME)
    for done in driven.commands:
        print(f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    exchanges = [each.exchange for each in driven.requests]
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
