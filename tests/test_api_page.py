"""docs/api.md is what the docstrings say."""

import pytest
from scripts.api_page import PAGE, page

from tests.machine import COMPILED


@pytest.mark.skipif(COMPILED, reason="mypyc leaves the docstrings out of what it compiles")
def test_the_page_is_generated_from_the_docstrings_of_today() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m scripts.api_page"
