"""A Redis or Valkey server of the tests' own, which a test may stop, freeze, empty or kill."""

import shutil
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
import redis

from emberkv.tiers.remote.server import ServerAddress
from tests.waiting import DEADLINE, eventually

PROGRAM = shutil.which("redis-server") or shutil.which("valkey-server")

needs_server = pytest.mark.skipif(PROGRAM is None, reason="neither redis-server nor valkey-server is installed")


class RedisProcess:
    """Listens on a socket in ``folder`` alone, and keeps nothing on disk. options: of its configuration."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._options = options
        self.socket = folder / "s"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> ServerAddress:
        return ServerAddress(f"unix://{self.socket}")

    def client(self, password: str | None = None) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), password=password)

    def start(self) -> None:
        assert PROGRAM is not None
        command = [PROGRAM, "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir", str(self._folder)]
        self.process = subprocess.Popen([*command, *self._options], stdout=subprocess.DEVNULL)
        eventually(self.answers)

    def answers(self) -> bool:
        try:
            return bool(self.client().ping())
        except redis.AuthenticationError:
            return True
        except redis.ConnectionError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(DEADLINE)
        self.socket.unlink(missing_ok=True)

    def freeze(self) -> None:
        """Keep its connections and answer nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
