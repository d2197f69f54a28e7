"""A pass in one call of the kernels has the bits of the model's modules."""

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from emberkv.engine.torch.engine import TorchEngine
from emberkv.engine.torch.model.loader import LoadedModel
from emberkv.engine.torch.native.decoder import _Rotation
from emberkv.engine.torch.native.kernels import Kernels
from tests.architectures import SUPPORTED
from tests.engine.conftest import ModelFactory
from tests.models import VOCAB_SIZE

BLOCK = 8
OF_LLAMAS_SHAPE = sorted(SUPPORTED.keys() - {"gpt2"})


def engine_of(loaded: LoadedModel, kernels: Kernels) -> TorchEngine:
    cache_bytes = 200 * BLOCK * loaded.geometry.bytes_per_token(loaded.dtypes.kv)
    return TorchEngine(loaded, cache_bytes=cache_bytes, block_size=BLOCK, prefill_chunk=64, kernels=kernels)


def passes(engine: TorchEngine) -> list[Tensor]:
    """Logits of prefills in pieces and of decode steps for several sequences, and the pool after all."""
    rng = random.Random(0)
    engine.pool.storage.zero_()
    lengths = [5, 64, 70, 621]
    tables = [list(range(i * 90, (i + 1) * 90)) for i in range(2)]
    tables += [[*tables[1][:7], *range(180, 185)], list(range(90))]
    logits = []
    for length, table in zip(lengths[:3], tables, strict=False):
        tokens = [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]
        cut = rng.randrange(1, length)
        engine.prefill(tokens[:cut], 0, table, sample=False)
        logits.append(engine.prefill(tokens[cut:], cut, table, sample=True))
    long = [rng.randrange(3, VOCAB_SIZE) for _ in range(lengths[3])]
    logits.append(engine.prefill(long, 0, tables[3], sample=True))
    for step in range(3):
        next_tokens = [rng.randrange(3, VOCAB_SIZE) for _ in lengths[1:]]
        logits.append(engine.decode(next_tokens, [length + 1 + step for length in lengths[1:]], tables[1:]))
    return [*logits, engine.pool.storage.clone()]


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


COMBINATIONS = [(arch, dtype) for arch in OF_LLAMAS_SHAPE for dtype in ("float32", "bfloat16")]
COMBINATIONS += [("qwen3", "bfloat16/int8"), ("gemma2", "float32/int8")]


@pytest.mark.parametrize(("arch", "dtype"), COMBINATIONS)
def test_logits_and_state_have_the_bits_of_the_modules(
    paged: ModelFactory, kernels: Kernels, threads: None, arch: str, dtype: str
) -> None:
    engine = engine_of(paged(arch, dtype), kernels)
    assert engine.decoder is not None
    ours = passes(engine)
    engine.decoder = None
    theirs = passes(engine)
    assert all(each.isfinite().all() for each in ours)
    assert [torch.equal(*pair) for pair in zip(ours, theirs, strict=True)] == [True] * len(ours)


def test_a_model_of_other_parts_is_computed_by_its_modules(paged: ModelFactory, kernels: Kernels) -> None:
    assert engine_of(paged("gpt2"), kernels).decoder is None
    assert TorchEngine(paged("llama"), cache_bytes=1 << 20, block_size=BLOCK, prefill_chunk=64).decoder is None


class Clamping(LlamaDecoderLayer):
    """Has the parts of a layer, and clamps what is larger than ordinary."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        result: Tensor = super().forward(*args, **kwargs).clamp(-1e4, 1e4)  # type: ignore[arg-type]  # handed on
        return result


class Halving(LlamaDecoderLayer):
    """Has the parts of a layer, and does something else with them."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        result: Tensor = super().forward(*args, **kwargs) * 0.5  # type: ignore[arg-type]  # handed on
        return result


class Scaling(LlamaDecoderLayer):
    """Has the parts of a layer, and does something else with them from some position on."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        positions = kwargs["position_ids"]
        assert isinstance(positions, Tensor)
        result: Tensor = super().forward(*args, **kwargs)  # type: ignore[arg-type]  # handed on
        return torch.where((positions > 500).unsqueeze(-1), result * 0.5, result)


@pytest.mark.parametrize("kind", [Clamping, Halving, Scaling])
def test_a_layer_that_only_looks_like_one_is_left_to_the_modules(
    paged: ModelFactory, kernels: Kernels, kind: type[LlamaDecoderLayer]
) -> None:
    loaded = paged("llama")
    loaded.model.get_submodule("model.layers.1").__class__ = kind
    engine = engine_of(loaded, kernels)
    assert engine.decoder is None
    engine.check_against_plain_forward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_position_has_the_rotation_that_it_has_alone(paged: ModelFactory, dtype: torch.dtype) -> None:
    rotary = paged("llama").model.get_submodule("model.rotary_emb")
    rotation = _Rotation(rotary, (), dtype, limit=4096)
    assert rotation.cover(7)
    assert not rotation.cover(1000)
    assert rotation.cover(1025)
    like = torch.empty(1, 1, dtype=dtype)
    for position in (0, 1, 6, 7, 1000, 1023, 1024, 2000):
        cos, sin = rotary(like, torch.tensor([[position]]))
        assert torch.equal(rotation.cos[position], cos[0, 0])
        assert torch.equal(rotation.sin[position], sin[0, 0])
    assert rotation.cover(3000)
    assert rotation.cos.shape[0] == 4096
