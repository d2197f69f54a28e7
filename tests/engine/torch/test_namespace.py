"""A stored block is served only by a process that would compute the same bytes, though block hashes are equal."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from emberkv.core.hashing import TokenChain, root_hash
from emberkv.engine.torch.assembly import recompute_cost
from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.engine import TorchEngine
from emberkv.engine.torch.namespace import Namespace, forward_sources, namespace_of
from emberkv.errors import ForeignBlockError
from emberkv.tiers.base import TierEntry
from emberkv.tiers.codec import BlockRecord, encode_record, verified_record
from emberkv.tiers.disk.files import BlockFiles, scan, verify
from emberkv.tiers.disk.tier import DiskTier
from tests.engine.conftest import ModelFactory

ROOT = root_hash("model", 2)
CHAIN = TokenChain(ROOT, [1, 2, 3, 4], 2)
HASHES = CHAIN.block_hashes
HERE = Namespace(
    root=ROOT,
    weights_dtype="bfloat16",
    activations_dtype="bfloat16",
    kv_dtype="bfloat16",
    layout="kernels",
    kernels="kernels-1",
    alignment=16,
    batch_invariant=True,
    libraries=("2.9.0", "5.0.0"),
    processor=("cpu", "x86_64", "avx2"),
    threads=2,
    sources=(("layers.py", "00"),),
)
ELSEWHERE: dict[str, object] = {
    "root": root_hash("other model", 2),
    "weights_dtype": "int8",
    "activations_dtype": "float32",
    "kv_dtype": "float16",
    "layout": "other",
    "kernels": "kernels-2",
    "alignment": 32,
    "batch_invariant": False,
    "libraries": ("2.9.1", "5.0.0"),
    "processor": ("cpu", "x86_64", "avx512"),
    "threads": 1,
    "sources": (("layers.py", "01"),),
}
"""Another value for each component."""
NAME = "namespace_layers"
SOURCE = """
from torch import nn
from transformers.activations import ACT2FN

class Layer(nn.Module):
    factor = {factor}
