"""A server that is killed under load at random moments, and started again on the folder that it left."""

import random
from collections.abc import Sequence
from pathlib import Path

import httpx
from typer.testing import CliRunner

from emberkv.cli.main import app
from tests.conftest import CheckpointFactory
from tests.e2e.process import DEADLINE, Server, eventually, serving
from tests.e2e.users import PROMPTS, Choice, ask, users
from tests.tiers.disks import files_of

BLOCK_BYTES = 12 * 1024
"""Keys and values of 16 tokens."""
QUOTA = 3 * 2**20
MODEL = ("--served-name", "tiny", "--prefill-chunk", "32", "--max-step-tokens", "64", "--no-warmup")
POOL = ("--cache-ram", str(96 * BLOCK_BYTES))
"""Less than the users' prompts take together, or those whose answers are compared."""
BELOW = ("--ram-tier", str(32 * BLOCK_BYTES), "--cache-disk", str(QUOTA), "--cache-dir")


def answers(server: Server) -> list[Choice]:
    with httpx.Client(base_url=server.url, timeout=DEADLINE) as client:
        return [ask(client, prompt) for prompt in PROMPTS]


def temporary_files(cache: Path) -> list[Path]:
    return list((cache / "blocks" / "tmp").iterdir())


def check_folder(cache: Path) -> None:
    """Each block in it is sound, and all that lies there is within the quota."""
    outcome = CliRunner().invoke(app, ["cache", "verify", str(cache)])
    assert outcome.exit_code == 0, outcome.output
    assert sum(path.stat().st_size for path in [*files_of(cache), *temporary_files(cache)]) <= QUOTA


def check_server(server: Server, cache: Path, expected: Sequence[Choice]) -> None:
    """It answers as if there were no cache, and has found nothing wrong in the folder."""
    assert answers(server) == expected
    eventually(lambda: server.is_idle() and not server.total("emberkv_tier_queue_bytes"))
    assert temporary_files(cache) == []
    for trouble in ("tier_corrupt", "tier_troubles", "tier_failures", "tier_skipped", "transfer_troubles"):
        assert server.total(f"emberkv_{trouble}_total") == 0, trouble


def test_kills_under_load(checkpoint: CheckpointFactory, tmp_path: Path, long: bool) -> None:
    """Reuse is exact in every other round only; prompts that were computed give equal bits even so."""
    rng, rounds = random.Random(30), 60 if long else 5
    cache, model = tmp_path / "cache", (str(checkpoint("llama")), *MODEL)
    with serving(tmp_path, *model, "--no-prefix-cache") as server:
        expected = answers(server)
    warm_starts = evictions = 0
    for number in range(rounds):
        exact = ("--exact",) if number % 2 else ()
        with serving(tmp_path, *model, *POOL, *BELOW, str(cache), *exact) as server:
            check_server(server, cache, expected)
            warm_starts += server.metric("emberkv_tier_reused_tokens_total", tier="disk") > 0
            with users(server, expected, count=4, seed=number) as answered:
                told = [answered.get(timeout=DEADLINE) for _ in range(rng.randint(1, 80))]
                evictions += server.total("emberkv_tier_evictions_total", tier="disk")
        assert set(told) == {None}
        check_folder(cache)
    with serving(tmp_path, *model, *POOL, *BELOW, str(cache)) as server:
        check_server(server, cache, expected)
        warm_starts += server.metric("emberkv_tier_reused_tokens_total", tier="disk") > 0
        server.process.terminate()
        assert server.exit_code() == 0
    check_folder(cache)
    assert temporary_files(cache) == []
    assert warm_starts > rounds / 2
    assert evictions
