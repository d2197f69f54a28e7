"""``emberkv cache``: look at a folder of blocks, check every one, empty it."""

import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from emberkv.cli.cache import app
from emberkv.serving.cache.other_models import KnownModel, OtherModels
from tests.tiers.build import NAMESPACE, OTHER, entries, inexact, records
from tests.tiers.disks import files_of, opened, stored

BLOCKS = records(6)
HOUR = 3600
MODEL, OTHER_MODEL = NAMESPACE.hex()[:12], OTHER.hex()[:12]


def invoke(*arguments: str | Path, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments], input=answer, env={"COLUMNS": "160"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three blocks of two owners, of which one is not exact, and two of another model."""
    stored(tmp_path, entries(BLOCKS[:2], owner="Älice [x]") + entries([inexact(BLOCKS[2])]))
    stored(tmp_path, entries(BLOCKS[3:5], namespace=OTHER), namespace=OTHER)
    (tmp_path / "prompts.json").write_text("{}")
    return tmp_path


def set_age(path: Path, seconds: float) -> None:
    used = time.time() - seconds
    os.utime(path, (used, used))


def test_ls_shows_models_and_owners(folder: Path) -> None:
    for path in files_of(folder):
        set_age(path, 3.1 * HOUR)
    set_age(next(path for path in files_of(folder) if MODEL in str(path) and path.parent.name != "@"), 50 * HOUR)
    result = invoke("ls", folder)
    assert result.exit_code == 0
    heading, *rows = [line.split() for line in result.stdout.splitlines()]
    assert heading == ["model", "owner", "blocks", "not", "exact", "size", "last", "used", "least", "recently"]
    assert sorted(rows) == sorted(
        [
            [MODEL, "-", "1", "1", size_of(1), "3", "h", "3", "h"],
            [MODEL, "Älice", "[x]", "2", "0", size_of(2), "3", "h", "2", "d"],
            [OTHER_MODEL, "-", "2", "0", size_of(2), "3", "h", "3", "h"],
        ]
    )


def size_of(count: int) -> str:
    return f"{count * len(entries(BLOCKS[:1])[0].data)}B"


def test_ls_of_nothing(tmp_path: Path) -> None:
    stored(tmp_path, [])
    assert invoke("ls", tmp_path).stdout == "No blocks.\n"


def test_stats_sums_up(folder: Path) -> None:
    for path in files_of(folder):
        set_age(path, 90)
    lines = invoke("stats", folder).stdout.splitlines()
    assert [line.strip().split(maxsplit=1) for line in lines[:4]] == [
        ["Blocks", "5, of which 4 are exact"],
        ["Size", f"{sum(path.stat().st_size for path in files_of(folder)) / 1024:.1f}KiB"],
        ["Models", "2"],
        ["Owners", "2"],
    ]
    assert lines[4].split() == ["Last", "used", "2", "min", "ago"]


def test_verify_finds_all_sound(folder: Path) -> None:
    result = invoke("verify", folder)
    assert result.exit_code == 0
    assert result.stdout.startswith("5 blocks, ")
    assert result.stdout.endswith(": all sound.\n")


def spoil(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-30] + bytes([data[-30] ^ 1]) + data[-29:])


def test_verify_names_bad_blocks_and_removes_none_unasked(folder: Path) -> None:
    first, second, *_ = files_of(folder)
    spoil(first)
    second.write_bytes(b"")
    result = invoke("verify", folder)
    assert result.exit_code == 1
    listed = result.stdout.splitlines()[:2]
    assert set(listed) == {f"checksum: {first.relative_to(folder)}", f"truncated: {second.relative_to(folder)}"}
    assert result.stdout.endswith("2 bad, 0 removed.\n")
    assert len(files_of(folder)) == 5


def test_verify_removes_bad_blocks_when_told_to(folder: Path) -> None:
    bad = files_of(folder)[3]
    spoil(bad)
    result = invoke("verify", folder, "--remove")
    assert result.exit_code == 1
    assert result.stdout.endswith("1 bad, 1 removed.\n")
    assert not bad.exists()
    assert invoke("verify", folder).exit_code == 0


def test_a_block_under_another_s_name_is_bad(folder: Path) -> None:
    first, second = [path for path in files_of(folder) if OTHER_MODEL in str(path)]
    second.write_bytes(first.read_bytes())
    result = invoke("verify", folder)
    assert (result.exit_code, "hash" in result.stdout) == (1, True)


def test_many_bad_blocks_are_counted_by_kind(tmp_path: Path) -> None:
    stored(tmp_path, entries(records(60)))
    for path in files_of(tmp_path):
        path.write_bytes(b"")
    printed = invoke("verify", tmp_path).stdout
    assert printed.count("truncated: ") == 50
    assert "... in all: 60 truncated\n" in printed


def test_clear_asks(folder: Path) -> None:
    refused = invoke("clear", folder, answer="n\n")
    assert "Delete 5 blocks, " in refused.stdout
    assert (refused.exit_code, len(files_of(folder))) == (1, 5)
    assert invoke("clear", folder, answer="y\n").stdout.endswith("5 blocks deleted.\n")
    assert files_of(folder) == []


def test_clear_does_not_ask_when_told_not_to_and_leaves_other_files(folder: Path) -> None:
    result = invoke("clear", folder, "--yes")
    assert (result.exit_code, result.stdout) == (0, "5 blocks deleted.\n")
    assert files_of(folder) == []
    assert (folder / "prompts.json").read_text() == "{}"
    assert opened(folder).read_only is None


def test_clear_deletes_learned_prompts_too(folder: Path) -> None:
    learned = folder / f"prefixes.{'0a' * 8}.json"
    learned.write_text("{}")
    assert invoke("clear", folder, "--yes").stdout == "5 blocks and 1 lists of learned prompts deleted.\n"
    assert not learned.exists()


def test_no_name_in_a_folder_reaches_the_terminal_as_a_control_character(folder: Path) -> None:
    stored(folder, entries(BLOCKS[5:], owner="\x1b]0;pwned\x07"))
    assert "\\x1b]0;pwned\\x07" in invoke("ls", folder).stdout
    assert "\x1b" not in invoke("ls", folder).stdout


def test_verify_says_which_names_it_could_not_read_as_a_block_s(folder: Path) -> None:
    path = files_of(folder)[0]
    odd = path.with_name(path.name.replace(path.name[:64], path.name[:64].upper()))
    path.rename(odd)
    printed = invoke("verify", folder).stdout.splitlines()
    assert printed[0].startswith("4 blocks, ")
    assert printed[1:] == [f"not a block by its name, not read: {odd.relative_to(folder)}"]


def test_ls_shows_a_model_s_name_where_it_is_known(folder: Path) -> None:
    own = KnownModel(name="tiny", root=b"root", block_size=16)
    OtherModels(folder, NAMESPACE, own)
    assert f"tiny {MODEL}" in invoke("ls", folder).stdout


@pytest.mark.parametrize("arguments", [("clear", "--yes"), ("verify", "--remove")])
def test_a_folder_in_use_is_not_changed(folder: Path, arguments: tuple[str, str]) -> None:
    spoil(files_of(folder)[0])
    server = opened(folder)
    result = invoke(arguments[0], folder, arguments[1])
    assert result.exit_code == 2
    assert f"{folder} is in use by a running server" in result.stderr
    assert len(files_of(folder)) == 5
    assert invoke("verify", folder).exit_code == 1
    server.close()


@pytest.mark.parametrize("command", ["ls", "stats", "verify", "clear"])
def test_a_folder_that_is_no_cache_is_refused_and_left_alone(tmp_path: Path, command: str) -> None:
    result = invoke(command, tmp_path)
    assert result.exit_code == 2
    assert "is no cache folder: it holds no folder 'blocks'" in result.stderr
    assert list(tmp_path.iterdir()) == []
    result = invoke(command, tmp_path / "none")
    assert (result.exit_code, result.stderr) == (2, f"error: there is no folder {tmp_path / 'none'}\n")