"""


@pytest.fixture
def layers() -> Iterator[None]:
    yield
    sys.modules.pop(NAME, None)


def layer(folder: Path, factor: float) -> nn.Module:
    path = folder / f"{NAME}.py"
    path.write_text(SOURCE.format(factor=factor))
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    made: nn.Module = module.Layer()
    return made


def other(component: str) -> bytes:
    return replace(HERE, **{component: ELSEWHERE[component]}).digest()  # type: ignore[arg-type]  # a field by its name


def entry(position: int, namespace: bytes, payload: bytes) -> TierEntry:
    record = BlockRecord(
        HASHES[position], CHAIN.parent(position), CHAIN.block_tokens(position), position, True, payload
    )
    return TierEntry(record.block_hash, "", encode_record(record, namespace=namespace), True)


def payload(tier: DiskTier, position: int, namespace: bytes) -> bytes | None:
    (found,) = tier.load([HASHES[position]])
    if found is None:
        return None
    return bytes(verified_record(found.data, namespace=namespace, block_hash=HASHES[position], exact=True).payload)


def open_tier(folder: Path, namespace: bytes) -> DiskTier:
    return DiskTier.open(folder, 2**20, namespace=namespace)


def test_every_component_has_another_value_to_be_tried_with() -> None:
    assert ELSEWHERE.keys() == {field.name for field in fields(Namespace)}
    assert len({other(component) for component in ELSEWHERE} | {HERE.digest()}) == len(ELSEWHERE) + 1


def test_a_digest_has_32_bytes_and_is_the_same_in_every_process() -> None:
    assert HERE.digest().hex() == "e12ab85739befdf084f08d1b5c751a028902979013c5b875b5c8852075b3de2b"


@pytest.mark.parametrize("component", ELSEWHERE)
def test_a_block_of_another_namespace_is_never_served(tmp_path: Path, component: str) -> None:
    """Its hash is equal, its bytes are not, and both are kept side by side."""
    here, there = HERE.digest(), other(component)
    tier = open_tier(tmp_path, there)
    tier.store([entry(0, there, b"theirs"), entry(1, there, b"theirs")])
    tier.close()
    tier = open_tier(tmp_path, here)
    assert (tier.lookup(HASHES), payload(tier, 0, here)) == (0, None)
    tier.store([entry(0, here, b"ours")])
    assert (payload(tier, 0, here), payload(tier, 1, here)) == (b"ours", None)
    assert tier.remove(HASHES).count == 1
    tier.close()
    tier = open_tier(tmp_path, there)
    assert [payload(tier, position, there) for position in (0, 1)] == [b"theirs", b"theirs"]
    tier.close()
    blocks = BlockFiles(tmp_path)
    assert [fault for _, fault in verify(blocks, scan(tmp_path / "blocks"))] == [None, None]


@pytest.mark.parametrize("component", ELSEWHERE)
def test_a_record_that_lies_in_the_wrong_place_is_refused(component: str) -> None:
    with pytest.raises(ForeignBlockError) as refused:
        verified_record(
            entry(0, other(component), b"x").data, namespace=HERE.digest(), block_hash=HASHES[0], exact=True
        )
    assert refused.value.fault == "namespace"


def test_processes_of_two_namespaces_on_one_folder_take_turns_to_write(tmp_path: Path) -> None:
    here, there = HERE.digest(), other("threads")
    writer, reader = open_tier(tmp_path, here), open_tier(tmp_path, there)
    writer.store([entry(0, here, b"ours")])
    reader.refresh()
    assert (reader.read_only, reader.lookup(HASHES[:1])) == ("another process writes here", 0)
    writer.close()
    reader.refresh()
    reader.store([entry(0, there, b"theirs")])
    assert payload(reader, 0, there) == b"theirs"
    reader.close()
    again = open_tier(tmp_path, here)
    assert payload(again, 0, here) == b"ours"
    again.close()


def engine(paged: ModelFactory) -> TorchEngine:
    return TorchEngine(paged("llama"), cache_bytes=2**18, block_size=16, prefill_chunk=64)


def test_engines_of_one_model_share_a_namespace(paged: ModelFactory) -> None:
    first, second = (namespace_of(engine(paged), ROOT) for _ in range(2))
    assert first.digest() == second.digest()
    assert (first.weights_dtype, first.activations_dtype, first.kv_dtype) == ("float32",) * 3


def test_kv_in_8_bits_has_a_namespace_of_its_own(paged: ModelFactory) -> None:
    plain = engine(paged)
    quantised = TorchEngine(paged("llama", "float32/int8"), cache_bytes=2**18, block_size=16, prefill_chunk=64)
    assert namespace_of(quantised, ROOT) == replace(
        namespace_of(plain, ROOT), kv_dtype="int8", layout="layers-kv-heads-pairs-scales.1"
    )
    assert quantised.pool.block_bytes * 4 > plain.pool.block_bytes > quantised.pool.block_bytes * 3


def test_threads_and_versions_of_this_process_are_in_it(paged: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(paged)
    before = namespace_of(made, ROOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert namespace_of(made, ROOT) == replace(before, threads=threads + 1)
    finally:
        torch.set_num_threads(threads)
    with monkeypatch.context() as settings:
        settings.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
        assert namespace_of(made, ROOT) != before
    assert namespace_of(made, ROOT) == before
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    assert namespace_of(made, ROOT) == replace(before, libraries=(*before.libraries[:2], "5.99.0"))


@pytest.mark.usefixtures("layers")
def test_the_sources_are_those_of_the_models_layers_and_of_this_engine(tmp_path: Path) -> None:
    named = {path.name for path in forward_sources(layer(tmp_path, 1.0))}
    assert {f"{NAME}.py", "activations.py", "engine.py", "attention.py", "namespace.py"} <= named
    assert not {"loop.py", "tier_link.py", "hf_tokenizer.py"} & named


@pytest.mark.usefixtures("layers")
def test_other_code_of_a_layer_is_another_namespace(paged: ModelFactory, tmp_path: Path) -> None:
    made = engine(paged)

    def sources(factor: float) -> tuple[tuple[str, str], ...]:
        made.loaded.model.add_module("patched", layer(tmp_path, factor))
        return namespace_of(made, ROOT).sources

    first = sources(1.0)
    assert sources(1.03) != first
    assert sources(1.0) == first


def test_the_type_of_the_kv_has_its_own_place(paged: ModelFactory) -> None:
    loaded = paged("llama")
    mixed = replace(loaded, dtypes=replace(loaded.dtypes, kv=torch.float16))
    plain = KVPool(loaded.geometry, loaded.dtypes.kv, 2, 16, loaded.device)
    half = KVPool(mixed.geometry, mixed.dtypes.kv, 2, 16, mixed.device)
    assert half.block_bytes * 2 == plain.block_bytes
    assert recompute_cost(mixed, 16)(0).size == half.block_bytes
    made = engine(paged)
    made.pool = half
    assert namespace_of(made, ROOT) == replace(namespace_of(engine(paged), ROOT), kv_dtype="float16")
