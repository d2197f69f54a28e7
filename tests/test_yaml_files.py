"""YAML is read as plain data, and never becomes much larger than its file."""

from pathlib import Path

import pytest

from emberkv.errors import ConfigError, WorkloadError
from emberkv.yaml_files import parse_yaml, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, "with its aliases written out, it is larger than 4 MiB"),
        (
            f"a: &a {{x: 1}}\nb: &b {{<<: [{', '.join(['*a'] * 1500)}]}}\nc: [{', '.join(['*b'] * 1500)}]",
            "is larger than",
        ),
        ("a: &a [*a]", "an alias refers to what it is within"),
        ("x: " + "y" * (4 << 20), "it is larger than 4 MiB"),
        ("{a: 1, a: 2}", "'a' is there twice"),
        ("[" * 10_000, "nested too deeply"),
        ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
    ],
    ids=["aliases", "merges", "recursive", "large", "twice", "deep", "tag"],
)
def test_what_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as raised:
        parse_yaml(text, ConfigError, "file")
    assert len(str(raised.value)) < 400


def test_aliases_that_stay_small_are_read() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]\nc: {<<: &d {x: 1}, y: *d}", ConfigError) == {
        "a": [1, 2],
        "b": [[1, 2], [1, 2]],
        "c": {"x": 1, "y": {"x": 1}},
    }
    assert parse_yaml("", ConfigError) is None


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"missing.yaml cannot be read: No such file"):
        read_yaml(tmp_path / "missing.yaml", ConfigError, WorkloadError)
