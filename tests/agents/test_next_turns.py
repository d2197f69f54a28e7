"""The user's second question in recorded sessions, on a template that drops earlier thoughts when the user asks again.

Each test prints how many of that prompt's tokens were cached (``pytest -rP``).
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.agents.replay import Replay, Reply
from tests.agents.server import FAMILY, agent_settings, scripted_lifecycle, scripted_model
from tests.agents.session_file import FOLDER, read_session
from tests.serving.harness import serving
from tests.waiting import DEADLINE, eventually

AGENTS = ["claude-code", "codex"]
USER = "<|im_start|>user\n"


@dataclass(frozen=True)
class Question:
    """The user's second question. rewritten, users_text: how many tokens of its prompt stand before the first answer,
    which the template writes anew, and before the user's text. computed: how many were computed ahead of it.
    """

    reply: Reply
    rewritten: int
    users_text: int
    computed: float


def _question(agent: str, next_turn_tokens: int) -> Question:
    """Send the agent's session to a server. Its second question waits until its prompt's beginning is computed."""
    exchanges = read_session(FOLDER / f"{agent}.jsonl.xz").exchanges
    question = [each for each in exchanges if each.follows][-1]
    answers, prompts = [""], []

    def script(prompt: str) -> str:
        prompts.append(prompt)
        return answers[-1]

    with (
        tempfile.TemporaryDirectory() as folder,
        scripted_model(script, Path(folder)) as model,
        serving(scripted_lifecycle(model), agent_settings(next_turn_tokens)) as server,
        httpx.Client(base_url=server.url, timeout=DEADLINE, trust_env=False) as http,
    ):
        replay = Replay(http, answers.append)
        for exchange in exchanges[: exchanges.index(question)]:
            assert replay.send(exchange).status == exchange.status
        if next_turn_tokens:
            eventually(lambda: _metric(http, "emberkv_next_turn_prompts_total", outcome="computed") == 1)
        computed = _metric(http, "emberkv_next_turn_tokens_total")
        reply = replay.send(question)
        prompt = [each for each in prompts if each.endswith(FAMILY.turn)][-1]  # others are beginnings of prompts

        def tokens_to(end: int) -> int:
            return len(model.tokenizer.encode(prompt[:end], add_special_tokens=False))

        first_answer = prompt.index(FAMILY.turn) + len(FAMILY.turn)
        users_text = prompt.rindex(USER) + len(USER)
        return Question(reply, tokens_to(first_answer), tokens_to(users_text), computed)


def _metric(http: httpx.Client, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(http.get("/metrics").text)
    (value,) = [s.value for family in families for s in family.samples if (s.name, s.labels) == (name, labels)]
    return value


@pytest.mark.parametrize("agent", AGENTS)
def test_the_second_question_finds_all_before_the_users_text_in_the_cache(agent: str) -> None:
    question = _question(agent, next_turn_tokens=60_000)
    print(f"{agent}: {question.reply.cached_tokens} of {question.reply.prompt_tokens} tokens cached")
    assert question.reply.cached_tokens == question.users_text
    assert question.computed == question.users_text - question.rewritten > 400


@pytest.mark.parametrize("agent", AGENTS)
def test_without_next_turns_it_finds_what_stands_before_the_first_answer(agent: str) -> None:
    question = _question(agent, next_turn_tokens=0)
    print(f"{agent}: {question.reply.cached_tokens} of {question.reply.prompt_tokens} tokens cached")
    assert question.reply.cached_tokens == question.rewritten
    assert question.computed == 0
