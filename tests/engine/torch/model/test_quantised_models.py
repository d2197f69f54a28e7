"""Quantised checkpoints of each source, loaded and served: their values, their logits, and hits against cold runs."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from emberkv.engine.torch.attention.paged_attention import ATTENTION_NAME
from emberkv.engine.torch.model.description import describe_model
from emberkv.engine.torch.model.inspection import inspect_model
from emberkv.engine.torch.model.loader import load_model, open_source
from emberkv.engine.torch.native.experts import NativeExperts
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.quantization.layers import QuantizedExperts
from emberkv.errors import CorruptModelError, UnsupportedModelError
from tests.engine.driver import BLOCK, CHUNK, Driver
from tests.engine.torch.model.test_loaded_bytes import held_bytes
from tests.models import VOCAB_SIZE
from tests.quantized_models import SOURCES, quantised_model


def text(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


@pytest.fixture(scope="module", params=SOURCES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The quantised model, and the plain one that it stands for."""
    return quantised_model(request.param, tmp_path_factory.mktemp(request.param))


def test_logits_are_those_of_the_dequantised_model(written: tuple[Path, Path]) -> None:
    quantised, plain = written
    tokens = torch.tensor([text(random.Random(0), 60)])
    loaded = load_model(str(quantised), device="cpu", dtype="float32")
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.inference_mode():
        ours = loaded.model(input_ids=tokens, use_cache=False).logits
        theirs = expected(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_hit_has_the_bits_of_a_cold_run(written: tuple[Path, Path], kernels: Kernels) -> None:
    """In the middle of a prompt, in what decode steps have computed, and among other sequences of the same step."""
    rng = random.Random(1)
    loaded = load_model(str(written[0]), device="cpu", attn_implementation=ATTENTION_NAME)
    warm = Driver(loaded, kernels=kernels, max_step_tokens=96)
    assert warm.executor.batch_invariant
    stem = text(rng, 2 * CHUNK + 3)
    stem += warm.run_one(stem, new=20).tokens[:-1]
    kept = [2 * CHUNK + 12, CHUNK + 5, BLOCK + 2]
    prompts = [[*stem[:keep], (stem[keep] - 2) % (VOCAB_SIZE - 3) + 3, *text(rng, keep % 19)] for keep in kept]
    runs = warm.run(*prompts, new=3)
    cold = Driver(loaded, kernels=kernels, prefix_cache=False, executor=warm.executor)
    for run, keep, prompt in zip(runs, kept, prompts, strict=True):
        alone = cold.run_one(prompt, new=3)
        assert run.cached == keep
        assert all(map(torch.equal, run.logits, alone.logits))


EXPERTS = [
    ("gptq", "qwen3_moe", 4), ("gptq", "mixtral", 4), ("awq", "glm4_moe", 4), ("compressed-int4", "qwen3_moe", 4),
    ("compressed-int8", "mixtral", 8), ("mlx-4", "qwen3_moe", 4), ("mlx-8", "qwen3_moe", 8), ("mxfp4", "gpt_oss", 8),
    ("fp8", "qwen3_moe", 0), ("gguf-q8_0", "mixtral", 8), ("gguf-q4_1", "mixtral", 4), ("gguf-q4_0", "gpt_oss", 4),
    ("gguf-mxfp4", "gpt_oss", 8), ("gguf-q8_0", "qwen2_moe", 8),
    ("compressed-int4", "gpt_oss", 4),
]  # fmt: skip
"""By source and architecture: the bits that the experts keep; 0: they are held in the type that is computed with."""


@pytest.mark.parametrize(("source", "arch", "bits"), EXPERTS)
def test_experts_stay_quantised_and_compute_what_the_dequantised_ones_do(
    tmp_path: Path, kernels: Kernels, source: str, arch: str, bits: int
) -> None:
    quantised, plain = quantised_model(source, tmp_path, arch)
    tokens = text(random.Random(0), CHUNK + 9)
    loaded = load_model(str(quantised), device="cpu", dtype="float32", attn_implementation=ATTENTION_NAME)
    stacks = [each for each in loaded.model.modules() if isinstance(each, QuantizedExperts)]
    assert {each.bits for stack in stacks for each in stack.quantized} == ({bits} if bits else set())
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.inference_mode():
        theirs = expected(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    driver = Driver(loaded, kernels=kernels)
    assert driver.executor.batch_invariant
    native = [each for each in loaded.model.modules() if isinstance(each, NativeExperts)]
    assert {layer.call.bits for each in native for layers in each.layers for layer in layers} == {bits}
    driver.run_one(tokens[:CHUNK], new=1)
    run = driver.run_one(tokens, new=1)
    assert run.cached == CHUNK
    assert (run.logits[0] - theirs).norm() < 2e-3 * theirs.norm()


def test_experts_whose_inputs_have_an_order_of_their_own_become_plain(tmp_path: Path) -> None:
    quantised, plain = quantised_model("gptq-act-order", tmp_path, "qwen3_moe")
    tokens = torch.tensor([text(random.Random(0), 40)])
    loaded = load_model(str(quantised), device="cpu", dtype="float32")
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    assert loaded.model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").dtype is torch.float32
    with torch.inference_mode():
        ours, theirs = (each(input_ids=tokens, use_cache=False).logits for each in (loaded.model, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", ["gptq", "mlx-4", "mxfp4", "gguf-q4_0", "gguf-mxfp4"])
def test_what_experts_take_is_stated_before_they_are_loaded(tmp_path: Path, source: str) -> None:
    quantised, _ = quantised_model(source, tmp_path, "mixtral" if source == "gguf-q4_0" else "qwen3_moe")
    opened = open_source(quantised)
    shape = inspect_model(opened.config)
    loaded = load_model(str(quantised), device="cpu", dtype="bfloat16")
    # a quantised router becomes plain
    assert opened.num_bytes(shape, torch.bfloat16) == pytest.approx(held_bytes(loaded.model), rel=1e-2)
    described = describe_model(str(quantised), device="cpu", dtype="bfloat16")
    assert (described.refusal, described.weight_bytes) == (None, opened.num_bytes(shape, torch.bfloat16, packed=True))


def test_the_experts_of_llama_4_are_refused_by_name(tmp_path: Path) -> None:
    """Its model multiplies by the whole stack, and takes no expert by its number."""
    quantised, _ = quantised_model("gptq", tmp_path, "llama4_text")
    message = (
        "weights are GPTQ, 4 bits in groups of 32, in which the experts of llama4_text are not read; the model's "
        "plain weights would work, with --quantize int8 or int4 for all but the experts"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(str(quantised), device="cpu")
    assert message in str(describe_model(str(quantised), device="cpu").refusal)


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    quantised, _ = quantised_model("awq", tmp_path, "qwen3_moe")
    path = quantised / "model.safetensors"
    save_file({name: each for name, each in load_file(path).items() if "experts.3.up_proj" not in name}, path)
    with pytest.raises(CorruptModelError, match=r"lack model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load_model(str(quantised), device="cpu")


def test_a_quantised_checkpoint_that_lacks_a_layer_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    quantised, _ = quantised_model("awq", tmp_path)
    path = quantised / "model.safetensors"
    save_file({name: each for name, each in load_file(path).items() if "layers.1.mlp.up_proj" not in name}, path)
    with pytest.raises(CorruptModelError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight; the config needs"):
        describe_model(str(quantised), device="cpu")


def _changed(folder: Path, settings: dict[str, Any], part: str = "", shape: tuple[int, ...] = ()) -> Path:
    """A GPTQ checkpoint with other settings, whose tensors called ``part`` have the first ``shape[0]`` rows alone, or
    are flattened: ().
    """
    quantised, _ = quantised_model("gptq", folder)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] |= settings
    (quantised / "config.json").write_text(json.dumps(config))
    path = quantised / "model.safetensors"
    cut = {name: each.flatten() if shape == () else each[: shape[0]] for name, each in load_file(path).items()
           if part and name.endswith(part)}  # fmt: skip
    save_file(load_file(path) | cut, path)
    return quantised


@pytest.mark.parametrize(
    ("settings", "part", "shape", "message"),
    [
        ({"group_size": "many"}, "", (), "config.json does not say how the weights are quantised"),
        ({}, "qweight", (), "is not stored as GPTQ, 4 bits in groups of 32: it has .*qweight"),
        ({}, "qzeros", (1,), "zero points of .* do not fit together"),
    ],
)
def test_settings_and_shapes_that_do_not_fit_are_refused(
    tmp_path: Path, settings: dict[str, Any], part: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(CorruptModelError, match=message):
        load_model(str(_changed(tmp_path, settings, part, shape)), device="cpu")
