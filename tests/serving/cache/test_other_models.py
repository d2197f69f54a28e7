"""Other models in one cache folder: found by what they stored, for the same tenant only."""

import json
from pathlib import Path

import pytest

from emberkv.core.hashing import TokenChain
from emberkv.serving.cache.other_models import FILE_NAME, KnownModel, OtherModels, model_names
from emberkv.tiers.disk.files import BLOCKS, BlockFile

OLD, NEW = b"\x01" * 32, b"\x02" * 32
TOKENS = list(range(20))


def model(name: str, root: bytes) -> KnownModel:
    return KnownModel(name=name, root=root, block_size=4)


def store(folder: Path, namespace: bytes, chain: TokenChain, blocks: int) -> None:
    for index in range(blocks):
        file = BlockFile(namespace, chain.block_hashes[index], chain.owner(index), index % 2 == 0, 0, 0)
        path = folder / BLOCKS / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def chain(root: bytes, owner: str = "", public_blocks: int = 0) -> TokenChain:
    return TokenChain(root, TOKENS, 4, owner=owner, salt=owner.encode(), public_blocks=public_blocks)


@pytest.mark.parametrize("owner", ["", "ann"])
def test_a_model_that_was_here_before(tmp_path: Path, owner: str) -> None:
    OtherModels(tmp_path, b"old", model("older", OLD))
    store(tmp_path, b"old", chain(OLD, owner, 1), 3)
    models = OtherModels(tmp_path, b"new", model("newer", NEW))
    assert models.cached(TOKENS, chain(NEW, owner, 1), owner.encode()) == {"older": 12}
    assert models.cached([9, *TOKENS], TokenChain(NEW, [9, *TOKENS], 4), b"") == {}
    assert models.cached(TOKENS, chain(NEW, "bob", 1), b"bob") == {"older": 4}, "the public block only"
    assert OtherModels(tmp_path, b"old", model("older", OLD)).cached(TOKENS, chain(OLD, owner), owner.encode()) == {}


def test_a_damaged_list_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("{")
    OtherModels(tmp_path, b"new", model("newer", NEW))
    listed = json.loads((tmp_path / FILE_NAME).read_text())
    assert listed == {"models": {b"new".hex(): {"name": "newer", "root": NEW.hex(), "block_size": 4}}}
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_a_list_with_a_name_that_is_no_namespace_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "models.json").write_text('{"models": {"no hex": {"name": "a", "root": "00", "block_size": 16}}}')
    OtherModels(tmp_path, b"space", KnownModel(name="own", root=b"root", block_size=16))
    assert model_names(tmp_path) == {b"space".hex(): "own"}
