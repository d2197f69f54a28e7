"""Whatever a config.json holds, the model loads or is refused in one sentence, and soon."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emberkv.engine.assembly import EngineConfig
from emberkv.engine.torch.assembly import assemble
from emberkv.engine.torch.attention.paged_attention import ATTENTION_NAME
from emberkv.engine.torch.model.loader import load_model
from emberkv.errors import CorruptModelError, EmberError, UnsupportedModelError
from tests.conftest import CheckpointFactory

EDGES: list[Any] = [
    0, -1, 1, 3, 10**9, 10**18, 10**30, 1.5, -0.0, 1e308, "x", "", "org/repo", None, True, [], {}, [[]], [1, 1, 1],
    ["full_attention"], {"a": {"b": 1}}, {"rope_type": "evil"},
]  # fmt: skip
OTHER_FIELDS = [
    "_attn_implementation", "alibi", "attn_implementation", "auto_map", "dtype", "hidden_act", "is_encoder_decoder",
    "kv_lora_rank", "layer_types", "num_kv_shared_layers", "pad_token_id", "partial_rotary_factor", "quantization",
    "quantization_config", "rope_parameters", "rope_scaling", "sliding_window", "torch_dtype",
]  # fmt: skip


def outcome(folder: Path) -> str:
    """Why the model of ``folder`` is refused; nothing for one that an engine is made of."""
    try:
        loaded = load_model(str(folder), device="cpu", attn_implementation=ATTENTION_NAME)
        assemble(loaded, EngineConfig(cache_bytes=1 << 22, block_size=16, prefill_chunk=32))
    except EmberError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("odd")


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_edges_of_every_field(arch: str, data: st.DataObject, checkpoint: CheckpointFactory, odd: Path) -> None:
    folder = Path(shutil.copytree(checkpoint(arch), odd / arch, dirs_exist_ok=True))
    config = json.loads((checkpoint(arch) / "config.json").read_text())
    fields = st.sampled_from(sorted({*config, *OTHER_FIELDS} - {"model_type"}))
    config |= data.draw(st.dictionaries(fields, st.sampled_from(EDGES), min_size=1, max_size=2))
    (folder / "config.json").write_text(json.dumps(config))
    message = outcome(folder)
    assert len(message) < 700
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"num_attention_heads": 0}, CorruptModelError, "config.json"),
        ({"head_dim": -1}, CorruptModelError, "describes no llama model that can be built"),
        ({"hidden_act": "evil"}, CorruptModelError, "KeyError: 'evil'"),
        ({"num_hidden_layers": 10**9}, CorruptModelError, "gives 1000000000 layers; at most 1000 are built"),
        (
            {"model_type": "qwen2", "num_hidden_layers": 10**9},
            CorruptModelError,
            "gives 1000000000 layers; at most 1000",
        ),
        ({"vocab_size": 500}, CorruptModelError, r"lm_head.weight is stored as \[384, 64\], and the .* it \[500, 64\]"),
        ({"max_position_embeddings": -5}, CorruptModelError, "a context of -5 tokens; it must be from 1 to"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, UnsupportedModelError, "bitsandbytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], kind: type[EmberError], message: str, copied: Path) -> None:
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(kind, match=message):
        load_model(str(copied))


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_an_attention_that_the_config_asks_for_is_not_looked_for(field: str, copied: Path) -> None:
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: "org/repo"}))
    assert load_model(str(copied)).geometry.num_layers == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xef\xbb\xbf{}", "begins with a byte-order mark; save it as UTF-8 without one"),
        (b"[" * 100_000, "is not valid JSON: "),
        (b"\xff\xfe{}", "is not valid JSON: "),
        (b"[]", "holds a JSON list; it must be an object"),
    ],
    ids=["mark", "deep", "no utf-8", "list"],
)
def test_a_config_that_is_no_object(content: bytes, message: str, copied: Path) -> None:
    (copied / "config.json").write_bytes(content)
    with pytest.raises(CorruptModelError, match=f"config.json {message}"):
        load_model(str(copied))


@pytest.mark.parametrize("ends", ["x", -1, [0, "x"], [[]], 1.5])
def test_ends_that_are_no_token_ids(ends: object, copied: Path) -> None:
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(CorruptModelError, match=r"eos_token_id|generation_config"):
        load_model(str(copied))
