"""What the weights take once the engine has arranged them, measured and as it is stated before they are loaded."""

from pathlib import Path

import pytest
import torch

from emberkv.engine.torch.assembly import resident_bytes
from emberkv.engine.torch.attention.paged_attention import ATTENTION_NAME
from emberkv.engine.torch.engine import TorchEngine
from emberkv.engine.torch.model.inspection import inspect_model
from emberkv.engine.torch.model.loader import load_model, open_source
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.quantization.on_load import QuantizeName
from tests.conftest import CheckpointFactory
from tests.quantized_models import quantised_model


def resident(path: Path, kernels: Kernels, quantize: QuantizeName = "none") -> int:
    loaded = load_model(
        str(path),
        dtype="bfloat16",
        device="cpu",
        quantize=quantize,
        fit=kernels.fitted,
        attn_implementation=ATTENTION_NAME,
    )
    TorchEngine(loaded, cache_bytes=1 << 20, block_size=16, prefill_chunk=64, kernels=kernels)
    return resident_bytes(loaded.model)


def stated(path: Path, quantize: QuantizeName = "none") -> int:
    source = open_source(path, quantize)
    return source.num_bytes(inspect_model(source.config), torch.bfloat16, packed=True)


@pytest.mark.parametrize(
    ("arch", "quantize"),
    [
        ("llama", "none"),
        ("llama", "int8"),
        ("llama", "int4"),
        ("gpt2", "none"),
        ("gpt2", "int8"),
        ("mixtral", "int8"),
        ("granitemoehybrid", "none"),
    ],
)
def test_a_checkpoint_takes_what_is_stated(
    checkpoint: CheckpointFactory, kernels: Kernels, arch: str, quantize: QuantizeName
) -> None:
    """GPT-2's output layer shares the embedding's weight, and gets a copy of its own."""
    path = checkpoint(arch)
    assert resident(path, kernels, quantize) == pytest.approx(stated(path, quantize), rel=0.05)


@pytest.mark.parametrize(
    ("source", "arch"), [("gptq", "qwen2"), ("mlx-4", "qwen2"), ("gguf-q8_0", "qwen2"), ("gptq", "qwen3_moe")]
)
def test_quantised_weights_take_what_is_stated(tmp_path: Path, kernels: Kernels, source: str, arch: str) -> None:
    path, _ = quantised_model(source, tmp_path, arch)
    assert resident(path, kernels) == pytest.approx(stated(path), rel=0.05)
