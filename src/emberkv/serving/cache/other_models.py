"""The models that share a cache folder, by name and root hash: a miss can name another model that has the prompt."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from emberkv.core.hashing import PUBLIC_OWNER, BlockHash, TokenChain
from emberkv.errors import UntrustedPathError
from emberkv.files import read_own_file, remove_leftovers, replace_file
from emberkv.tiers.disk.files import BLOCKS, BlockFile

FILE_NAME = "models.json"


class KnownModel(BaseModel):
    """root: the parent of its chains' first blocks. Bytes are in hexadecimal."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_bytes="hex", val_json_bytes="hex")

    name: str
    root: bytes
    block_size: int = Field(ge=1)


def _hexadecimal(namespace: str) -> str:
    return bytes.fromhex(namespace).hex()


Namespace = Annotated[str, AfterValidator(_hexadecimal)]


class KnownModels(BaseModel):
    """By namespace, in hexadecimal."""

    model_config = ConfigDict(extra="forbid")

    models: dict[Namespace, KnownModel] = {}


class OtherModels:
    """Of one cache folder, as seen by the model of ``namespace``, which is written down with the others.

    A file that cannot be read is begun anew: all that is lost are names. Raises OSError when it cannot be written.
    """

    def __init__(self, folder: Path, namespace: bytes, own: KnownModel) -> None:
        self._folder = folder
        remove_leftovers(folder, re.escape(FILE_NAME))
        self._known = _read(folder / FILE_NAME)
        self._known.models[namespace.hex()] = own
        replace_file(folder / FILE_NAME, self._known.model_dump_json().encode())
        self._others = {name: model for name, model in self._known.models.items() if name != namespace.hex()}

    def cached(self, tokens: Sequence[int], own: TokenChain, salt: bytes) -> Mapping[str, int]:
        """How many of a prompt's first tokens each other model has in the folder, by its name; those with none are
        left out. own: the prompt's chain here; salt: its tenant's.
        """
        public = sum(own.owner(index) == PUBLIC_OWNER for index in range(len(own.block_hashes)))
        owner = own.owner(public) if public < len(own.block_hashes) else ""
        counts: dict[str, int] = {}
        for namespace, model in self._others.items():
            chain = TokenChain(
                model.root,
                tokens,
                model.block_size,
                owner=owner,
                salt=salt,
                public_blocks=public * own.block_size // model.block_size,
            )
            count = self._run(bytes.fromhex(namespace), chain) * model.block_size
            if count:
                counts[model.name] = max(count, counts.get(model.name, 0))
        return counts

    def _run(self, namespace: bytes, chain: TokenChain) -> int:
        for index, block_hash in enumerate(chain.block_hashes):
            if not self._has(namespace, block_hash, chain.owner(index)):
                return index
        return len(chain.block_hashes)

    def _has(self, namespace: bytes, block_hash: BlockHash, owner: str) -> bool:
        files = (BlockFile(namespace, block_hash, owner, exact, 0, 0) for exact in (True, False))
        return any((self._folder / BLOCKS / file.path).exists() for file in files)


def model_names(folder: Path) -> dict[str, str]:
    """The names of the models that have used a cache folder, by namespace in hexadecimal."""
    return {namespace: model.name for namespace, model in _read(folder / FILE_NAME).models.items()}


def _read(path: Path) -> KnownModels:
    try:
        return KnownModels.model_validate_json(read_own_file(path))
    except (OSError, UntrustedPathError, ValidationError):  # missing, or damaged: see OtherModels
        return KnownModels()
