"""What tests need of this machine: compiled kernels and hashes of weight files kept from run to run, free ports."""

import socket
from pathlib import Path

MACHINE_CACHE = Path(__file__).parents[1] / "build" / "machine"


def free_ports(count: int) -> int:
    """The first of so many neighbouring ports that are free now."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
        if port + count <= 65536 and all(_is_free(port + at) for at in range(count)):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
