"""The programs of coding agents (`--clients`), in the versions of the recorded sessions, on loopback alone.

Each does the task of `tests.agents.scenario` against a server whose answers are scripted.
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.agents.driving import SECONDS, Driven, drive
from tests.agents.replay import check_turns, read_reply
from tests.agents.scenario import AGENTS, FILE, Agent
from tests.agents.server import KEEPS_THOUGHTS
from tests.agents.session_file import FOLDER, Exchange, Session, read_session
from tests.clients.installing import INSTALL_SECONDS, environment, npm_program

NPM_PACKAGES = {
    "claude": "@anthropic-ai/claude-code",
    "codex": "@openai/codex",
    "qwen": "@qwen-code/qwen-code",
    "opencode": "opencode-ai",
    "cline": "cline",
}

pytestmark = pytest.mark.timeout(INSTALL_SECONDS + 4 * SECONDS)


@dataclass(frozen=True)
class Use:
    """An agent that has done the task, and its recorded session."""

    agent: Agent
    driven: Driven
    recorded: Session


@pytest.fixture(scope="module", params=AGENTS)
def use(request: pytest.FixtureRequest, clients: bool, tmp_path_factory: pytest.TempPathFactory) -> Use:
    if not clients:
        pytest.skip("installs coding agents: --clients")
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    agent = AGENTS[name].at(folder / "project")
    recorded = read_session(FOLDER / f"{agent.name}.jsonl.xz")
    program = _program(name, recorded.version)
    return Use(agent, drive(agent, program, folder / "home", KEEPS_THOUGHTS), recorded)


def _program(name: str, version: str) -> Path:
    if name in NPM_PACKAGES:
        program = npm_program(name, f"{NPM_PACKAGES[name]}@{version}")
    else:
        program = environment(f"requirements-{name}.txt").parent / name
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert version in shown.stdout, f"{program} is not in the version of the recorded session, which is {version}"
    return program


def test_it_has_changed_the_file(use: Use) -> None:
    for done in use.driven.commands:
        assert done.returncode == 0, done.stdout + done.stderr
    assert (use.agent.project / "greeting.txt").read_text() == FILE.replace("hello", "goodbye")


def test_its_requests_are_answered_as_in_the_recorded_session(use: Use) -> None:
    answered = [each.exchange for each in use.driven.requests]
    assert set(map(_kind, answered)) <= set(map(_kind, use.recorded.exchanges))
    assert [_kind(each) for each in answered if each.follows] == [
        _kind(each) for each in use.recorded.exchanges if each.follows
    ]


def test_a_turn_finds_all_of_the_turn_before_in_the_cache(use: Use) -> None:
    check_turns([read_reply(each.exchange, each.response) for each in use.driven.requests if each.exchange.follows])


def _kind(exchange: Exchange) -> tuple[str, str, int]:
    return exchange.method, exchange.path, exchange.status
