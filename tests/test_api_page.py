"""docs/api.md is what the docstrings say."""

from scripts.api_page import PAGE, page


def test_the_page_is_generated_from_the_docstrings_of_today() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m scripts.api_page"
