"""Memory that was freed goes back to the system."""

import ctypes
import os
import subprocess
import sys

import pytest

from emberkv.heap import _SETTINGS

# A thread's arena: a piece that is mapped alone raises glibc's thresholds when it is freed, and smaller ones at the
# arena's end then stay.
PROGRAM = """
import os, threading
from emberkv.heap import freed_memory_returned

MIB = 1 << 20

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // MIB

def allocate_and_free():
    bytearray(31 * MIB)
    pieces = [bytearray(b"1") * (MIB // 2) for _ in range(100)]
    print(resident() - before)

with freed_memory_returned():
    before = resident()
    thread = threading.Thread(target=allocate_and_free)
    thread.start()
    thread.join()
print(resident() - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator is asked"
)
def test_a_thread_keeps_nothing_of_what_it_freed() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in _SETTINGS}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    held, kept = map(int, ran.stdout.split())
    assert held >= 50
    assert kept < 10
