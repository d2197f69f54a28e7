"""`--quantize`: a plain checkpoint's linear layers are rounded while it is loaded, one tensor at a time."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from emberkv.engine.torch.model.fingerprint import model_fingerprint
from emberkv.engine.torch.model.loader import ModelDtypes, load_model
from emberkv.engine.torch.quantization.layers import QuantizedLinear, quantized_linears
from emberkv.engine.torch.quantization.on_load import QuantizeName, RoundingConfig
from emberkv.engine.torch.quantization.weight import quantise
from emberkv.errors import ConfigError, CorruptModelError
from tests.conftest import CheckpointFactory


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "phi3", "gpt2"])
@pytest.mark.parametrize(("quantize", "bits"), [("int8", 8), ("int4", 4)])
def test_each_linear_layer_is_rounded_from_what_is_stored(
    checkpoint: CheckpointFactory, arch: str, quantize: QuantizeName, bits: int
) -> None:
    folder = str(checkpoint(arch))
    plain = load_model(folder, dtype="bfloat16", device="cpu").model
    loaded = load_model(folder, dtype="bfloat16", device="cpu", quantize=quantize)
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


def test_the_fingerprint_says_how_weights_are_rounded(checkpoint: CheckpointFactory) -> None:
    choices: list[QuantizeName] = ["none", "int8", "int4"]
    folder = str(checkpoint("llama"))
    found = {load_model(folder, device="cpu", quantize=each).fingerprint for each in choices}
    assert len(found) == 3
    assert load_model(folder, device="cpu", quantize="int8").fingerprint in found


def test_logits_are_near_those_of_the_plain_model(checkpoint: CheckpointFactory) -> None:
    folder = str(checkpoint("llama"))
    tokens = torch.arange(3, 67)[None]
    choices: list[QuantizeName] = ["none", "int8", "int4"]
    with torch.inference_mode():
        plain, *rounded = (load_model(folder, device="cpu", quantize=each).model(tokens).logits for each in choices)
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


def test_a_rounded_model_in_memory_has_a_fingerprint_of_its_own(checkpoint: CheckpointFactory) -> None:
    choices: list[QuantizeName] = ["none", "int8", "int4", "int4"]
    loaded = [load_model(str(checkpoint("llama")), device="cpu", quantize=each) for each in choices]
    plain, eight, four, again = (model_fingerprint(each.model) for each in loaded)
    assert plain == loaded[0].fingerprint
    assert four == again
    assert len({plain, eight, four}) == 3
