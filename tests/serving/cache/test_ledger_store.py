"""The ledger store between threads: updates in order, readers that delay no writer, records that are bounded."""

import threading

from emberkv.core.events import POOL, BlockRemoved, BlockStored
from emberkv.core.explaining.explanation import CacheOutcome, Loss, LossKind, MissReason
from emberkv.core.explaining.ledger import Ledger, largest
from emberkv.core.hashing import BlockHash
from emberkv.serving.cache.ledger_store import COPIED_BLOCKS, LedgerStore
from tests.core.harness import chain
from tests.core.ledgers import stored
from tests.waiting import DEADLINE

PROMPT = chain(range(10))
(FIRST, SECOND) = PROMPT.block_hashes


def ledger_store(**limits: int) -> LedgerStore:
    return LedgerStore(Ledger(), clock=lambda: 5.0, **limits)


def test_a_prompt_is_explained_as_it_was_when_admitted() -> None:
    kept = ledger_store()
    kept.admitted("a", PROMPT, 10, CacheOutcome(), hit_unit=4)
    kept.apply([stored(PROMPT)])
    kept.admitted("b", PROMPT, 10, CacheOutcome({POOL: 8}), hit_unit=4)
    first, second = kept.explained("a"), kept.explained("b")
    assert first is not None
    assert second is not None
    assert [miss.reason for miss in first.misses] == [MissReason.NEW, MissReason.PARTIAL]
    assert [miss.reason for miss in second.misses] == [MissReason.PARTIAL]
    with kept.reading() as ledger:
        assert ledger.known(SECOND).hits == 1


def test_only_the_last_records_are_kept() -> None:
    kept = ledger_store(max_records=2)
    for request_id in "abc":
        kept.admitted(request_id, PROMPT, 10, CacheOutcome(), hit_unit=4)
    assert [kept.explained(request_id) is not None for request_id in "abc"] == [False, True, True]


def test_a_reader_does_not_hold_up_who_brings_news() -> None:
    kept = ledger_store()
    writer = threading.Thread(target=lambda: kept.apply([stored(PROMPT)]))
    with kept.reading() as ledger:
        writer.start()
        writer.join(DEADLINE)
        assert not writer.is_alive()
        assert FIRST not in ledger
    with kept.reading() as ledger:
        assert FIRST in ledger


def test_news_of_many_threads_is_complete() -> None:
    kept = ledger_store()
    chains = [chain([number] * 4) for number in range(200)]

    def write(part: int) -> None:
        for each in chains[part::4]:
            kept.apply([BlockStored(tuple(each.block_hashes), each.root, (each.block_tokens(0),), 4)])
            kept.explained("nobody")

    threads = [threading.Thread(target=write, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    with kept.reading() as ledger:
        assert len(ledger) == 200


def test_what_one_place_gives_up_may_still_be_in_another() -> None:
    kept = ledger_store()
    on_disk: set[BlockHash] = {FIRST}
    kept.below = lambda block_hash: ["disk"] if block_hash in on_disk else []
    kept.apply([stored(PROMPT), BlockRemoved((FIRST, SECOND))])
    with kept.reading() as ledger:
        assert ledger.tiers_of(FIRST) == ["disk"]
        assert ledger.known(FIRST).loss is None
        assert ledger.known(SECOND).loss == Loss(POOL, 5.0, LossKind.EVICTED)
    on_disk.clear()
    kept.apply([BlockRemoved((FIRST,), tier="disk")])
    with kept.reading() as ledger:
        assert ledger.known(FIRST).loss == Loss("disk", 5.0, LossKind.EVICTED)


def test_a_listing_works_on_a_copy_while_answers_are_explained() -> None:
    kept = ledger_store()
    for number in range(3 * COPIED_BLOCKS // 2):
        each = chain([number] * 4)
        kept.apply([BlockStored(tuple(each.block_hashes), each.root, (each.block_tokens(0),), 4)])
    view = kept.copied()
    kept.admitted("later", PROMPT, 10, CacheOutcome(), hit_unit=4)
    assert kept.explained("later") is not None
    assert len(view) == 3 * COPIED_BLOCKS // 2
    assert len(largest(view, 10_000)) == len(view)


def test_an_explanation_that_is_there_waits_for_no_reader() -> None:
    kept = ledger_store()
    kept.admitted("a", PROMPT, 10, CacheOutcome(), hit_unit=4)
    found: list[object] = []
    asking = threading.Thread(target=lambda: found.append(kept.explained("a")), daemon=True)
    with kept.reading():
        asking.start()
        asking.join(DEADLINE)
        assert len(found) == 1
