"""The master of a Mooncake store of the tests' own, which a test may freeze or kill."""

import signal
import subprocess
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from emberkv.tiers.remote.server import ServerAddress
from tests.machine import free_ports
from tests.waiting import DEADLINE

FOUND = find_spec("mooncake")

needs_mooncake = pytest.mark.skipif(
    FOUND is None or find_library("ibverbs") is None, reason="mooncake-transfer-engine or libibverbs1 is not installed"
)


class MooncakeMaster:
    """The process that shares out the memory of its clients. It has nothing to keep."""

    def __init__(self) -> None:
        self.port = free_ports(2)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> ServerAddress:
        return ServerAddress(f"mooncake://127.0.0.1:{self.port}")

    def start(self) -> None:
        assert FOUND is not None
        assert FOUND.submodule_search_locations is not None
        program = Path(FOUND.submodule_search_locations[0]) / "mooncake_master"
        options = [f"--rpc_port={self.port}", "--rpc_address=127.0.0.1", f"--metrics_port={self.port + 1}"]
        command = [str(program), *options, "--enable_metric_reporting=false", "--metrics_host=127.0.0.1"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(DEADLINE)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
