"""GGUF files: config, tokenizer and tensors of each architecture, and what is refused of them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.decoders import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from emberkv.engine.torch.model.gguf_file import GGUFSource
from emberkv.engine.torch.model.loader import DTypeName, load_model, load_tokenizer
from emberkv.errors import CorruptModelError, UnsupportedModelError
from tests.architectures import ALSO_SUPPORTED, SUPPORTED
from tests.gguf_models import dequantised, write_gguf
from tests.models import CHAT_TEMPLATE, EOS, TURN_END, USER_START, save_tokenizer

ENDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
TOKENS = torch.arange(3, 83)[None]
UNSAID: dict[str, dict[str, Any]] = {
    "qwen3": {"use_sliding_window": False, "sliding_window": None, "layer_types": None},
    "qwen3_moe": {"mlp_only_layers": []},
}
LLAMA3 = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
                              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}  # fmt: skip


def checkpoint(arch: str, folder: Path, **settings: Any) -> Path:
    """A tiny random model in float32, of settings that a GGUF file can say."""
    tied = {"tie_word_embeddings": True} if arch == "gemma2" else {}
    own = {**(SUPPORTED | ALSO_SUPPORTED)[arch], **tied, **UNSAID.get(arch, {}), **settings, **ENDS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **own))
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or name.endswith(("bias", "sinks")):
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@torch.inference_mode()
def logits(path: Path, dtype: DTypeName = "auto") -> torch.Tensor:
    model = load_model(str(path), device="cpu", dtype=dtype).model
    found: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found


READ = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")


@pytest.mark.parametrize("arch", READ)
def test_a_file_gives_the_model_that_it_was_written_from(tmp_path: Path, arch: str) -> None:
    settings = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "num_hidden_layers": 6}
    folder = checkpoint(arch, tmp_path / "plain", **(settings if arch == "gemma3_text" else {}))
    path = write_gguf(folder, tmp_path / "model.gguf")
    torch.testing.assert_close(logits(path), logits(folder), rtol=1e-4, atol=1e-4)


def test_tokenizer_template_and_ends_are_the_files(tmp_path: Path) -> None:
    path = write_gguf(checkpoint("llama", tmp_path / "plain"), tmp_path / "small-one.gguf")
    loaded, plain = load_model(str(path), device="cpu"), load_tokenizer(str(tmp_path / "plain"))
    text = plain.render_chat([{"role": "user", "content": "Which lamps are lit?"}])
    assert loaded.tokenizer.render_chat([{"role": "user", "content": "Which lamps are lit?"}]) == text
    assert loaded.tokenizer.encode(text, add_special_tokens=False) == plain.encode(text, add_special_tokens=False)
    assert load_tokenizer(str(path)).encode(text, add_special_tokens=False) == plain.encode(
        text, add_special_tokens=False
    )
    assert (loaded.name, loaded.eos_token_ids) == ("small-one", {2})
    assert loaded.context_length == 4096


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "She'd counted 1234567 lamps, hadn't she?\n\n  def area(x):\n\treturn x*2   ",
    '<|im_start|>user\nDON\'T <tool_call>{"a": [1, 22, 333]}</tool_call><|im_end|>\n',
    "Straße, caf\u00e9 and cafe\u0301; 東京は2024年。🙂 e\u0301\n \r\n x",
)


@pytest.mark.parametrize(
    ("pre", "split", "normalizer"),
    [
        ("qwen2", LLAMA3_SPLIT.replace("{1,3}", ""), normalizers.NFC()),
        ("llama-bpe", LLAMA3_SPLIT, None),
    ],
)
def test_tokens_are_those_of_the_models_own_tokenizer(
    tmp_path: Path, pre: str, split: str, normalizer: normalizers.Normalizer | None
) -> None:
    """Merges reach over the borders of words, so that another way to split gives other tokens."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), ByteLevel()
    special = [EOS, USER_START, TURN_END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=382, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    own.train_from_iterator([*TEXTS, *TEXTS], trainer)
    own.add_tokens([AddedToken(name, normalized=False) for name in ("<tool_call>", "</tool_call>")])
    words = pre_tokenizers.Split(Regex(split), behavior="isolated")
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if normalizer is not None:
        own.normalizer = normalizer
    folder = checkpoint("qwen2", tmp_path / "plain")
    ours = PreTrainedTokenizerFast(tokenizer_object=own, bos_token=EOS, eos_token=TURN_END)
    ours.chat_template = CHAT_TEMPLATE
    ours.save_pretrained(folder)
    file = write_gguf(folder, tmp_path / "model.gguf", changed={"tokenizer.ggml.pre": pre})
    read = load_tokenizer(str(file))
    for text in TEXTS:
        expected = ours.encode(text, add_special_tokens=False)
        assert list(read.encode(text, add_special_tokens=False)) == expected


def test_the_fingerprint_is_the_files_content(tmp_path: Path) -> None:
    folder = checkpoint("qwen2", tmp_path / "plain")
    first = write_gguf(folder, tmp_path / "model.gguf")
    (tmp_path / "elsewhere").mkdir()
    same = write_gguf(folder, tmp_path / "elsewhere" / "model.gguf")
    other = write_gguf(folder, tmp_path / "elsewhere" / "other.gguf", lambda _: Kind.Q8_0)
    found = [load_model(str(path), device="cpu").fingerprint for path in (first, same, other)]
    assert found[0] == found[1] != found[2]


def test_llama_3_frequencies_are_the_files_factors(tmp_path: Path) -> None:
    folder = checkpoint("llama", tmp_path / "plain", **LLAMA3)
    scaled = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    usual = 1.0 / 10_000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = (usual / scaled).numpy().astype(np.float32)
    assert factors.max() > 1.5  # otherwise the test shows nothing
    path = write_gguf(folder, tmp_path / "model.gguf", tensors={"rope_freqs.weight": factors})
    loaded = load_model(str(path), device="cpu")
    assert loaded.context_length == 4096
    torch.testing.assert_close(logits(path), logits(folder), rtol=1e-4, atol=1e-4)


def test_yarn_is_the_metadatas(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
    folder = checkpoint("qwen2", tmp_path / "plain", rope_parameters=yarn)
    path = write_gguf(
        folder, tmp_path / "model.gguf", rope_scaling_type=gguf.RopeScalingType.YARN, rope_scaling_factor=4.0,
        rope_scaling_orig_ctx_len=1024,
    )  # fmt: skip
    torch.testing.assert_close(logits(path), logits(folder), rtol=1e-4, atol=1e-4)


def test_yarn_of_gpt_oss_is_the_models_own(tmp_path: Path) -> None:
    """Its bounds are not rounded to whole dimensions, of which the metadata do not speak."""
    yarn = {"rope_type": "yarn", "rope_theta": 150_000.0, "factor": 8.0, "beta_fast": 24.0, "beta_slow": 2.0,
            "truncate": False, "original_max_position_embeddings": 512}  # fmt: skip
    folder = checkpoint("gpt_oss", tmp_path / "plain", rope_parameters=yarn)
    config = GGUFSource(write_gguf(folder, tmp_path / "model.gguf")).config
    assert config.rope_parameters == yarn
    assert (config.layer_types, config.sliding_window) == (["sliding_attention", "full_attention"], 40)


def test_what_is_not_understood_is_refused_by_name(tmp_path: Path) -> None:
    folder = checkpoint("qwen2", tmp_path / "plain")

    def refused(message: str, **extra: Any) -> None:
        path = write_gguf(folder, tmp_path / "model.gguf", **extra)
        with pytest.raises(UnsupportedModelError, match=message):
            load_model(str(path), device="cpu")

    refused(r"qwen2\.logit_scale, which is not understood; .* --quantize int8", logit_scale=0.5)
    refused("no place for its tensor blk.0.strange.weight", tensors={"blk.0.strange.weight": np.zeros(4, np.float32)})
    refused("it has a sliding window, which is not known of qwen2", sliding_window=32)
    refused("its RoPE is scaled by 'longrope'", rope_scaling_type=gguf.RopeScalingType.LONGROPE)
    refused("8 of a head's 16 values are rotated", rope_dimension_count=8)


def test_other_architectures_types_and_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mamba.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="its architecture is mamba; from GGUF files llama, qwen2"):
        load_model(str(path))
    folder = checkpoint("qwen2", tmp_path / "plain", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    ternary = write_gguf(folder, tmp_path / "ternary.gguf", lambda name: Kind.TQ1_0 if "ffn" in name else Kind.F32)
    with pytest.raises(UnsupportedModelError, match=r"ffn_\w+.weight is in TQ1_0; .*such as a file in Q8_0 or Q4_K_M"):
        load_model(str(ternary))
    whole = write_gguf(folder, tmp_path / "cut.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptModelError, match="is no whole GGUF file"):
        load_model(str(tmp_path / "cut.gguf"))


def test_a_folder_with_gguf_files_alone_names_one(tmp_path: Path) -> None:
    folder = checkpoint("qwen2", tmp_path / "plain")
    write_gguf(folder, folder / "small.gguf")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=r"or the GGUF file itself: .*plain/small.gguf"):
        load_model(str(folder))


def test_the_tokenizer_is_the_files_whatever_lies_beside_it(tmp_path: Path) -> None:
    path = write_gguf(checkpoint("qwen2", tmp_path / "plain"), tmp_path / "model.gguf")
    own = load_tokenizer(str(path)).encode("Which lamps are lit?", add_special_tokens=False)
    other = json.loads((tmp_path / "plain" / "tokenizer.json").read_text())
    other["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<other>", "chat_template": "other"}))
    assert load_tokenizer(str(path)).encode("Which lamps are lit?", add_special_tokens=False) == own


