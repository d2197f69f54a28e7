"""Failures counted by kind, and few lines about many of them."""

import logging

import pytest

from emberkv.tiers.stats import ErrorCounts


def test_lines_become_rarer_as_failures_go_on(caplog: pytest.LogCaptureFixture) -> None:
    errors = ErrorCounts(logging.getLogger("place"), "the place")
    for _ in range(5):
        errors.count("lost", "the system's words")
    assert errors.counts == {"lost": 5}
    assert caplog.messages == [f"the place: lost (the system's words), {count} so far" for count in (1, 2, 4)]


def test_many_at_once_are_one_line_and_none_where_no_power_of_two_is_passed(caplog: pytest.LogCaptureFixture) -> None:
    errors = ErrorCounts(logging.getLogger("place"), "the place")
    for times in (5, 2, 3):
        errors.count("lost", times=times)
    assert errors.counts == {"lost": 10}
    assert caplog.messages == ["the place: lost, 5 so far", "the place: lost, 10 so far"]
