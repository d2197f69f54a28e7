"""Commands that run inside the test process."""

import logging
import signal
from collections.abc import Iterator

import pytest

from emberkv.cli.startup import console


@pytest.fixture(autouse=True)
def process_settings() -> Iterator[None]:
    """`emberkv serve` sets up logging, and ignores signals at its end, for a process of its own. Undo that."""
    signals = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    root = logging.getLogger()
    handlers, level, quiet = list(root.handlers), root.level, console.quiet
    yield
    for each, handler in signals.items():
        signal.signal(each, handler)
    root.handlers[:] = handlers
    root.setLevel(level)
    console.quiet = quiet
    logging.captureWarnings(False)
