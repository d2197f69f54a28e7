"""What a writer that was killed leaves in a cache folder: gone at the next start, and nothing else with it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from emberkv.core.hashing import TokenChain
from emberkv.files import LEFTOVER_SECONDS, remove_leftovers, replace_file
from emberkv.serving.cache.other_models import KnownModel, OtherModels
from emberkv.serving.tenancy import server_secret
from emberkv.serving.warmup.learned_prompts import LearnedPrompts
from tests.waiting import DEADLINE

KILLED = """
import os, signal, sys
from pathlib import Path
from emberkv.serving.tenancy import server_secret
from emberkv.serving.warmup.learned_prompts import prefix_file, write_prefixes
from emberkv.serving.cache.other_models import KnownModel, OtherModels

os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
{writes}
"""
NAMESPACE = b"n" * 32


def learned(folder: Path) -> LearnedPrompts:
    return LearnedPrompts(folder, NAMESPACE, lambda prompt: TokenChain(NAMESPACE, prompt.tokens, 2))


def other_models(folder: Path) -> OtherModels:
    return OtherModels(folder, NAMESPACE, KnownModel(name="own", root=NAMESPACE, block_size=2))


def age(path: Path) -> None:
    then = time.time() - LEFTOVER_SECONDS - 60
    os.utime(path, (then, then), follow_symlinks=False)


@pytest.mark.parametrize(
    ("writes", "opens", "kept"),
    [
        ("server_secret(None, folder)", lambda folder: server_secret(None, folder), {"secret"}),
        ("write_prefixes(prefix_file(folder, b'm' * 32), [], namespace=b'm' * 32, saved_at=1.0)", learned, set()),
        ("OtherModels(folder, b'm', KnownModel(name='m', root=b'm', block_size=2))", other_models, {"models.json"}),
    ],
    ids=["secret", "prefixes", "models"],
)
def test_what_a_killed_writer_leaves_is_gone_once_nobody_can_be_writing_it(
    tmp_path: Path, writes: str, opens: Callable[[Path], object], kept: set[str]
) -> None:
    command = [sys.executable, "-c", KILLED.format(writes=writes), str(tmp_path)]
    assert subprocess.run(command, check=False, timeout=DEADLINE).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    opens(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {left.name, *kept}, "another server may be writing it"
    age(left)
    opens(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_only_what_is_named_as_a_draft_is_removed(tmp_path: Path) -> None:
    names = [
        "secret",
        "secret.20251121",
        "secret.old.tmp",
        "secret.12345678.tmp~",
        "my.secret.12345678.tmp",
        "notes.tmp",
    ]
    for name in names:
        (tmp_path / name).write_text(name)
    (tmp_path / "secret.a_folder.tmp").mkdir()
    (tmp_path / "secret.aaaalink.tmp").symlink_to(tmp_path / "secret")
    everything = sorted(tmp_path.iterdir())
    draft = tmp_path / "secret.12345678.tmp"
    draft.touch()
    for path in (*everything, draft):
        age(path)
    assert remove_leftovers(tmp_path, "secret") == 1
    assert sorted(tmp_path.iterdir()) == everything


def test_no_folder_has_no_leftovers(tmp_path: Path) -> None:
    assert remove_leftovers(tmp_path / "none", "secret") == 0


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept"
    replace_file(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, b"new")
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])
