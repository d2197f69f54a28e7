"""`--quantize`: a plain checkpoint's linear layers are rounded while it is loaded, one tensor at a time."""

import json
import random
import shutil
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from emberkv.engine.torch.attention.paged_attention import ATTENTION_NAME
from emberkv.engine.torch.layers import is_experts
from emberkv.engine.torch.model.fingerprint import model_fingerprint
from emberkv.engine.torch.model.loader import DTypeName, LoadedModel, ModelDtypes, load_model
from emberkv.engine.torch.native.experts import NativeExperts
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.quantization.layers import QuantizedExperts, QuantizedLinear, quantized_linears
from emberkv.engine.torch.quantization.on_load import QuantizeName, RoundingConfig
from emberkv.engine.torch.quantization.weight import Bits, QuantizedWeight, quantise
from emberkv.errors import ConfigError, CorruptModelError, UnsupportedModelError
from tests.conftest import CheckpointFactory
from tests.engine.driver import CHUNK, Driver
from tests.models import VOCAB_SIZE

LoadedOnce = Callable[..., LoadedModel]


@pytest.fixture(scope="module")
def loaded_once(checkpoint: CheckpointFactory) -> LoadedOnce:
    """``loaded_once(arch, dtype="auto", quantize="none")``: a model for several tests, which must not change it."""

    @cache
    def get(arch: str, dtype: DTypeName = "auto", quantize: QuantizeName = "none") -> LoadedModel:
        return load_model(str(checkpoint(arch)), dtype=dtype, device="cpu", quantize=quantize)

    return get


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "phi3", "gpt2"])
@pytest.mark.parametrize(("quantize", "bits"), [("int8", 8), ("int4", 4)])
def test_each_linear_layer_is_rounded_from_what_is_stored(
    loaded_once: LoadedOnce, arch: str, quantize: QuantizeName, bits: int
) -> None:
    plain = loaded_once(arch, "bfloat16").model
    loaded = loaded_once(arch, "bfloat16", quantize)
    assert loaded.dtypes == ModelDtypes(getattr(torch, quantize), torch.bfloat16, torch.bfloat16)
    assert str(loaded.dtypes) == f"{quantize} weights, bfloat16 activations, bfloat16 KV"
    linears = {name: module for name, module in plain.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    assert len(quantized_linears(loaded.model)) == len(linears) > 4
    output = linears.get("lm_head")
    for name, module in linears.items():
        ours = loaded.model.get_submodule(name)
        assert isinstance(ours, QuantizedLinear)
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.t()
        expected = quantise(weight, 8 if module is output else bits)  # type: ignore[arg-type]  # 8 or 4
        assert torch.equal(ours.quantized.codes, expected.codes)
        assert ours.quantized.bits == expected.bits
        assert (ours.bias is None) == (module.bias is None)
    kept = dict(plain.named_parameters())
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, kept[name])
    assert not hasattr(loaded.model.config, "quantization_config")


def test_the_kernels_round_to_four_bits_what_torch_would(checkpoint: CheckpointFactory, kernels: Kernels) -> None:
    folder, fitted = str(checkpoint("qwen2")), list[QuantizedWeight]()

    def fit(values: Tensor) -> QuantizedWeight:
        fitted.append(kernels.fitted(values))
        return fitted[-1]

    ours, theirs = (
        quantized_linears(load_model(folder, device="cpu", quantize="int4", fit=each).model) for each in (fit, None)
    )
    assert len(fitted) > len(ours) > 4
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.quantized.dequantised(), other.quantized.dequantised())


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "gpt_oss", "glm4_moe"])
@pytest.mark.parametrize(("quantize", "bits"), [("int8", 8), ("int4", 4)])
def test_experts_are_rounded_one_by_one(loaded_once: LoadedOnce, arch: str, quantize: QuantizeName, bits: Bits) -> None:
    plain = loaded_once(arch, "bfloat16").model
    ours = loaded_once(arch, "bfloat16", quantize).model
    stacks = {name: each for name, each in ours.named_modules() if isinstance(each, QuantizedExperts)}
    assert len(stacks) == 2 * sum(is_experts(module) for module in plain.modules()) >= 2
    for name, stack in stacks.items():
        weight = plain.get_parameter(name)
        assert stack.shape == weight.shape
        expected = quantise(weight[3].t() if stack.transposed else weight[3], bits)
        assert torch.equal(stack.quantized[3].codes, expected.codes)
        error = (stack[3].float() - weight[3].float()).norm() / weight[3].float().norm()
        assert 0 < error < (0.01 if bits == 8 else 0.09)


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "gpt_oss", "glm4_moe"])
def test_the_kernels_compute_rounded_experts_and_a_hit_has_the_bits_of_a_cold_run(
    checkpoint: CheckpointFactory, kernels: Kernels, arch: str
) -> None:
    loaded = load_model(str(checkpoint(arch)), device="cpu", quantize="int4", attn_implementation=ATTENTION_NAME)
    warm = Driver(loaded, kernels=kernels)
    assert warm.executor.batch_invariant
    experts = [each for each in loaded.model.modules() if isinstance(each, NativeExperts)]
    assert {call.bits for each in experts for layers in each.layers for call in (one.call for one in layers)} == {4}
    rng = random.Random(3)
    prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(CHUNK + 20)]
    warm.run_one(prompt[: CHUNK + 7], new=3)
    got = warm.run_one(prompt, new=3)
    cold = Driver(loaded, kernels=kernels, prefix_cache=False, executor=warm.executor)
    expected = cold.run_one(prompt, new=3)
    assert got.cached == CHUNK + 7
    assert all(map(torch.equal, got.logits, expected.logits))