def test_the_name_of_a_file_is_not_in_its_fingerprint(tmp_path: Path) -> None:
    path = write_gguf(checkpoint("qwen2", tmp_path / "plain"), tmp_path / "model.gguf")
    first = GGUFSource(path).fingerprint()
    assert GGUFSource(path.rename(tmp_path / "renamed.gguf")).fingerprint() == first


def test_a_file_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = write_gguf(checkpoint("qwen2", tmp_path / "plain"), tmp_path / "model.gguf")
    whole, kinds = path.read_bytes(), b"tokenizer.ggml.token_type"
    start = whole.index(kinds) + len(kinds) + 8  # after the types of the value and of its elements
    path.write_bytes(whole[:start] + (10**15).to_bytes(8, "little") + whole[start + 8 :])
    with pytest.raises(CorruptModelError, match=r"it ends at byte .*, before what it says that it holds"):
        GGUFSource(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("split.count", "many", "no whole number as split.count"),
        ("qwen2.block_count", 2**30, "gives 1073741824 layers; 1 to 1000 are built"),
        ("qwen2.attention.head_count_kv", "two", "no usable metadata of a qwen2 model: .*num_key_value_heads"),
        ("qwen2.attention.layer_norm_rms_epsilon", None, "no usable metadata of a qwen2 model: .*rms_epsilon"),
        ("qwen2.attention.causal", False, "its attention is not causal"),
        ("qwen2.rope.scaling.yarn_log_multiplier", 0.1, "yarn_log_multiplier, which is not understood with yarn"),
        ("tokenizer.ggml.pre", "strange", "splits text as 'strange' does, which is not known; .* --quantize int8"),
    ],
)
def test_odd_metadata_are_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    folder = checkpoint("qwen2", tmp_path / "plain")
    yarn: dict[str, Any] = {
        "rope_scaling_type": gguf.RopeScalingType.YARN,
        "rope_scaling_factor": 4.0,
        "rope_scaling_orig_ctx_len": 64,
    }
    path = write_gguf(folder, tmp_path / "model.gguf", changed={key: value}, **yarn)
    with pytest.raises((CorruptModelError, UnsupportedModelError), match=message):
        load_tokenizer(str(path))


