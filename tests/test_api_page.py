"""docs/api.md is what the docstrings say, and the examples in them do what they say."""

import doctest

import pytest
from scripts.api_page import PAGE, page, public_objects

EXAMPLES = doctest.DocTestFinder(recurse=False)


def test_the_page_is_generated_from_the_docstrings_of_today() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m scripts.api_page"


@pytest.mark.parametrize("name", [name for name, found in public_objects() if ">>>" in (found.__doc__ or "")])
def test_an_example_gives_what_it_shows(name: str) -> None:
    found = dict(public_objects())[name]
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    (example,) = EXAMPLES.find(found, name)
    report: list[str] = []
    assert runner.run(example, out=report.append) == doctest.TestResults(0, len(example.examples)), "".join(report)
