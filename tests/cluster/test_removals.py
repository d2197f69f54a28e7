"""Removals from several workers, some of which are away, over the real cache of each."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from emberkv.cluster import removals
from emberkv.cluster.cache_routes import merged_prefixes
from emberkv.cluster.removals import ClusterRemovals, WorkerAnswer
from emberkv.cluster.workers import Worker
from emberkv.engine.request import GenerationRequest, SamplingParams
from emberkv.errors import ConfigError, EmberError, WorkerUnreachableError
from emberkv.serving.cache.service import PrefixPath
from emberkv.serving.tenancy import DEFAULT_TENANT
from tests.cluster.fake_workers import FakeWorker
from tests.cluster.test_cluster_engine import cluster
from tests.serving.core_engine import CoreEngine
from tests.waiting import on_a_loop, until

PROMPT = list(range(1, 33))
LONGER = [*PROMPT, *range(50, 66)]
OTHER = [*PROMPT[:16], *range(70, 86)]


class Workers:
    """Workers by name, each with a cache of its own, and what is removed from all of them."""

    def __init__(self, **prompts: list[list[int]]) -> None:
        """prompts: what each worker has served."""
        self.engines = {name: CoreEngine() for name in prompts}
        self.fakes = {name: FakeWorker(name, cache=self.engines[name].service) for name in prompts}
        for name, served in prompts.items():
            for number, prompt in enumerate(served):
                request = GenerationRequest(f"{name}-{number}", prompt, SamplingParams(max_tokens=1))
                self.engines[name].submit(request, lambda _: None)

    @asynccontextmanager
    async def removing(self, path: Path | None = None) -> AsyncIterator[ClusterRemovals]:
        async with cluster({f"http://{name}": fake for name, fake in self.fakes.items()}) as it:
            each = ClusterRemovals(it.membership, path=path, retry_seconds=0.01)
            try:
                yield each
            finally:
                await each.close()

    def cached(self, name: str, prompt: list[int]) -> int:
        """Tokens of full blocks."""
        engine = self.engines[name]
        return engine.scheduler.cache.cached_tokens(engine.chain([*prompt, 0], DEFAULT_TENANT))

    def path(self, prompt: list[int]) -> PrefixPath:
        return PrefixPath.of(next(iter(self.engines.values())).chain(prompt, DEFAULT_TENANT), prompt, "")


def failed(outcomes: Mapping[Worker, WorkerAnswer]) -> dict[str, EmberError]:
    """By the worker's name."""
    return {each.url[7:]: outcome for each, outcome in outcomes.items() if isinstance(outcome, EmberError)}


@on_a_loop
async def test_a_prefix_goes_everywhere_but_what_another_shares_at_any_worker_stays_everywhere() -> None:
    workers = Workers(a=[LONGER], b=[PROMPT, OTHER], c=[])
    async with workers.removing() as removing:
        outcomes = await removing.remove_prefix(workers.path(PROMPT))
    assert not failed(outcomes)
    assert (workers.cached("a", LONGER), workers.cached("b", PROMPT)) == (16, 16)
    assert workers.cached("b", OTHER) == len(OTHER)
    answers = {each.worker_id: outcome for each, outcome in outcomes.items()}
    assert [answers[name]["blocks"] for name in "abc"] == [{"pool": 8}, {"pool": 4}, {"pool": 0}]


@on_a_loop
async def test_a_worker_that_is_away_makes_up_for_what_it_has_missed() -> None:
    workers = Workers(a=[PROMPT], b=[PROMPT, OTHER])
    workers.fakes["b"].die()
    async with workers.removing() as removing:
        outcomes = await removing.remove_prefix(workers.path(PROMPT))
        assert isinstance(failed(outcomes)["b"], WorkerUnreachableError)
        assert (workers.cached("a", PROMPT), workers.cached("b", PROMPT)) == (0, len(PROMPT))
        assert list(removing.missed) == ["http://b"]
        workers.fakes["b"].restart()
        await until(lambda: not removing.missed and workers.cached("b", PROMPT) == 0)


