"""The walk through the code names only what exists."""

import re
from importlib import import_module
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "follow-a-request.md"
SYMBOLS = sorted(set(re.findall(r"`(emberkv(?:\.\w+)+)`", PAGE.read_text(encoding="utf-8"))))


def test_the_walk_has_steps() -> None:
    assert len(SYMBOLS) > 25


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_each_symbol_exists(symbol: str) -> None:
    parts = symbol.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return
    raise AssertionError(f"{symbol} names no module")