@pytest.mark.parametrize(
    ("arch", "changed", "message"),
    [
        ("qwen2", {"qwen2.expert_count": 4}, "it has 4 experts, which are not known of qwen2; .* --quantize int8"),
        ("qwen3_moe", {"qwen3moe.expert_gating_func": 2}, "otherwise than by a softmax"),
        ("mixtral", {"llama.expert_weights_norm": False}, "otherwise than by a softmax"),
        ("qwen3_moe", {"qwen3moe.expert_count": None}, "model: qwen3moe.expert_count is None; a positive"),
        ("qwen2_moe", {"qwen2moe.expert_weights_norm": True}, "otherwise than by a softmax over all of them"),
        ("gpt_oss", {"gpt-oss.expert_count": None}, "no usable metadata of a gpt-oss model: .*expert_count"),
        ("gpt_oss", {"gpt-oss.attention.sliding_window": None}, "of a gpt-oss model: .*attention.sliding_window"),
        ("gpt_oss", {"gpt-oss.rope.freq_base_swa": 1e4}, "layers with a sliding window have a RoPE of their own"),
        ("qwen3_moe", {"qwen3moe.expert_count": 0}, "qwen3moe.expert_count is 0; a positive whole number would work"),
        ("mixtral", {"llama.expert_count": -3}, "llama.expert_count is -3; a positive whole number would work"),
        ("mixtral", {"llama.expert_used_count": 0}, "llama.expert_used_count is 0; 1 to 6, of so many experts, would"),
        ("mixtral", {"llama.expert_used_count": 7}, "llama.expert_used_count is 7; 1 to 6"),
        ("qwen3_moe", {"qwen3moe.expert_used_count": -1}, "qwen3moe.expert_used_count is -1; 1 to 6"),
    ],
)
def test_experts_that_are_not_understood_are_refused(
    tmp_path: Path, arch: str, changed: dict[str, Any], message: str
) -> None:
    path = write_gguf(checkpoint(arch, tmp_path / "plain"), tmp_path / "model.gguf", changed=changed)
    with pytest.raises((CorruptModelError, UnsupportedModelError), match=message):
        GGUFSource(path)


