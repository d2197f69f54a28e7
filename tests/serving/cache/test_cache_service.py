"""The ledger_store on a real engine loop: a reason is there with the first output, and tells of the time before."""

import pytest

pytest.importorskip("torch")

from emberkv.core.explaining.explanation import Explanation, LossKind, MissReason
from emberkv.core.explaining.ledger import Ledger
from emberkv.engine.request import TokenOutput
from emberkv.serving.cache.ledger_store import LedgerStore
from emberkv.serving.cache.service import observer
from tests.engine.loop_harness import BLOCK, Harness, Inbox, running

PROMPT = [*range(2, 20)]


def watched(num_blocks: int = 24) -> tuple[Harness, LedgerStore]:
    harness, ledger_store = Harness(num_blocks=num_blocks), LedgerStore(Ledger(), clock=lambda: 7.0)
    harness.loop.on_update(observer(ledger_store, hit_unit=BLOCK))
    return harness, ledger_store


def explained(harness: Harness, ledger_store: LedgerStore, request_id: str, prompt: list[int]) -> Explanation:
    """As known on the engine's thread when the first output is handed out."""
    found: list[Explanation | None] = []

    def listen(output: TokenOutput) -> None:
        found.append(ledger_store.explained(output.request_id))

    harness.submit(request_id, prompt, new=2, inbox=Inbox(listen)).wait()
    assert found[0] is not None
    return found[0]


def reasons(explanation: Explanation) -> list[tuple[MissReason, int, int]]:
    return [(miss.reason, miss.start, miss.tokens) for miss in explanation.misses]


def test_the_reason_is_known_with_the_first_output() -> None:
    harness, ledger_store = watched()
    with running(harness):
        cold = explained(harness, ledger_store, "a", PROMPT)
        warm = explained(harness, ledger_store, "b", PROMPT)
        other = explained(harness, ledger_store, "c", [*PROMPT[:9], 40, *PROMPT[10:]])
    assert reasons(cold) == [(MissReason.NEW, 0, 16), (MissReason.PARTIAL, 16, 2)]
    assert (warm.hit, reasons(warm)) == ({"pool": 16}, [(MissReason.PARTIAL, 16, 2)])
    left = [(MissReason.ALIGNMENT, 8, 1), (MissReason.DIVERGED, 9, 7), (MissReason.PARTIAL, 16, 2)]
    assert (other.hit, reasons(other)) == ({"pool": 8}, left)
    assert other.divergence is not None
    assert (other.divergence.position, other.divergence.found[0], other.divergence.expected[0]) == (9, 40, 11)


def test_an_eviction_on_the_way_is_told() -> None:
    harness, ledger_store = watched(num_blocks=6)
    with running(harness):
        explained(harness, ledger_store, "a", PROMPT)
        explained(harness, ledger_store, "b", [30, *PROMPT[1:]])
        again = explained(harness, ledger_store, "c", PROMPT)
    (evicted, _) = again.misses[-2:]
    assert evicted.reason is MissReason.EVICTED
    assert evicted.loss is not None
    assert (evicted.loss.tier, evicted.loss.at, evicted.loss.kind) == ("pool", 7.0, LossKind.EVICTED)
