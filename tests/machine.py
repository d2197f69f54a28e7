"""What tests need of this machine: compiled kernels and hashes of weight files kept from run to run, free ports, and
whether emberkv's hot modules are compiled.
"""

import random
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest

MACHINE_CACHE = Path(__file__).parents[1] / "build" / "machine"

_scheduler = find_spec("emberkv.core.scheduler")
COMPILED = _scheduler is not None and not str(_scheduler.origin).endswith(".py")
"""Whether emberkv's hot modules are compiled (scripts/compile.py)."""

subclasses_core = pytest.mark.skipif(COMPILED, reason="Python code cannot subclass a compiled class")

_random = random.SystemRandom()  # test processes with equal seeds would choose the same ports


def free_ports(count: int = 1) -> int:
    """The first of so many neighbouring ports that are free now, for servers that start later.

    All are below the range from which the kernel gives ports to outgoing connections and to ``bind`` with port 0
    (32768 and above on Linux): otherwise another test's connection could take one before its server starts.
    """
    while True:
        first = _random.randrange(10_000, 32_000)
        if all(map(_is_free, range(first, first + count))):
            return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
