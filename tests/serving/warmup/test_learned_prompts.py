"""What one run learns the next restores: from a file that is whole, private, and this model's."""

import json
import stat
from pathlib import Path

import pytest

from emberkv.core.analytics.popularity import PopularPrefix
from emberkv.core.hashing import TokenChain
from emberkv.errors import ConfigError, PrefixFileError
from emberkv.serving.warmup.learned_prompts import (
    MAX_FILE_BYTES,
    LearnedPrompts,
    prefix_file,
    read_prefixes,
    write_prefixes,
)
from emberkv.serving.warmup.warm_prompt import WarmPrompt
from emberkv.tiers.base import RemovalResult

BLOCK = 2
NAMESPACE = b"n" * 32
PREFIXES = [
    PopularPrefix(None, b"i" * 32, b"\1\0\0\0\2\0\0\0", "", 3.5),
    PopularPrefix(0, b"j" * 32, b"\xff\0\0\0\0\0\0\1", "a tenant, Ünïcödé", 1.25),
]
DAY = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Salts:
    """How this server names its tenants' blocks."""

    def __init__(self, **salts: bytes) -> None:
        self.salts = {"": b"", **salts}

    def __call__(self, prompt: WarmPrompt) -> TokenChain:
        if prompt.tenant not in self.salts:
            raise ConfigError(f"tenant {prompt.tenant!r} is unknown")
        return TokenChain(NAMESPACE, prompt.tokens, BLOCK, owner=prompt.tenant, salt=self.salts[prompt.tenant])


def learned(folder: Path, chain: Salts | None = None, clock: Clock | None = None, **arguments: float) -> LearnedPrompts:
    return LearnedPrompts(folder, NAMESPACE, chain or Salts(), clock=clock or Clock(), **arguments)  # type: ignore[arg-type]  # settings by name


def test_the_file_holds_what_was_written(tmp_path: Path) -> None:
    path = prefix_file(tmp_path / "cache", NAMESPACE)
    assert path == tmp_path / "cache" / f"prefixes.{(b'n' * 8).hex()}.json"
    assert read_prefixes(path, namespace=NAMESPACE) == ([], 0.0)
    write_prefixes(path, PREFIXES, namespace=NAMESPACE, saved_at=12.5)
    assert read_prefixes(path, namespace=NAMESPACE) == (PREFIXES, 12.5)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    write_prefixes(path, PREFIXES[:1], namespace=NAMESPACE, saved_at=13.0)
    assert read_prefixes(path, namespace=NAMESPACE) == (PREFIXES[:1], 13.0)
    assert list(path.parent.iterdir()) == [path]


def test_every_flipped_byte_and_every_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    write_prefixes(path, PREFIXES, namespace=NAMESPACE, saved_at=12.5)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(PrefixFileError):
            read_prefixes(path, namespace=NAMESPACE)
        path.write_bytes(whole[:at])
        with pytest.raises(PrefixFileError):
            read_prefixes(path, namespace=NAMESPACE)


