"""What a model's attention looks like, and the refusal of every other kind by the name of what it has."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from emberkv.engine.torch.model.geometry import HeadShape, Window
from emberkv.engine.torch.model.inspection import ModelShape, inspect_geometry, inspect_model
from emberkv.engine.torch.model.loader import load_model
from emberkv.errors import CorruptModelError, UnsupportedModelError
from tests.architectures import ALSO_SUPPORTED, REFUSED, SUPPORTED
from tests.conftest import CheckpointFactory

REASONS = {
    "mamba": "mamba .*MambaMixer keeps recurrent state of another kind",
    "jamba": "jamba .*JambaMambaMixer keeps recurrent state of another kind",
    "t5": "t5 .*encoder-decoder",
    "bart": "bart .*encoder-decoder",
}


def test_geometry_counts_the_bytes_of_a_token(checkpoint: CheckpointFactory) -> None:
    geometry = inspect_geometry(AutoConfig.from_pretrained(checkpoint("llama")))
    assert geometry.num_layers == 3
    assert geometry.bytes_per_token(torch.bfloat16) == 2 * 3 * 2 * 16 * 2


@pytest.mark.parametrize("arch", sorted(REFUSED))
def test_other_architectures_are_refused_by_the_name_of_what_they_have(
    checkpoint: CheckpointFactory, tmp_path: Path, arch: str
) -> None:
    # Only the config is there: a refusal must not need the weights.
    shutil.copy(checkpoint(arch) / "config.json", tmp_path)
    with pytest.raises(UnsupportedModelError, match=REASONS[arch]):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("cpmant", {}, "CpmAntAttention does not go through"),
        ("llama", {"alibi": True}, "ALiBi"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "sets qk_ln, which transformers does not compute"),
        ("mllama", {}, "multimodal"),
        ("minimax", {"num_hidden_layers": 2}, "layer 1 keeps recurrent state of another kind than Mamba-2"),
        (
            "dbrx",
            {"n_layers": 1, "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
            "the forward pass of DbrxExperts cannot be traced",
        ),
        ("phimoe", {"num_hidden_layers": 1, "sliding_window": 40}, "layer 0 slides by its config or in its forward"),
        ("bert", {"num_hidden_layers": 1}, "layer 0 is not causal"),
        ("rwkv", {"num_hidden_layers": 1, "hidden_size": 64}, "recurrent state"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
        ("vit", {}, "no causal language model head"),
    ],
)
def test_other_kinds_of_models_are_refused(model_type: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        inspect_geometry(AutoConfig.for_model(model_type, **settings))


def test_layers_have_heads_of_their_own(checkpoint: CheckpointFactory) -> None:
    geometry = inspect_geometry(AutoConfig.from_pretrained(checkpoint("gemma4_text-experts")))
    usual, other = HeadShape(4, 2, 16), HeadShape(4, 1, 48)
    assert geometry.head_shapes() == [usual, other, other]
    assert [layer.head_shape for layer in geometry.layers] == [None, other, other]
    assert geometry.bytes_per_token(torch.bfloat16) == 2 * 2 * (2 * 16 + 48 + 48)
    assert geometry.bytes_per_token(torch.int8) == 2 * (2 * (16 + 2) + 2 * (48 + 2))
    shared = inspect_geometry(AutoConfig.from_pretrained(checkpoint("gemma4_text")))
    assert shared.kv_layers() == [0, 1, 2, 1, 1, 2]
    assert shared.kv_shapes() == [usual, usual, HeadShape(4, 2, 32)]


@contextmanager
def modules_made(on_module: Callable[[], None]) -> Iterator[None]:
    """Calls it for each module that is made within, anywhere in the process."""
    handle = register_module_module_registration_hook(lambda *_: on_module())
    try:
        yield
    finally:
        handle.remove()


def test_torch_s_default_dtype_is_left_alone_while_a_model_is_built() -> None:
    """Other threads may build models meanwhile, and it is one for the process."""
    config = AutoConfig.for_model("llama", **SUPPORTED["llama"] | {"intermediate_size": 40, "dtype": "bfloat16"})
    seen = set[torch.dtype]()
    with modules_made(lambda: seen.add(torch.get_default_dtype())):
        inspect_model(config)
    assert seen == {torch.float32}


def test_models_that_are_described_alike_are_built_once() -> None:
    """However they are named; what differs in a value, or in its type alone, is another model."""
    settings = SUPPORTED["llama"] | {"intermediate_size": 56}

    def inspected(name: str, **changes: object) -> tuple[int, ModelShape]:
        config = AutoConfig.for_model("llama", **settings, name_or_path=name)
        vars(config).update(changes)
        made: list[None] = []
        with modules_made(lambda: made.append(None)):
            shape = inspect_model(config)
        return len(made), shape

    built, shape = inspected("one")
    assert built > 0
    assert inspected("other") == (0, shape)
    assert inspected("one", intermediate_size=72)[1].shapes["model.layers.0.mlp.up_proj.weight"] == (72, 64)
    assert inspected("one") == (0, shape)
    with pytest.raises(CorruptModelError, match="describes no llama model that can be built"):
        inspected("one", intermediate_size=56.0)


def test_configs_of_classes_that_have_the_same_name_are_told_apart() -> None:
    def config(heads: int) -> PretrainedConfig:
        class Config(LlamaConfig):
            model_type = "named_alike"

        class Model(LlamaForCausalLM):
            config_class = Config

            def __init__(self, config: LlamaConfig) -> None:
                config.num_key_value_heads = heads
                super().__init__(config)

        AutoModelForCausalLM.register(Config, Model)
        return Config(**{**SUPPORTED["llama"], "num_key_value_heads": 4})

    assert [inspect_geometry(config(heads)).num_kv_heads for heads in (1, 2, 4)] == [1, 2, 4]


@pytest.mark.parametrize("arch", ["deepseek_v2", "deepseek_v3"])
def test_the_kv_of_latent_attention_are_latents_and_not_heads(checkpoint: CheckpointFactory, arch: str) -> None:
    geometry = inspect_geometry(AutoConfig.from_pretrained(checkpoint(arch)))
    assert (geometry.num_heads, geometry.num_kv_heads, geometry.head_dim) == (4, 1, 16 + 8)


def test_layers_that_share_keys_and_values_take_no_memory_of_their_own(checkpoint: CheckpointFactory) -> None:
    geometry = inspect_geometry(AutoConfig.from_pretrained(checkpoint("gemma3n_text")))
    assert geometry.kv_layers() == [0, 1, 2, 1, 1, 2]
    assert geometry.bytes_per_token(torch.bfloat16) == 2 * 3 * 2 * 16 * 2


def test_layers_with_chunks_and_without_are_told_apart() -> None:
    settings = ALSO_SUPPORTED["llama4_text"]
    geometry = inspect_geometry(AutoConfig.for_model("llama4_text", **settings))
    assert [layer.window for layer in geometry.layers] == [Window(40, chunked=True), None, Window(40, chunked=True)]
    with pytest.raises(UnsupportedModelError, match="layer 0 has chunks of 0 tokens"):
        inspect_geometry(AutoConfig.for_model("llama4_text", **settings | {"attention_chunk_size": 0}))
