"""The examples in docstrings, and the one of the core alone, do what they show."""

import doctest
import runpy
from importlib import import_module
from pathlib import Path

import pytest

import emberkv

SOURCE = Path(emberkv.__file__).parent
MODULES = sorted(
    ".".join(("emberkv", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    results = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.attempted
    assert not results.failed


def test_the_core_alone_in_forty_lines(capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[1] / "examples" / "prefix_cache.py"
    runpy.run_path(str(example))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=3)[:3] for line in lines] == [
        ["0", "of", "1001"], ["1000", "of", "1002"], ["1000", "of", "1100"]
    ]  # fmt: skip
    assert len(example.read_text().splitlines()) <= 40