def test_another_models_file(tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    write_prefixes(path, PREFIXES, namespace=b"m" * 32, saved_at=12.5)
    with pytest.raises(PrefixFileError, match="is another model's"):
        read_prefixes(path, namespace=NAMESPACE)


def test_another_version(tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    write_prefixes(path, PREFIXES, namespace=NAMESPACE, saved_at=12.5)
    head, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps({**json.loads(head), "version": 2}).encode() + b"\n" + rest)
    with pytest.raises(PrefixFileError, match="is no list of prefixes of version 1"):
        read_prefixes(path, namespace=NAMESPACE)


def test_a_sound_file_whose_prefixes_extend_none(tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    write_prefixes(path, PREFIXES[1:], namespace=NAMESPACE, saved_at=12.5)
    with pytest.raises(PrefixFileError, match="is no list"):
        read_prefixes(path, namespace=NAMESPACE)


def test_a_file_that_is_too_large_or_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    path.write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    with pytest.raises(PrefixFileError, match="more than 67,108,864 bytes"):
        read_prefixes(path, namespace=NAMESPACE)
    with pytest.raises(PrefixFileError, match="is not a regular file"):
        read_prefixes(tmp_path, namespace=NAMESPACE)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    path.mkdir()  # which nothing can replace
    with pytest.raises(OSError, match="directory"):
        write_prefixes(path, PREFIXES, namespace=NAMESPACE, saved_at=12.5)
    assert list(tmp_path.iterdir()) == [path]


def test_the_next_run_restores_the_best_first(tmp_path: Path) -> None:
    salts = Salts(a=b"a", b=b"b")
    first = learned(tmp_path, salts)
    first.used(salts(WarmPrompt((1, 1, 2, 2, 3), "a")), 4)
    for _ in range(2):
        first.used(salts(WarmPrompt((5, 5, 6, 6), "b")), 4)
    first.used(salts(WarmPrompt((9, 9))), 0)
    first.save()
    assert learned(tmp_path, salts).restore() == [WarmPrompt((5, 5, 6, 6), "b"), WarmPrompt((1, 1, 2, 2), "a")]


def test_no_text_and_nothing_but_what_was_reused_is_written(tmp_path: Path) -> None:
    run = learned(tmp_path)
    run.used(Salts()(WarmPrompt((77, 78, 79, 80))), 2)
    run.save()
    (prefix,), _ = read_prefixes(prefix_file(tmp_path, NAMESPACE), namespace=NAMESPACE)
    assert (prefix.tokens, prefix.owner, prefix.score) == (b"\x4d\0\0\0\x4e\0\0\0", "", 1.0)


def test_a_tenant_that_has_gone_or_has_another_salt_is_left_out(tmp_path: Path) -> None:
    salts = Salts(a=b"a", b=b"b", c=b"c")
    first = learned(tmp_path, salts)
    for tenant in "abc":
        first.used(salts(WarmPrompt((1, 1, 2, 2), tenant)), 4)
    first.save()
    assert learned(tmp_path, Salts(b=b"new", c=b"c")).restore() == [WarmPrompt((1, 1, 2, 2), "c")]


def test_scores_go_on_over_restarts(tmp_path: Path) -> None:
    clock, salts = Clock(), Salts()
    old, new = salts(WarmPrompt((1, 1))), salts(WarmPrompt((2, 2)))
    first = learned(tmp_path, salts, clock)
    for _ in range(4):
        first.used(old, 2)
    first.save()
    clock.now += DAY
    second = learned(tmp_path, salts, clock)
    second.restore()
    for _ in range(3):
        second.used(new, 2)
    second.save()
    prefixes, saved_at = read_prefixes(prefix_file(tmp_path, NAMESPACE), namespace=NAMESPACE)
    assert saved_at == clock.now
    assert [(prefix.block_hash, prefix.score) for prefix in prefixes] == [
        (new.block_hashes[-1], 3.0),
        (old.block_hashes[-1], 2.0),
    ]


def test_it_saves_when_it_is_time_to_and_something_is_new(tmp_path: Path) -> None:
    clock = Clock()
    run = learned(tmp_path, clock=clock, save_seconds=60.0)
    path = prefix_file(tmp_path, NAMESPACE)
    assert run.save_when_due() == 60.0
    clock.now += 60
    assert run.save_when_due() == 60.0
    assert not path.exists()
    run.used(Salts()(WarmPrompt((1, 1))), 2)
    clock.now += 20
    assert run.save_when_due() == 40.0
    assert not path.exists()
    clock.now += 40
    assert run.save_when_due() == 60.0
    assert read_prefixes(path, namespace=NAMESPACE)[1] == clock.now


def test_a_damaged_file_is_passed_over_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = prefix_file(tmp_path, NAMESPACE)
    path.write_bytes(b"no prefixes")
    run = learned(tmp_path)
    assert run.restore() == []
    assert "learned prompts are not restored" in caplog.text
    run.used(Salts()(WarmPrompt((1, 1))), 2)
    run.save()
    assert learned(tmp_path).restore() == [WarmPrompt((1, 1))]


def test_a_folder_that_cannot_be_written_is_told_and_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    run = learned(tmp_path / "file" / "below")
    run.used(Salts()(WarmPrompt((1, 1))), 2)
    run.save()
    assert "learned prompts are not saved" in caplog.text


def learned_two(folder: Path) -> tuple[LearnedPrompts, TokenChain, TokenChain]:
    run = learned(folder)
    first, second = (Salts()(WarmPrompt(tokens)) for tokens in ((1, 1, 2, 2, 3, 3), (1, 1, 4, 4)))
    run.used(first, 6)
    run.used(second, 4)
    run.save()
    return run, first, second


@pytest.mark.parametrize("restarted", [False, True])
def test_what_is_removed_is_forgotten_here_and_in_the_file(tmp_path: Path, restarted: bool) -> None:
    run, first, _ = learned_two(tmp_path)
    if restarted:
        run = learned(tmp_path)
    assert run.forget([first.block_hashes[1]]) == RemovalResult(1)
    expected = [WarmPrompt((1, 1)), WarmPrompt((1, 1, 4, 4))]
    assert sorted(learned(tmp_path).restore(), key=lambda each: each.tokens) == expected
    assert WarmPrompt((1, 1, 2, 2, 3, 3)) not in run.restore()


@pytest.mark.parametrize("restarted", [False, True])
def test_when_all_is_cleared_there_is_no_file(tmp_path: Path, restarted: bool) -> None:
    run, _, _ = learned_two(tmp_path)
    if restarted:
        run = learned(tmp_path)
    assert run.forget(None) == RemovalResult(3)
    assert list(tmp_path.iterdir()) == []
    assert run.restore() == learned(tmp_path).restore() == []


def test_where_the_file_cannot_be_changed_the_reason_is_given(tmp_path: Path) -> None:
    run, _, _ = learned_two(tmp_path)
    path = prefix_file(tmp_path, NAMESPACE)
    path.unlink()
    path.mkdir()
    (path / "in the way").touch()
    assert run.forget(None) == RemovalResult(0, 3, "Is a directory")
