"""The examples in docstrings, and the one of the core alone, do what they show."""

import ast
import doctest
import runpy
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import emberkv

SOURCE = Path(emberkv.__file__).parent
MODULES = {
    ".".join(("emberkv", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
}
"""Those with examples, by name, with their sources."""


def docstrings(source: str) -> Iterator[tuple[str, int]]:
    """Each with its line. They are read from the source, because compiled modules have none."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield text, node.body[0].lineno - 1


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    file, names = MODULES[name], dict[str, Any](vars(import_module(name)))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for text, line in docstrings(file.read_text(encoding="utf-8")):
        runner.run(doctest.DocTestParser().get_doctest(text, names.copy(), name, str(file), line))
    results = runner.summarize()
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
