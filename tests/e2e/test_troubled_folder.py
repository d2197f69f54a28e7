"""A real server whose cache folder is shared, read-only, full, damaged or gone: right answers all the same.

What went wrong is logged_before by counters, and none of these servers fails to stop in order.
"""

import os
import random
import resource
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.conftest import CheckpointFactory
from tests.e2e.process import Server, serving
from tests.e2e.users import PROMPTS, Choice, ask
from tests.tiers.disks import files_of
from tests.waiting import DEADLINE, eventually

SMALL_POOL = ("--cache-ram", str(48 * 12 * 1024))
"""48 blocks; the prompts take 84, so that each round of them needs what lies below."""
SECOND_HALVES = 4 * 10
"""Blocks of the longer prompts of each pair that the shorter ones have not."""


@dataclass
class Filled:
    """A server that runs, the folder to which it has written, and what it has answered to `PROMPTS`."""

    server: Server
    cache: Path
    flags: Sequence[str]
    expected: Sequence[Choice]


@pytest.fixture(scope="module")
def filled(checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    folder = tmp_path_factory.mktemp("filled")
    flags = (str(checkpoint("llama")), "--served-name", "tiny", "--prefill-chunk", "32", "--no-warmup", *SMALL_POOL)
    with serving(folder, *flags, "--cache-dir", str(folder / "cache")) as server:
        expected = answers(server)
        settle(server)
        yield Filled(server, folder / "cache", flags, expected)
    assert server.exit_code() == 0


def answers(server: Server) -> list[Choice]:
    with httpx.Client(base_url=server.url, timeout=DEADLINE) as client:
        return [ask(client, prompt) for prompt in PROMPTS]


def right(server: Server, expected: Sequence[Choice]) -> bool:
    """True; fails where an answer is not as expected."""
    assert answers(server) == expected
    return True


def settle(server: Server) -> None:
    eventually(lambda: server.is_idle() and not server.metric("emberkv_tier_queue_bytes"))


def reused(server: Server, tier: str) -> float:
    """Tokens."""
    return server.metric("emberkv_tier_reused_tokens_total", tier=tier)


def test_a_second_server_on_the_folder_loads_and_does_not_store(filled: Filled, tmp_path: Path) -> None:
    with serving(tmp_path, *filled.flags, "--cache-dir", str(filled.cache)) as second:
        eventually(lambda: right(second, filled.expected) and reused(second, "disk"))
        with httpx.Client(base_url=second.url, timeout=DEADLINE) as client:
            ask(client, PROMPTS[0][::-1])
        settle(second)
        skipped = second.metric("emberkv_tier_skipped_total", tier="disk", reason="another_process_writes_here")
        assert skipped == len(PROMPTS[0]) // 16
        assert "another process writes here" in second.log.read_text()
        assert right(filled.server, filled.expected)
    assert second.exit_code() == 0


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="nothing here to take root's right to write anywhere")
def test_a_read_only_folder_is_loaded_from(filled: Filled, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(filled.cache, cache)
    folders = [cache, *(path for path in cache.rglob("*") if path.is_dir())]
    for path in [*folders, cache / "blocks" / "lock"]:
        path.chmod(0o500)
    obedient = ("setpriv", "--bounding-set", "-dac_override") if os.geteuid() == 0 else ()
    try:
        with serving(tmp_path, *filled.flags, "--cache-dir", str(cache), through=obedient) as server:
            eventually(lambda: right(server, filled.expected) and reused(server, "disk"))
            assert server.metric("emberkv_tier_errors_total", tier="disk", kind="folder_cannot_be_written") == 1
        assert server.exit_code() == 0
    finally:
        for path in folders:
            path.chmod(0o700)


def test_where_the_disk_takes_nothing_the_ram_tier_still_serves(filled: Filled, tmp_path: Path) -> None:
    """A file may have less bytes than a block needs, so that each write fails half way."""
    flags = (*filled.flags, "--cache-dir", str(tmp_path / "cache"), "--ram-tier", "4MiB", "--log-level", "warning")
    with serving(tmp_path, *flags) as server:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
        assert right(server, filled.expected)
        # a load that a slow machine does not bring in time is given up, so not every one is sure to be of use
        eventually(lambda: right(server, filled.expected) and reused(server, "ram"))
        settle(server)
        assert server.metric("emberkv_tier_skipped_total", tier="disk", reason="write_failed") >= SECOND_HALVES
        assert server.metric("emberkv_tier_blocks", tier="disk") == 0
        assert files_of(tmp_path) == []
        assert list((tmp_path / "cache" / "blocks" / "tmp").iterdir()) == []
    assert server.exit_code() == 0


def damage(path: Path, rng: random.Random) -> None:
    """Flip a bit, or cut the end off."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if rng.random() < 0.5:
        content[place] ^= 1 << rng.randrange(8)
    else:
        del content[place:]
    path.write_bytes(content)


def finds_damage(server: Server, expected: Sequence[Choice]) -> bool:
    """Ask until a damaged file is found, and no further: what is written anew in its place could be loaded then."""
    with httpx.Client(base_url=server.url, timeout=DEADLINE) as client:
        for prompt, answer in zip(PROMPTS, expected, strict=True):
            assert ask(client, prompt) == answer
            if server.total("emberkv_tier_corrupt_total", tier="disk"):
                return True
    return False


def test_files_damaged_and_then_lost_while_the_server_runs(filled: Filled, tmp_path: Path) -> None:
    cache, rng = tmp_path / "cache", random.Random(40)
    shutil.copytree(filled.cache, cache)
    with serving(tmp_path, *filled.flags, "--cache-dir", str(cache)) as server:
        for path in files_of(cache):
            damage(path, rng)
        eventually(lambda: finds_damage(server, filled.expected))
        assert reused(server, "disk") == 0
        eventually(lambda: right(server, filled.expected) and reused(server, "disk"))  # what was written anew
        settle(server)
        cache.rename(tmp_path / "lost")  # unlike a removal, at once, whatever the server still writes
        assert right(server, filled.expected)  # whether loads find files missing, or the folder is known to be gone
        eventually(lambda: not server.metric("emberkv_tier_blocks", tier="disk"))
        assert right(server, filled.expected)
        settle(server)
    assert server.exit_code() == 0
    assert not (cache / "blocks").exists()


def test_what_is_told_of_a_request(filled: Filled) -> None:
    """One line and none of its words; and asking why it missed counts as no traffic of the tiers."""
    server, asked = filled.server, {"messages": [{"role": "user", "content": "zebra " * 40}], "max_tokens": 3}
    logged_before = len(logged_answers(server))
    httpx.post(f"{server.url}/v1/chat/completions", json={"model": "tiny", **asked}, timeout=DEADLINE)
    settle(server)
    before = tier_tokens(server)
    explained = httpx.post(
        f"{server.url}/v1/cache/explain", json={"openai": {"model": "tiny", **asked}}, timeout=DEADLINE
    )
    assert explained.status_code == 200, explained.text
    assert tier_tokens(server) == before
    assert len(logged_answers(server)) == logged_before + 1
    assert "zebra" not in server.log.read_text()


def logged_answers(server: Server) -> list[str]:
    return [line for line in server.log.read_text().splitlines() if " prompt, " in line]


def tier_tokens(server: Server) -> dict[tuple[str, str], float]:
    """What each tier was looked into for, found or not."""
    return {
        (name, tier): server.metric(f"emberkv_tier_{name}_tokens_total", tier=tier)
        for name in ("hit", "miss")
        for tier in ("pool", "disk")
    }
