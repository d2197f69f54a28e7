"""A connection to a Mooncake store, with a deadline for each call and a circuit breaker."""

import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

from emberkv.errors import ConfigError, RemoteTierError
from emberkv.tiers.breaker import CircuitBreaker
from emberkv.tiers.remote.server import FIRST_PAUSE, LONGEST_PAUSE, ServerAddress
from emberkv.tiers.stats import ErrorCounts

T = TypeVar("T")

SETUP_SECONDS = 10.0
"""How long the first connection may take before the server starts without it."""

_SETTINGS = {"MC_LOG_LEVEL": "ERROR", "MC_STORE_CLIENT_SETUP_RETRIES": "1"}
"""Of Mooncake's client, which takes them from the environment alone, when it is imported."""

_OK, _EXISTS, _NO_ROOM, _NOT_FOUND = 0, 1, -200, -704


class MooncakeClient:
    """One connection to the store, with a deadline for each call and a breaker. Thread-safe.

    A call that takes too long goes on in a thread of its own, and its result is dropped. address: of the master.
    given_bytes: of this process's memory, which become part of the store. buffer_bytes: see `BUFFER_BYTES`.
    answer_seconds: the deadline of a call; Mooncake's own is that of the process's first connection. clock: seconds,
    for the breaker. Raises ConfigError where the package, or a library that it needs, is not installed.
    """

    def __init__(
        self,
        address: ServerAddress,
        given_bytes: int,
        errors: ErrorCounts,
        *,
        buffer_bytes: int,
        answer_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        for name, value in {**_SETTINGS, "MC_RPC_TIMEOUT_MS": f"{answer_seconds * 1000:.0f}"}.items():
            os.environ.setdefault(name, value)
        try:
            from mooncake.store import MooncakeDistributedStore  # noqa: PLC0415 - an optional dependency
        except ModuleNotFoundError as error:
            raise ConfigError(
                "--remote-tier mooncake:// needs the package mooncake-transfer-engine (or -non-cuda, on machines "
                f"without CUDA); install it by pip ({error})"
            ) from error
        except ImportError as error:
            raise ConfigError(
                "--remote-tier mooncake:// needs a library of the system that Mooncake's package does not bring, such "
                f"as Debian's libibverbs1 ({error})"
            ) from error
        self._new_store: Callable[[], Any] = MooncakeDistributedStore
        self._place = urlsplit(address.url).netloc
        self._given_bytes = given_bytes
        self._buffer_bytes = buffer_bytes
        self._errors = errors
        self._answer_seconds = answer_seconds
        self._store: Any = None
        self._connecting: Future[Any] | None = None
        self.breaker = CircuitBreaker(first_pause=FIRST_PAUSE, longest_pause=LONGEST_PAUSE, clock=clock)

    def connect(self, seconds: float | None = None) -> None:
        """Connect where that is not done yet, within the deadline of a call unless ``seconds`` are given. Raises
        RemoteTierError; the attempt may still succeed later.
        """
        if self._store is None:
            if self._connecting is None or self._connecting.done():
                self._connecting = _in_thread(self._connected)
            self._guarded(partial(self._connecting.result, self._answer_seconds if seconds is None else seconds))

    def _connected(self) -> None:
        store = self._new_store()
        own = _own_address(self._place)
        code = store.setup(own, "P2PHANDSHAKE", self._given_bytes, self._buffer_bytes, "tcp", "", self._place)
        if code != _OK:
            raise ConnectionError(f"setup gives {code}")
        self._store = store

    def exist(self, keys: Sequence[str]) -> list[bool]:
        """Whether there is a value for each key. Raises RemoteTierError."""
        if not keys:
            return []

        def ask() -> list[bool]:
            codes = self._call("batch_is_exist", list(keys))
            if min(codes) < 0:
                raise ConnectionError(f"the master gives {min(codes)}")
            return [code == _EXISTS for code in codes]

        return self._guarded(ask)

    def get(self, keys: Sequence[str]) -> list[bytes]:
        """The values; b"" for those that cannot be read. Raises RemoteTierError."""
        return self._guarded(lambda: list(self._call("get_batch", list(keys)))) if keys else []

    def put(self, values: dict[str, bytes]) -> bool:
        """Store the values whose keys have none yet. False if the store is out of memory. Raises RemoteTierError."""

        def ask() -> bool:
            code = self._call("put_batch", list(values), list(values.values()))
            if code not in (_OK, _NO_ROOM):
                raise ConnectionError(f"the store gives {code}")
            return bool(code == _OK)

        return self._guarded(ask)

    def remove(self, keys: Sequence[str]) -> list[bool]:
        """Whether each key had a value, which is gone now. Raises RemoteTierError."""

        def ask() -> list[bool]:
            codes = self._call("batch_remove", list(keys), True)
            if faults := set(codes) - {_OK, _NOT_FOUND}:
                raise ConnectionError(f"the master gives {min(faults)}")
            return [code == _OK for code in codes]

        return self._guarded(ask)

    def remove_like(self, pattern: str) -> int:
        """How many values there were whose keys match a regular expression, which are gone. Raises RemoteTierError."""

        def ask() -> int:
            count = int(self._call("remove_by_regex", pattern, True))
            if count < 0:
                raise ConnectionError(f"the master gives {count}")
            return count

        return self._guarded(ask)

    def close(self) -> None:
        """What this process has given to the store is gone from it."""
        store, self._store = self._store, None
        if store is not None and self.breaker.is_closed:  # else a call may still be on its way
            with suppress(TimeoutError):
                _in_thread(store.close).exception(SETUP_SECONDS)

    def _call(self, method: str, *arguments: object) -> Any:
        if self._store is None:
            raise ConnectionError("not connected")
        return _in_thread(partial(getattr(self._store, method), *arguments)).result(self._answer_seconds)

    def _guarded(self, call: Callable[[], T]) -> T:
        try:
            result = call()
        except TimeoutError as error:
            raise self._failed("no answer in time", error) from error
        except OSError as error:
            raise self._failed("no connection", error) from error
        except Exception as error:
            raise self._failed("unusable answer", error) from error
        self.breaker.succeeded()
        return result

    def _failed(self, kind: str, error: Exception) -> RemoteTierError:
        self.breaker.failed()
        self._errors.count(kind, type(error).__name__)
        return RemoteTierError(f"the Mooncake store of the remote tier: {kind}", kind=kind)


def _in_thread(call: Callable[[], T]) -> "Future[T]":
    """The call's result, by a thread that does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            future.set_exception(error)

    Thread(target=run, name="mooncake call", daemon=True).start()
    return future


def _own_address(place: str) -> str:
    """This machine's address on the way to ``HOST:PORT``. Raises OSError where there is none."""
    host, _, port = place.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # which sends nothing
        return str(probe.getsockname()[0])
