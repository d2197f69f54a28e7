"""A server that is killed under load at random moments, and started again on the folder that it left."""

import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.conftest import CheckpointFactory
from tests.e2e.process import Forked, Server, serving
from tests.e2e.users import PROMPTS, Choice, ask, users
from tests.tiers.disks import files_of
from tests.waiting import DEADLINE, eventually

BLOCK_BYTES = 12 * 1024
"""Keys and values of 16 tokens."""
QUOTA = 3 * 2**20
MODEL = ("--served-name", "tiny", "--prefill-chunk", "32", "--max-step-tokens", "64", "--no-warmup")
SMALL = (
    *("--cache-ram", str(96 * BLOCK_BYTES)),
    *("--ram-tier", str(32 * BLOCK_BYTES)),
    *("--cache-disk", str(QUOTA)),
)
"""The first two hold less than the prompts whose answers are compared, and all of them less than the users ask for."""
ERRORS = ("tier_corrupt", "tier_errors", "tier_failures", "tier_skipped")


def test_kills_under_load(checkpoint: CheckpointFactory, tmp_path: Path, long: bool) -> None:
    """On two folders, for as many processors."""
    model = (str(checkpoint("llama")), *MODEL)
    with ThreadPoolExecutor() as threads:
        expected = threads.submit(answers_without_cache, tmp_path / "without", model)
        folders = [(tmp_path / "even", 3), (tmp_path / "odd", 2)]
        running = [
            threads.submit(kill_again_and_again, folder, model, expected, rounds * 12 if long else rounds)
            for folder, rounds in folders
        ]
        counts = sum((each.result() for each in running), Counter[str]())
    assert counts["kills"] == (60 if long else 5)
    assert counts["warm starts"] > counts["kills"] / 2
    assert counts["evictions"]


def answers_without_cache(folder: Path, model: Sequence[str]) -> list[Choice]:
    folder.mkdir()
    with serving(folder, *model, "--no-prefix-cache") as server:
        return answers(server)


def kill_again_and_again(
    folder: Path, model: Sequence[str], expected: "Future[list[Choice]]", rounds: int
) -> Counter[str]:
    """Then once more an orderly end. Reuse is exact in every other round: what was computed gives equal bits in all."""
    cache, rng, counts = folder / "cache", random.Random(folder.name), Counter[str]()
    folder.mkdir()
    for number in range(rounds):
        exact = ("--exact",) if number % 2 else ()
        with serving(folder, *model, *SMALL, "--cache-dir", str(cache), *exact) as server:
            counts["warm starts"] += check_server(server, cache, expected.result(DEADLINE))
            with users(server, expected.result(), count=4, seed=f"{folder.name} {number}") as answered:
                received = [answered.get(timeout=DEADLINE) for _ in range(rng.randint(1, 80))]
                counts["evictions"] += bool(server.metric("emberkv_tier_evictions_total", tier="disk"))
            counts["kills"] += 1
        assert set(received) == {None}
        check_folder(cache)
    with serving(folder, *model, *SMALL, "--cache-dir", str(cache)) as server:
        counts["warm starts"] += check_server(server, cache, expected.result())
        server.process.terminate()
        assert server.exit_code() == 0
    check_folder(cache)
    assert temporary_files(cache) == []
    return counts


def check_server(server: Server, cache: Path, expected: Sequence[Choice]) -> bool:
    """It answers as if there were no cache, and has found nothing wrong in the folder; whether it found some there."""
    assert answers(server) == expected
    eventually(lambda: server.is_idle() and not server.metric("emberkv_tier_queue_bytes"))
    assert temporary_files(cache) == []
    assert {kind: server.total(f"emberkv_{kind}_total") for kind in ERRORS} == dict.fromkeys(ERRORS, 0)
    for kind in ("tokens", "size"):
        assert server.total("emberkv_transfer_errors_total", kind=kind) == 0
    return server.metric("emberkv_tier_reused_tokens_total", tier="disk") > 0


def check_folder(cache: Path) -> None:
    """Each block in it is sound, and all that lies there is within the quota."""
    log = cache.parent / "verify.log"
    assert Forked("cache", ("verify", str(cache)), log).wait(DEADLINE) == 0, log.read_text()
    assert sum(path.stat().st_size for path in [*files_of(cache), *temporary_files(cache)]) <= QUOTA


def answers(server: Server) -> list[Choice]:
    with httpx.Client(base_url=server.url, timeout=DEADLINE) as client:
        return [ask(client, prompt) for prompt in PROMPTS]


def temporary_files(cache: Path) -> list[Path]:
    return list((cache / "blocks" / "tmp").iterdir())
