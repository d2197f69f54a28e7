"""An agent's session behind a gateway: each turn finds all of the turn before, at whichever worker it goes on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.cluster_process import TEXT, Cluster, cluster_in
from tests.e2e.process import Server
from tests.serving.parsing.families import FAMILIES
from tests.waiting import DEADLINE, eventually

TOOL_MODEL = Path(__file__).parents[1] / "data" / "tool_model"
BLOCK = 16
TEMPLATE = replace(FAMILIES["Qwen2.5"], tools_late=True).template
"""The tools stand before the user's last question: the next one has all from the first question on written anew."""
ARGUMENTS = {
    "type": "object",
    "properties": {"module": {"enum": ["json", "re"]}, "line": {"type": "integer", "maximum": 99}},
    "required": ["module", "line"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "find", "description": TEXT, "parameters": ARGUMENTS}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers that share blocks through memory. The gateway sends requests to them in turn."""
    folder = tmp_path_factory.mktemp("agents")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    with cluster_in(folder, TOOL_MODEL) as it:
        for name in "ab":
            it.start_worker(name, "--chat-template", str(template), "--shm-tier", "64MiB")
        it.start_gateway("a", "b", routing="round-robin", next_turn_tokens="100000")
        for name in "ab":
            it.until(name, "up")
        yield it


@dataclass
class Session:
    """An agent at work. worker, prompt_tokens, total_tokens, cached_tokens, history: of the last turn."""

    gateway: Server
    messages: list[Any] = field(default_factory=list)
    worker: str = ""
    prompt_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0
    history: str = ""

    def ask(self, choice: str, **said: Any) -> dict[str, Any]:
        """Send a message; the answer's joins the session, with the arguments of calls in another order."""
        self.messages.append(said)
        body = {"model": "tiny", "messages": self.messages, "tools": [TOOL], "tool_choice": choice, "max_tokens": 40}
        response = httpx.post(
            f"{self.gateway.url}/v1/chat/completions",
            json={**body, "parallel_tool_calls": False, "temperature": 0, "min_tokens": 4},
            timeout=DEADLINE,
        )
        found = response.json()
        message: dict[str, Any] = found["choices"][0]["message"]
        for call in message.get("tool_calls") or ():
            arguments = json.loads(call["function"]["arguments"])
            call["function"]["arguments"] = json.dumps(dict(reversed(arguments.items())))
        self.messages.append(message)
        usage = found["usage"]
        self.prompt_tokens, self.total_tokens = usage["prompt_tokens"], usage["total_tokens"]
        self.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        self.worker = response.headers["x-emberkv-route"].split(";")[0]
        self.history = response.headers.get("x-emberkv-history", "")
        return message

    def answer_call(self, called: dict[str, Any]) -> None:
        (call,) = called["tool_calls"]
        self.ask("none", role="tool", tool_call_id=call["id"], content="It is there.")


def test_a_turn_finds_all_of_the_turn_before_at_the_other_worker(cluster: Cluster) -> None:
    assert cluster.gateway is not None
    gateway, tried = cluster.gateway, 0

    def is_found() -> bool:
        """Whether the second turn of a new session has; a load is left out where computing looks cheaper."""
        nonlocal tried
        tried += 1
        session = Session(gateway)
        called = session.ask("required", role="user", content=f"Question {tried}. {TEXT}")
        before = session.total_tokens, session.worker
        session.answer_call(called)
        assert session.worker != before[1]  # the gateway's own prefill of a next turn takes no turn of the policy
        assert session.history == "rewritten=1"
        return session.cached_tokens >= before[0] // BLOCK * BLOCK

    eventually(is_found)


def test_the_next_question_finds_all_before_its_text(cluster: Cluster) -> None:
    assert cluster.gateway is not None
    gateway, tried = cluster.gateway, 0

    def is_found() -> bool:
        nonlocal tried
        tried += 1
        session = Session(gateway)
        computed = gateway.metric("emberkv_next_turn_prompts_total", outcome="computed")
        called = session.ask("required", role="user", content=f"Another question {tried}. {TEXT}")
        session.answer_call(called)
        eventually(lambda: gateway.metric("emberkv_next_turn_prompts_total", outcome="computed") > computed)
        answered = session.worker
        Session(gateway).ask("none", role="user", content="Meanwhile?")  # so that the next one is for that worker
        session.ask("none", role="user", content="?")
        assert session.worker == answered
        return session.cached_tokens >= session.prompt_tokens - 2 * BLOCK

    eventually(is_found)
    computed = gateway.metric("emberkv_next_turn_prompts_total", outcome="computed")
    sent = [gateway.metric("emberkv_worker_background_requests_total", worker=each) for each in "ab"]
    assert sum(sent) >= computed > 0