@on_a_loop
async def test_a_prompt_that_fills_no_block_goes_everywhere_with_what_goes_on_from_it() -> None:
    beside = [PROMPT[0], *range(90, 105)]
    workers = Workers(a=[PROMPT, beside], b=[PROMPT[:2], OTHER])
    async with workers.removing() as removing:
        outcomes = await removing.remove_prefix(workers.path(PROMPT[:2]))
        assert not failed(outcomes)
        assert (workers.cached("a", PROMPT), workers.cached("b", PROMPT), workers.cached("b", OTHER)) == (0, 0, 0)
        assert workers.cached("a", beside) == len(beside)


@on_a_loop
async def test_missed_removals_are_repeated_after_a_restart_of_the_gateway(tmp_path: Path) -> None:
    kept = tmp_path / "missed"
    workers = Workers(a=[PROMPT], b=[PROMPT, OTHER])
    workers.fakes["b"].die()
    async with workers.removing(kept) as removing:
        await removing.remove_prefix(workers.path(PROMPT))
    workers.fakes["b"].restart()
    async with workers.removing(kept) as removing:
        assert list(removing.missed) == ["http://b"]
        removing.start()
        await until(lambda: kept.read_text() == "{}")
        assert workers.cached("b", PROMPT) == 0
    async with workers.removing(kept) as removing:
        assert not removing.missed


@on_a_loop
async def test_a_missed_clear_is_kept_and_another_file_refused(tmp_path: Path) -> None:
    kept = tmp_path / "missed"
    workers = Workers(a=[PROMPT], b=[PROMPT])
    workers.fakes["b"].die()
    async with workers.removing(kept) as removing:
        await removing.remove(None)
    assert kept.read_text() == '{"http://b":null}'
    for content in ("{", '{"b":["xyz"]}', "[]"):
        kept.write_text(content)
        with pytest.raises(ConfigError, match="is not a file of missed removals"):
            async with workers.removing(kept):
                pass


@on_a_loop
async def test_a_clear_that_was_missed_is_not_undone_by_a_removal() -> None:
    workers = Workers(a=[PROMPT], b=[PROMPT, [90, 91, *PROMPT]])
    workers.fakes["b"].die()
    async with workers.removing() as removing:
        assert set(failed(await removing.remove(None))) == {"b"}
        assert set(failed(await removing.remove(workers.path(PROMPT).block_hashes))) == {"b"}
        workers.fakes["b"].restart()
        await until(lambda: not removing.missed and workers.engines["b"].pool.num_cached == 0)


@on_a_loop
async def test_too_many_missed_blocks_become_all_of_them() -> None:
    workers = Workers(a=[PROMPT], b=[PROMPT, [90, 91, *PROMPT]])
    workers.fakes["b"].die()
    async with workers.removing() as removing:
        await removing.remove([number.to_bytes(32, "big") for number in range(removals.MAX_BLOCKS + 1)])
        workers.fakes["b"].restart()
        await until(lambda: not removing.missed and workers.engines["b"].pool.num_cached == 0)


def test_listings_are_merged_by_prefix() -> None:
    def listed(block_hash: str, tokens: int, hits: int, tier: str, last_hit: float) -> dict[str, object]:
        named = {"block_hash": block_hash, "tokens": tokens, "hits": hits, "last_hit": last_hit}
        return {**named, "tiers": [tier]}

    listings = {
        "a": [listed("one", 16, 3, "pool", 5.0), listed("two", 64, 1, "pool", 2.0)],
        "b": [listed("one", 16, 2, "disk", 9.0)],
    }
    one, two = merged_prefixes(listings, "hottest")
    assert (one["block_hash"], one["hits"], one["last_hit"], one["tiers"]) == ("one", 5, 9.0, ["pool", "disk"])
    assert (one["workers"], two["workers"]) == (["a", "b"], ["a"])
    assert [each["block_hash"] for each in merged_prefixes(listings, "largest")] == ["two", "one"]
