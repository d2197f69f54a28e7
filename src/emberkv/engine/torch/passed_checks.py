"""Self-checks that were passed, remembered in a folder of this machine, so that the same start needs none."""

import json
import logging
import platform
from hashlib import sha256
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from emberkv.core.hashing import root_hash
from emberkv.engine.torch.attention.kv_pool import tokens_of_pool
from emberkv.engine.torch.model.loader import LoadedModel
from emberkv.engine.torch.namespace import namespace
from emberkv.engine.torch.native.kernels import Kernels, can_compute
from emberkv.engine.torch.self_check import Findings, tokens_that_count
from emberkv.errors import UntrustedPathError
from emberkv.files import check_owner, read_own_file, replace_file

_log = logging.getLogger(__name__)

FILE_NAME = "self-checks.json"
_MOST = 64
_SAVED = TypeAdapter(dict[str, Findings])


def check_key(
    loaded: LoadedModel,
    kernels: Kernels | None,
    *,
    cache_bytes: int,
    block_size: int,
    prefill_chunk: int,
    machine: str | None = None,
) -> str:
    """All that a self-check's outcome depends on, as hex: call it before the engine replaces any of the model's layers.

    It covers what the namespace of stored blocks covers (weights and block size, types, kernels, libraries, processor,
    threads, source files), the name of the machine, by default this one's, and what else decides which trials are made.
    """
    used = kernels if kernels is not None and can_compute(loaded, block_size) else None
    tokens = tokens_of_pool(loaded.geometry, loaded.dtypes.kv, cache_bytes, block_size)
    others = [
        prefill_chunk,
        min(tokens, tokens_that_count(prefill_chunk, block_size)),
        loaded.context_length,
        machine or platform.node(),
    ]
    found = namespace(loaded, used, root_hash(loaded.fingerprint, block_size), alignment=0, batch_invariant=False)
    return sha256(found.digest() + json.dumps(others).encode()).hexdigest()


class PassedChecks:
    """What self-checks have found, by `check_key`. folder: of this user; it is made where it is missing."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME

    def find(self, key: str) -> Findings | None:
        """None for a check that was not passed, or where the file is missing, damaged, or not to be trusted."""
        return self._read().get(key)

    def keep(self, key: str, findings: Findings) -> None:
        """Remember a check that was passed just now, in the place of the oldest of many. A full disk only loses it."""
        known = self._read()
        known.pop(key, None)
        kept = dict([*known.items(), (key, findings)][-_MOST:])
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_owner(self._path.parent)
            replace_file(self._path, _SAVED.dump_json(kept, indent=1))
        except (OSError, UntrustedPathError) as error:
            _log.warning("the self-check is not remembered, and runs again at the next start: %s", error)

    def _read(self) -> dict[str, Findings]:
        try:
            check_owner(self._path.parent)
            return _SAVED.validate_json(read_own_file(self._path))
        except FileNotFoundError:
            return {}
        except (OSError, UntrustedPathError, ValidationError) as error:
            reason = "it is damaged" if isinstance(error, ValidationError) else str(error)
            _log.warning("%s is not read, so that the self-check runs: %s", self._path, reason)
            return {}
