"""Recorded decisions are made again as they were, by every policy, and what is no recording is refused by its line."""

import errno
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from emberkv.cluster.decision_log import DecisionLog, read_decisions, recorder_until_full, replay
from emberkv.cluster.policies import ReplicaState
from emberkv.cluster.routing import ROUTER_NAMES, RoutingRequest, make_router, names
from emberkv.core.hashing import TokenChain
from emberkv.errors import ConfigError, WorkloadError

BLOCK = 4


def recorded(routing: str, path: Path, decisions: int = 60) -> list[int]:
    """A fleet of four under changing loads, with sessions and what they leave in the pools; one replica is down."""
    rng, file = Random(5), io.BytesIO()
    router = make_router(routing, Random(1), names(4))
    router.record = DecisionLog(file, routing).record
    chosen = []
    for number in range(decisions):
        session = rng.randrange(12)
        chain = TokenChain(bytes(32), range(session * 1000, session * 1000 + rng.randrange(80)), BLOCK)
        states = [ReplicaState(rng.randrange(200), slot != 2, rng.randrange(50), 500.0) for slot in range(4)]
        states[1].load_rates = {"disk": 4000.0}
        decision = router.decide(RoutingRequest(chain, len(chain), f"session-{session}", float(number)), states)
        assert decision is not None
        chosen.append(decision.replica)
        if router.index is not None:
            router.index.add(decision.replica, chain.block_hashes[:-1])
            router.index.add(1, chain.block_hashes, "disk")
    path.write_bytes(file.getvalue())
    return chosen


@pytest.mark.parametrize("routing", ROUTER_NAMES)
def test_the_same_inputs_give_the_same_decisions(routing: str, tmp_path: Path) -> None:
    chosen = recorded(routing, tmp_path / "log")
    lines = list(read_decisions(tmp_path / "log"))
    assert [line.replica for line in lines] == chosen
    found = replay(lines)
    assert (found.decisions, found.same, found.first_other) == (60, 60, None)
    assert found.expected == found.recorded


def test_another_policy_is_judged_by_what_it_would_have_chosen(tmp_path: Path) -> None:
    recorded("expected-ttft", tmp_path / "log")
    found = replay(read_decisions(tmp_path / "log"), "consistent-hashing")
    assert found.same < 60
    assert found.first_other is not None
    with pytest.raises(ConfigError, match="--routing random needs more than expected-ttft recorded"):
        replay(read_decisions(tmp_path / "log"), "random")


def test_a_line_has_no_hash_and_no_session(tmp_path: Path) -> None:
    recorded("expected-ttft", tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert "session-" not in text
    assert max(len(value) for value in json.loads(text.splitlines()[5]).values() if isinstance(value, str)) < 32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "line 2.*version 2; this emberkv reads version 1"),
        ({"replica": 9}, "line 2.*slots .*9.* of 4 replicas"),
        ({"replica": 2}, "line 2.*not up"),
        ({"prompt_tokens": -1}, "line 2.*prompt_tokens"),
        ({"more": 1}, "line 2.*more"),
    ],
)
def test_what_is_no_decision_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    recorded("expected-ttft", tmp_path / "log", decisions=3)
    first, second, _ = (tmp_path / "log").read_text().splitlines()
    (tmp_path / "log").write_text("\n".join([first, json.dumps({**json.loads(second), **change})]) + "\n")
    with pytest.raises(WorkloadError, match=said):
        list(read_decisions(tmp_path / "log"))


def test_a_full_disk_ends_the_recording_and_not_the_routing() -> None:
    class FullFile(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    router, failures = make_router("round-robin", Random(1), names(2)), list[OSError]()
    router.record = recorder_until_full(DecisionLog(FullFile(), "round-robin"), failures.append)
    request = RoutingRequest(TokenChain(bytes(32), range(8), BLOCK), 8)
    chosen = [router.decide(request, [ReplicaState(), ReplicaState()]) for _ in range(3)]
    assert [each.replica for each in chosen if each is not None] == [0, 1, 0]
    assert [error.strerror for error in failures] == ["No space left on device"]


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="cannot read"):
        list(read_decisions(tmp_path / "nothing"))
