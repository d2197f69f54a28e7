"""Blocks exported from one engine over PyTorch and imported into another give logits that are equal to the last bit."""

import random
from pathlib import Path

import pytest
import torch

from emberkv.core.feed import EventsLost
from emberkv.engine.commands import ExportBlocks, ExportCheckpoint, ImportBlocks, ReadEvents, ReadSnapshot
from emberkv.engine.request import GenerationRequest, SamplingParams
from tests.engine.conftest import ModelFactory
from tests.engine.torch.test_exactness import text
from tests.engine.torch.test_restart import (
    HYBRID,
    RecordingSampler,
    answered,
    ask,
    engine,
    has_bits_of_a_cold_run,
    usage,
)
from tests.waiting import DEADLINE

PROMPT = text(random.Random(1), 200)
BLOCKS = 12  # full ones of 16


@pytest.mark.parametrize("from_disk", [False, True])
def test_a_hit_on_imported_blocks_has_the_bits_of_a_cold_run(
    paged: ModelFactory, tmp_path: Path, from_disk: bool
) -> None:
    cold, warm = RecordingSampler(), RecordingSampler()
    with engine(paged, tmp_path, sampler=cold) as first:
        chain = first.loop.chain(GenerationRequest("a", PROMPT, SamplingParams(max_tokens=8)))
        expected = ask(first, PROMPT)
        assert usage(expected).cached_tokens == 0
        records = first.loop.execute(ExportBlocks(chain.block_hashes)).result(DEADLINE)
    if from_disk:
        with engine(paged, tmp_path) as again:
            from_tier = again.loop.execute(ExportBlocks(chain.block_hashes)).result(DEADLINE)
            assert again.loop.stats().tiers["disk"].loads == BLOCKS
            assert from_tier == records
    with engine(paged, None, sampler=warm) as second:
        whole = [record for record in records if record is not None]
        assert second.loop.execute(ImportBlocks(chain, whole)).result(DEADLINE).imported == BLOCKS
        answer = ask(second, PROMPT)
        hit = 199 // second.executor.alignment * second.executor.alignment
        assert usage(answer).cached_tokens == hit
    assert answer.tokens == expected.tokens
    assert len(cold.logits) == len(warm.logits) == 8
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(warm.logits, cold.logits, strict=True))


def test_a_hybrid_goes_on_from_an_imported_checkpoint_with_the_bits_of_a_cold_run(
    paged: ModelFactory, tmp_path: Path
) -> None:
    """It comes from the exporting engine's folder."""
    prompt, hit = answered(paged, tmp_path, "lfm2")
    with engine(paged, tmp_path, "lfm2", **HYBRID) as first:
        chain = first.loop.chain(GenerationRequest("", prompt, SamplingParams()))
        found = first.loop.execute(ExportBlocks(chain.block_hashes)).result(DEADLINE)
        checkpoint = first.loop.execute(ExportCheckpoint(chain, 2)).result(DEADLINE)
        records = [each for each in (*found, checkpoint) if each is not None]
        assert first.loop.stats().checkpoints.get("exported", 0) == (hit > 256)
    warm = RecordingSampler()
    with engine(paged, None, "lfm2", sampler=warm, **HYBRID) as second:
        taken = second.loop.execute(ImportBlocks(chain, records)).result(DEADLINE)
        assert (taken.imported, taken.checkpoints, taken.refused) == (2, hit > 256, {})
        answer = ask(second, prompt)
        assert usage(answer).cached_tokens == hit
    has_bits_of_a_cold_run(paged, "lfm2", prompt, answer, warm, **HYBRID)


def test_readers_of_an_engine_over_a_folder_with_blocks_begin_with_a_snapshot(
    paged: ModelFactory, tmp_path: Path
) -> None:
    with engine(paged, tmp_path) as first:
        ask(first, PROMPT).wait()
        hashes = first.loop.chain(GenerationRequest("a", PROMPT, SamplingParams(max_tokens=8))).block_hashes
    with engine(paged, tmp_path) as second:
        assert isinstance(second.loop.execute(ReadEvents(0)).result(DEADLINE), EventsLost)
        pool = second.loop.execute(ReadSnapshot()).result(DEADLINE)
        disk = second.loop.execute(ReadSnapshot(pool.next_cursor or "")).result(DEADLINE)
    assert (pool.block_hashes, disk.tier) == ((), "disk")
    assert set(hashes) <= set(disk.block_hashes)