@pytest.mark.parametrize(("quantize", "bits"), [("int8", 8), ("int4", 4)])
def test_layers_that_share_weights_share_what_these_are_rounded_to(
    loaded_once: LoadedOnce, quantize: QuantizeName, bits: Bits
) -> None:
    plain = loaded_once("zamba2").model
    ours = loaded_once("zamba2", quantize=quantize).model
    for own in ("self_attn.q_proj", "feed_forward.down_proj"):
        stored, tied = (ours.get_submodule(f"model.layers.{layer}.shared_transformer.{own}") for layer in (1, 3))
        assert isinstance(stored, QuantizedLinear)
        assert isinstance(tied, QuantizedLinear)
        assert tied.quantized is stored.quantized
        weight = plain.get_parameter(f"model.layers.3.shared_transformer.{own}.weight")
        assert torch.equal(tied.quantized.codes, quantise(weight, bits).codes)


def test_an_embedding_that_is_stored_as_the_output_layers_is_refused_by_name(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    folder = checkpoint("qwen2")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    embedding = load_model(str(tmp_path), device="cpu").model.get_parameter("model.embed_tokens.weight")
    assert torch.equal(embedding, weights["lm_head.weight"])
    with pytest.raises(UnsupportedModelError, match=r"--quantize int8: model\.embed_tokens\.weight share"):
        load_model(str(tmp_path), device="cpu", quantize="int8")


def test_one_plain_weight_is_held_at_a_time(checkpoint: CheckpointFactory) -> None:
    earlier: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def on_weight(name: str, weight: Tensor) -> None:
        alive.append(sum(each() is not None for each in earlier))
        earlier.append(weakref.ref(weight))

    AutoModelForCausalLM.from_pretrained(
        checkpoint("llama"), dtype=torch.bfloat16, quantization_config=RoundingConfig("int8", on_weight)
    )
    assert len(alive) == 3 * 7 + 1
    assert max(alive) <= 1  # the one before may wait for its turn to be freed


def test_the_fingerprint_says_how_weights_are_rounded(checkpoint: CheckpointFactory, loaded_once: LoadedOnce) -> None:
    found = {loaded_once("llama", quantize=each).fingerprint for each in ("none", "int8", "int4")}
    assert len(found) == 3
    assert load_model(str(checkpoint("llama")), device="cpu", quantize="int8").fingerprint in found


def test_logits_are_near_those_of_the_plain_model(loaded_once: LoadedOnce) -> None:
    tokens = torch.arange(3, 67)[None]
    models = [loaded_once("llama", quantize=each).model for each in ("none", "int8", "int4")]
    with torch.inference_mode():
        plain, *rounded = (model(tokens).logits for model in models)
    eight, four = (float((logits - plain).norm() / plain.norm()) for logits in rounded)
    assert 0 < eight < 0.1  # of a random model, whose layers enlarge errors
    assert eight < four / 4


def test_a_device_without_kernels_is_refused(checkpoint: CheckpointFactory) -> None:
    if torch.cuda.is_available():
        with pytest.raises(ConfigError, match="quantised weights are for the CPU"):
            load_model(str(checkpoint("llama")), device="cuda", quantize="int8")


def test_weights_that_are_no_numbers_are_refused(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    model = load_model(str(checkpoint("llama")), device="cpu").model
    nn.init.constant_(model.get_parameter("model.layers.0.mlp.up_proj.weight"), torch.nan)
    model.save_pretrained(tmp_path)
    for path in checkpoint("llama").glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CorruptModelError, match=r"layers\.0\.mlp\.up_proj\.weight: .* values that are not finite"):
        load_model(str(tmp_path), device="cpu", quantize="int8")


def test_a_rounded_model_in_memory_has_a_fingerprint_of_its_own(
    checkpoint: CheckpointFactory, loaded_once: LoadedOnce
) -> None:
    loaded = [loaded_once("llama", quantize=each) for each in ("none", "int8", "int4")]
    loaded.append(load_model(str(checkpoint("llama")), device="cpu", quantize="int4"))
    plain, eight, four, again = (model_fingerprint(each.model) for each in loaded)
    assert plain == loaded[0].fingerprint
    assert four == again
    assert len({plain, eight, four}) == 3