def test_a_gate_and_its_pair_in_other_bits_are_held_in_8(tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", tmp_path / "plain")
    path = write_gguf(folder, tmp_path / "model.gguf", lambda name: Kind.Q4_0 if "gate_exps" in name else Kind.Q8_0)
    plain = dequantised(folder, path, tmp_path / "dequantised")
    torch.testing.assert_close(logits(path, "float32"), logits(plain), rtol=1e-4, atol=1e-4)


def test_which_layers_slide_is_the_metadatas(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention", "full_attention"]
    folder = checkpoint("gemma3_text", tmp_path / "plain", layer_types=types)
    pattern = {"gemma3.attention.sliding_window_pattern": [True, False, False]}
    path = write_gguf(folder, tmp_path / "model.gguf", changed=pattern)
    assert GGUFSource(path).config.layer_types == types


def test_a_token_that_ends_a_turn_ends_an_answer_where_the_metadata_name_another(tmp_path: Path) -> None:
    folder = checkpoint("qwen2", tmp_path / "plain")
    text, turn = load_tokenizer(str(folder)).encode("<|endoftext|><|im_end|>", add_special_tokens=False)
    path = write_gguf(folder, tmp_path / "model.gguf", changed={"tokenizer.ggml.eos_token_id": text})
    assert load_model(str(path), device="cpu").eos_token_ids == {text, turn}


def test_an_answer_in_harmony_does_not_end_with_its_first_message(tmp_path: Path) -> None:
    """In other vocabularies, as Phi-3's, the same token ends an answer."""
    path = write_gguf(checkpoint("gpt_oss", tmp_path / "plain"), tmp_path / "model.gguf")
    tokens: list[str] = gguf.GGUFReader(path).get_field("tokenizer.ggml.tokens").contents()
    assert tokens[0] == "<|endoftext|>"

    def ends(*texts: str) -> object:
        changed = {"tokenizer.ggml.tokens": [tokens[0], *texts, *tokens[1 + len(texts) :]]}
        return GGUFSource(write_gguf(tmp_path / "plain", tmp_path / "other.gguf", changed=changed)).named_ends()[-1]

    assert ends("<|end|>", "<|return|>", "<|call|>") == [0, 2, 3]
    assert ends("<|end|>", "<|return|>") == [1]


def test_an_answer_ends_at_all_ends_of_a_list_in_the_metadata(tmp_path: Path) -> None:
    path = write_gguf(
        checkpoint("llama", tmp_path / "plain"),
        tmp_path / "model.gguf",
        changed={"tokenizer.ggml.eos_token_ids": [2, 7, 9], "tokenizer.ggml.add_padding_token": False},
    )
    assert load_model(str(path), device="cpu").eos_token_ids == {2, 7, 9}


def test_an_end_that_is_no_token_is_left_out(tmp_path: Path) -> None:
    changed: dict[str, Any] = {
        "tokenizer.ggml.eos_token_id": 2**31 - 1,
        "tokenizer.ggml.eos_token_ids": [2, 10**6],
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.bos_token_id": 2**31 - 1,
    }
    path = write_gguf(checkpoint("llama", tmp_path / "plain"), tmp_path / "model.gguf", changed=changed)
    assert load_model(str(path), device="cpu").eos_token_ids == {0, 2}
    config = GGUFSource(path).config
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
