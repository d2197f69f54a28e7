"""The exception tree. A message says what was given and what would be accepted.

EmberError
├── ConfigError
├── ModelError: ModelNotFoundError, CorruptModelError, UnsupportedModelError
├── KernelsError
├── RequestError: PromptTooLongError
├── DuplicateRequestError, SamplingError, EngineStoppedError, NoFreeBlocksError
├── EntryError, EntryTypeError, TensorError
├── BlockError: CorruptBlockError, ForeignBlockError
├── CacheFolderError, RemoteTierError, UntrustedPathError, PrefixFileError, WorkloadError
├── ClusterError: WireError, WorkerUnreachableError, WorkerTimeoutError, WorkerLostError
└── IntegrityError
"""


class EmberError(Exception):
    """Root of every error that emberkv raises on purpose."""


class ConfigError(EmberError, ValueError):
    """A setting is unknown or has a value that cannot be used."""


class ModelError(EmberError):
    """A model cannot be loaded."""


class ModelNotFoundError(ModelError):
    """The path or hub id given is not a model."""


class CorruptModelError(ModelError):
    """A model's files are there but cannot be read as what they claim to be."""


class UnsupportedModelError(ModelError):
    """The architecture keeps state that is not per-token KV; serving it would be wrong."""


class KernelsError(EmberError):
    """The C++ kernels cannot be compiled or loaded on this machine."""


class RequestError(EmberError):
    """A request cannot be served as it stands; the caller can correct it.

    ``param`` names the request field at fault, where one is.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownLayerError(RequestError):
    """The model has no layer of that number."""


class PromptTooLongError(RequestError):
    """The prompt, or the prompt and its answer, exceeds the model's context or the pool.

    prompt_tokens: what the prompt has, at least. wanted: the tokens asked for as its answer, where the prompt alone
    would fit. limit: the most tokens that are accepted, of the prompt or of both. None where they are not known.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        prompt_tokens: int | None = None,
        wanted: int | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(message, param=param)
        self.prompt_tokens = prompt_tokens
        self.wanted = wanted
        self.limit = limit


class DuplicateRequestError(RequestError):
    """A request id is already in flight."""


class SamplingError(EmberError):
    """A request's parameters leave no distribution to draw its next token from."""


class EngineStoppedError(EmberError):
    """The engine has stopped, or stops before this request could finish."""


class NoFreeBlocksError(EmberError):
    """The pool holds fewer allocatable blocks than were requested."""


class EntryError(EmberError, ValueError):
    """A cache entry's key, value or size cannot be stored."""


class EntryTypeError(EmberError, TypeError):
    """A cache entry's key or value is of a type that cannot be stored."""


class TensorError(EmberError, ValueError):
    """A value is no tensor of the kind that is read or written as JSON."""


class BlockError(EmberError):
    """Bytes from a tier are not the block that they should be. ``fault``: what is wrong with them, in a word."""

    def __init__(self, message: str, *, fault: str) -> None:
        super().__init__(message)
        self.fault = fault


class CorruptBlockError(BlockError):
    """The bytes are damaged, or never were a block."""


class ForeignBlockError(BlockError):
    """A sound block, but of another version, another namespace or another position than the one looked up."""


class CacheFolderError(EmberError):
    """A folder cannot be used as a cache of blocks."""


class RemoteTierError(EmberError):
    """A server of blocks does not do what it was asked. ``kind``: why, in some words."""

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class UntrustedPathError(EmberError):
    """A file or folder belongs to another user, or can be written by all, and so cannot be relied on."""


class PrefixFileError(EmberError):
    """A file of learned prefixes cannot be read as what it claims to be."""


class EventWireError(EmberError):
    """Bytes are not a message of a cache's event feed."""


class PlacementError(EmberError):
    """A cluster cannot be started, found or changed as asked."""


class WorkloadError(EmberError):
    """A trace or a workload description cannot be read as what it claims to be."""


class ClusterError(EmberError):
    """Something between the processes of a cluster went wrong."""


class WireError(ClusterError):
    """Bytes from another process are not the message that was expected."""


class WorkerUnreachableError(ClusterError):
    """No connection to a worker could be made, so that it has got nothing."""


class WorkerTimeoutError(ClusterError):
    """A worker sent nothing within the deadline."""


class WorkerLostError(ClusterError):
    """The connection to a worker ended before its answer did."""


class IntegrityError(EmberError):
    """An invariant of the block pool does not hold: a bug, never a user's mistake."""


_LONGEST_REASON = 300


def reason_of(error: BaseException) -> str:
    """Another library's error on one line and of bounded length, to be part of a message.

    A text of one word, which says nothing alone (a KeyError's, for instance), is preceded by the error's type.
    """
    text = " ".join(str(error).split())
    if " " not in text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"
