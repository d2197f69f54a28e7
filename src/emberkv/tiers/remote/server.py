"""The connection to a Redis or Valkey server: one script for all changes, and a breaker for a server that fails."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha1
from importlib import resources
from typing import TYPE_CHECKING, Any

from emberkv.errors import ConfigError, RemoteTierError
from emberkv.tiers.breaker import CircuitBreaker
from emberkv.tiers.stats import ErrorCounts

if TYPE_CHECKING:
    import redis

logger = logging.getLogger(__name__)

PREFIX = b"emberkv:1:"
"""What all keys of emberkv begin with; the number is the version of their form."""

CONNECT_SECONDS = 1.0
ANSWER_SECONDS = 2.0
"""How long a connection may take, and how long the server may send nothing, or take nothing, within a call."""

_SCANNED_AT_ONCE = 1000

_READ_BYTES = 2**20
"""Taken from the socket at once; records are large."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """url: ``redis://[USER@]HOST[:PORT][/DATABASE]``, ``rediss://`` for TLS or ``unix://PATH``, without a password."""

    url: str
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, slots=True)
class Contents:
    """What the server has of all namespaces, as of ``clock``, its own time (see ``blocks.lua``). own_entries: of the
    caller's namespace.
    """

    clock: int = 0
    entries: int = 0
    own_entries: int = 0
    bytes: int = 0
    bytes_by_owner: dict[str, int] = field(default_factory=dict)


class BlockServer:
    """Calls of the script ``blocks.lua`` for one namespace. Thread-safe.

    space: 16 bytes, the namespace's digest. clock: seconds, for the breaker. Failures are counted in ``errors`` and
    open the breaker. Raises ConfigError where the package ``redis`` is not installed, or the address is none.
    """

    def __init__(
        self,
        address: ServerAddress,
        space: bytes,
        errors: ErrorCounts,
        *,
        prefix: bytes = PREFIX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            import redis  # noqa: PLC0415 - an optional dependency
        except ImportError as error:
            raise ConfigError(
                "--remote-tier needs the package redis; run pip install '.[remote]' in emberkv's folder"
            ) from error
        self._redis = redis
        self._client: Any = _client(address)
        self._space = space
        self._errors = errors
        self._prefix = prefix
        self._script = script()
        self._digest = sha1(self._script, usedforsecurity=False).hexdigest()
        self.breaker = CircuitBreaker(first_pause=FIRST_PAUSE, longest_pause=LONGEST_PAUSE, clock=clock)
        self.contents = Contents()

    def call(self, operation: str, *arguments: object) -> Any:
        """The result of one of the script's operations. Raises RemoteTierError, see `RemoteTierError.kind`."""
        return self._guarded(lambda: self._taken_in(self._run(self._command(operation, arguments))[0]))

    def use(self, ttl_ms: int, block_hashes: Sequence[bytes]) -> tuple[list[bytes], list[bytes | None]]:
        """What the index says of these blocks, which become the most recent, and their records, in one round trip."""
        records = ("MGET", *(self._prefix + b"b:" + self._space + each for each in block_hashes))

        def read() -> tuple[list[bytes], list[bytes | None]]:
            reply, found = self._run(self._command("use", (ttl_ms, *block_hashes)), records)
            return self._taken_in(reply), found

        result: tuple[list[bytes], list[bytes | None]] = self._guarded(read)
        return result

    def described(self, block_hashes: Sequence[bytes]) -> list[bytes | None]:
        """What the index says of these blocks, without making them recent."""
        command = ("HMGET", self._prefix + b"meta:" + self._space, *block_hashes)
        found: list[bytes | None] = self._guarded(lambda: self._run(command)[0])
        return found

    def scan(self, cursor: int) -> tuple[list[bytes], int]:
        """Some of the full blocks of the index, and the cursor of the next ones; both begin and end with 0."""
        command = ("HSCAN", self._prefix + b"meta:" + self._space, cursor, "COUNT", _SCANNED_AT_ONCE)

        def read() -> tuple[list[bytes], int]:
            following, found = self._run(command)[0]
            hashes = list(found)
            partial = self._run(("HMGET", self._prefix + b"partial:" + self._space, *hashes))[0] if hashes else ()
            full = [each for each, place in zip(hashes, partial, strict=True) if place is None]
            return full, int(following)

        result: tuple[list[bytes], int] = self._guarded(read)
        return result

    def close(self) -> None:
        self._client.close()

    def _command(self, operation: str, arguments: Sequence[object]) -> tuple[object, ...]:
        return ("EVALSHA", self._digest, 0, operation, self._prefix, self._space, *arguments)

    def _run(self, *commands: tuple[object, ...]) -> list[Any]:
        """The replies, in one round trip; a second one where the server does not know the script yet."""
        for attempt in (1, 2):
            pipeline = self._client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            try:
                replies: list[Any] = pipeline.execute()
                return replies
            except self._redis.exceptions.NoScriptError:
                if attempt == 2:
                    raise
                self._client.script_load(self._script.decode())
        raise AssertionError

    def _taken_in(self, reply: list[Any]) -> Any:
        result, clock, entries, size, owners, own_entries = reply
        contents = Contents(
            int(clock),
            entries,
            own_entries,
            size,
            {owner.decode(): int(count) for owner, count in zip(owners[::2], owners[1::2], strict=True)},
        )
        if contents.clock >= self.contents.clock:  # replies to several threads may come in any order
            self.contents = contents
        return result

    def _guarded(self, call: Callable[[], Any]) -> Any:
        errors = self._redis.exceptions
        try:
            result = call()
        except errors.OutOfMemoryError as error:
            self.breaker.succeeded()
            raise self._counted("server out of memory", error) from error
        except errors.TimeoutError as error:
            raise self._failed("no answer in time", error) from error
        except (errors.AuthenticationError, errors.NoPermissionError) as error:
            raise self._failed("access refused", error) from error
        except (errors.ConnectionError, OSError) as error:
            raise self._failed("no connection", error) from error
        except (errors.RedisError, ValueError, TypeError, UnicodeDecodeError) as error:
            raise self._failed("unusable answer", error) from error
        except BaseException:  # a probe that ends so must not leave the breaker half-open
            self.breaker.failed()
            raise
        self.breaker.succeeded()
        return result

    def _failed(self, kind: str, error: Exception) -> RemoteTierError:
        self.breaker.failed()
        return self._counted(kind, error)

    def _counted(self, kind: str, error: Exception) -> RemoteTierError:
        """Only the error's type is logged: a server's message may repeat what it was sent."""
        self._errors.count(kind, type(error).__name__)
        return RemoteTierError(f"the server of the remote tier: {kind}", kind=kind)


def script() -> bytes:
    """``blocks.lua``."""
    return resources.files(__package__).joinpath("blocks.lua").read_bytes()


def _client(address: ServerAddress) -> "redis.Redis":
    """A client that does not try a call again: the breaker and its probes decide when a server is called."""
    import redis  # noqa: PLC0415 - an optional dependency
    from redis.backoff import NoBackoff  # noqa: PLC0415 - the same
    from redis.retry import Retry  # noqa: PLC0415 - the same

    try:
        return redis.Redis.from_url(
            address.url,
            password=address.password,
            socket_connect_timeout=CONNECT_SECONDS,
            socket_timeout=ANSWER_SECONDS,
            socket_read_size=_READ_BYTES,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
    except ValueError as error:
        raise ConfigError(f"--remote-tier is no address of a server: use redis://HOST:PORT ({error})") from error
