"""What ``warmup_kv_cache`` stores is what the server computes, under the names that the server uses."""

import asyncio
import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from emberkv import InMemoryKVCacheManager, get_standard_system_prompt, warmup_kv_cache
from emberkv.core.hashing import TokenChain
from emberkv.core.sequence import FinishReason
from emberkv.defaults import DEFAULT_PREFILL_CHUNK
from emberkv.engine.assembly import AssembledEngine, EngineConfig
from emberkv.engine.request import GenerationRequest, SamplingParams
from emberkv.engine.torch.assembly import assemble
from emberkv.engine.torch.attention.paged_attention import ATTENTION_NAME
from emberkv.engine.torch.model.loader import load_model
from emberkv.engine.torch.native.kernels import find_kernels
from emberkv.engine.torch.warm_blocks import store_prefix
from emberkv.tiers.codec import verified_record
from tests.conftest import CheckpointFactory
from tests.engine.loop_harness import Inbox
from tests.machine import MACHINE_CACHE
from tests.waiting import DEADLINE, eventually

BLOCK = 16


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model


@pytest.fixture
def llama(checkpoint: CheckpointFactory) -> PreTrainedModel:
    return loaded(checkpoint("llama"))


def warmed(model: Any, tokenizer: Any, **arguments: Any) -> tuple[bool, dict[str, bytes]]:
    """The answer, and what was stored, in order."""
    store = Recorder()
    done = asyncio.run(warmup_kv_cache(model, tokenizer, store, **{"timeout_sec": 600, **arguments}))
    return done, store.entries


class Recorder:
    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}
        self.prefix_tokens: list[int | None] = []

    def set(self, key: str, value: bytes, prefix_tokens: int | None = None) -> None:
        self.entries[key] = value
        self.prefix_tokens.append(prefix_tokens)


def serve(folder: Path, dtype: str) -> tuple[AssembledEngine, TokenChain]:
    """A server's engine that has answered a request with the standard system prompt, and that request's chain."""
    model = load_model(str(folder), dtype=dtype, device="cpu", attn_implementation=ATTENTION_NAME)  # type: ignore[arg-type]  # a name, as text
    config = EngineConfig(cache_bytes=4 << 20, block_size=BLOCK, prefill_chunk=DEFAULT_PREFILL_CHUNK)
    engine = assemble(model, config, kernels=find_kernels("auto", model, BLOCK, MACHINE_CACHE))
    conversation = [
        {"role": "system", "content": get_standard_system_prompt()},
        {"role": "user", "content": "How many lamps?"},
    ]
    tokens = model.tokenizer.encode(model.tokenizer.render_chat(conversation), add_special_tokens=False)
    inbox = Inbox()
    engine.loop.start()
    engine.loop.submit(GenerationRequest("real", tokens, SamplingParams(max_tokens=1)), inbox)
    reason = inbox.reason
    engine.loop.stop()
    assert reason in (FinishReason.LENGTH, FinishReason.STOP)  # a random model's first token may be its last
    return engine, TokenChain(engine.root, tokens, BLOCK)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "gpt2"])
def test_blocks_are_the_servers_to_the_last_bit(
    arch: str, dtype: str, checkpoint: CheckpointFactory, fast_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = checkpoint(arch)
    done, entries = warmed(loaded(folder, getattr(torch, dtype)), fast_tokenizer)
    assert done
    engine, chain = serve(folder, dtype)
    assert len(entries) >= 12
    assert list(entries) == [block_hash.hex() for block_hash in chain.block_hashes[: len(entries)]]
    whole = engine.scheduler.cache.whole(len(entries))
    for position, value in enumerate(entries.values()):
        record = verified_record(
            value, namespace=engine.namespace, block_hash=chain.block_hashes[position], exact=position < whole
        )
        assert (record.position, record.tokens) == (position, chain.block_tokens(position))
        assert record.exact == (position < whole)
        block = engine.scheduler.cache.pool.lookup(record.block_hash)
        assert block is not None
        if record.exact:
            assert block.exact
            assert record.payload == engine.executor.pool.read(block.block_id)


def test_into_the_cache_with_the_tokens_up_to_each_block(
    llama: PreTrainedModel, fast_tokenizer: PreTrainedTokenizerFast
) -> None:
    cache = InMemoryKVCacheManager(max_memory_mb=100)
    assert asyncio.run(warmup_kv_cache(llama, fast_tokenizer, cache, timeout_sec=600))
    _, entries = warmed(llama, fast_tokenizer)
    assert cache.get_stats()["total_entries"] == len(entries)
    for position, (key, value) in enumerate(entries.items()):
        metadata = cache.get_metadata(key)
        assert metadata is not None
        assert metadata["prefix_tokens"] == (position + 1) * BLOCK
        assert cache.get(key) == value


def test_the_model_and_the_tokenizer_stay_as_they_are(
    checkpoint: CheckpointFactory, fast_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, tokenizer = loaded(checkpoint("qwen2")).train(), copy.deepcopy(fast_tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    modules, config = [type(each) for each in model.modules()], model.config.to_dict()
    state = {name: (id(tensor), tensor.data_ptr(), tensor.clone()) for name, tensor in model.named_parameters()}
    before = model(tokens).logits
    assert warmed(model, tokenizer)[0]
    assert [type(each) for each in model.modules()] == modules
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.named_parameters():
        assert state[name][:2] == (id(tensor), tensor.data_ptr())
        assert torch.equal(state[name][2], tensor)
    assert torch.equal(model(tokens).logits, before)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 5


def test_equal_prompts_have_equal_keys_and_others_have_others(
    llama: PreTrainedModel, fast_tokenizer: PreTrainedTokenizerFast
) -> None:
    keys = [list(warmed(llama, fast_tokenizer, system_prompt=prompt)[1]) for prompt in ("One. " * 90, "Two. " * 90)]
    again = list(warmed(llama, fast_tokenizer, system_prompt="One. " * 90)[1])
    assert again == keys[0]
    assert keys[0]
    assert set(keys[0]).isdisjoint(keys[1])


def test_a_changed_model_has_keys_of_its_own(llama: PreTrainedModel, fast_tokenizer: PreTrainedTokenizerFast) -> None:
    before = warmed(llama, fast_tokenizer)[1]
    with torch.no_grad():
        next(iter(llama.parameters()))[0, 0] += 1
    after = warmed(llama, fast_tokenizer)[1]
    assert len(after) == len(before)
    assert set(after).isdisjoint(before)


def test_a_tokenizer_without_a_chat_template(llama: PreTrainedModel, fast_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = copy.deepcopy(fast_tokenizer)
    plain.chat_template = None
    done, entries = warmed(llama, plain)
    assert done
    assert len(entries) >= 12


def test_given_up_what_was_done_is_stored(llama: PreTrainedModel, fast_tokenizer: PreTrainedTokenizerFast) -> None:
    """Asked twice while it prepares, before each chunk and before each block, it goes on into the second chunk."""
    whole, part = Recorder(), Recorder()
    blocks = DEFAULT_PREFILL_CHUNK // BLOCK
    answers = iter([True] * (2 + 1 + blocks + 1 + 3))
    prompt = "Where do the lamps stand? " * 40
    assert store_prefix(llama, fast_tokenizer, prompt, whole.set, in_time=lambda: True)
    assert not store_prefix(llama, fast_tokenizer, prompt, part.set, in_time=lambda: next(answers, False))
    assert len(whole.entries) > 2 * blocks
    assert list(part.entries.items()) == list(whole.entries.items())[: blocks + 3]


def test_cancelled_it_stops_after_the_block(llama: PreTrainedModel, fast_tokenizer: PreTrainedTokenizerFast) -> None:
    store = Gate()

    async def cancel() -> None:
        task = asyncio.create_task(warmup_kv_cache(llama, fast_tokenizer, store, system_prompt="Lamps? " * 200))
        await asyncio.to_thread(store.reached.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        store.go_on.set()

    asyncio.run(cancel())
    eventually(lambda: not _is_computing())
    assert len(store.entries) == 1


def test_out_of_time_within_a_step_it_returns_at_once_and_stores_nothing_more(
    llama: PreTrainedModel, fast_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """The first block is not stored before the call has returned, so only a call that does not wait for it returns."""
    store = Gate()
    warming = warmup_kv_cache(llama, fast_tokenizer, store, timeout_sec=0.05, system_prompt="Lamps? " * 200)
    assert asyncio.run(warming) is False
    assert caplog.messages == ["the cache is not warmed in 0.05 s; what was done stays"]
    store.go_on.set()
    eventually(lambda: not _is_computing())
    assert len(store.entries) <= 1


def _is_computing() -> bool:
    return any(thread.name == "emberkv-warmup" for thread in threading.enumerate())


class Gate(Recorder):
    """Blocks the thread that stores the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go_on = threading.Event(), threading.Event()

    def set(self, key: str, value: bytes, prefix_tokens: int | None = None) -> None:
        self.reached.set()
        assert self.go_on.wait(DEADLINE)
        super().set(key, value, prefix_tokens)


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("KV_CACHE_WARMUP", "WARMUP_TIMEOUT_SEC", "WARMUP_SYSTEM_FILE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_file_of_the_variable_is_warmed_and_an_argument_goes_first(
    llama: PreTrainedModel,
    fast_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    environ: pytest.MonkeyPatch,
) -> None:
    built_in = warmed(llama, fast_tokenizer)[1]
    path = tmp_path / "prompt.txt"
    path.write_text("Where do the lamps stand? " * 12)
    expected = warmed(llama, fast_tokenizer, system_prompt=path.read_text())[1]
    environ.setenv("WARMUP_SYSTEM_FILE", str(path))
    assert warmed(llama, fast_tokenizer) == (True, expected)
    assert get_standard_system_prompt() == path.read_text()
    environ.setenv("WARMUP_SYSTEM_FILE", str(tmp_path / "missing"))
    assert warmed(llama, fast_tokenizer, system_prompt=path.read_text()) == (True, expected)
    assert warmed(llama, fast_tokenizer) == (True, built_in)


def test_a_variable_switches_it_off_and_an_argument_on(
    llama: PreTrainedModel, fast_tokenizer: PreTrainedTokenizerFast, environ: pytest.MonkeyPatch
) -> None:
    environ.setenv("KV_CACHE_WARMUP", "0")
    assert warmed(llama, fast_tokenizer) == (False, {})
    assert warmed(llama, fast_tokenizer, enabled=True)[0]


def test_the_time_is_the_variables_and_an_argument_goes_first(
    llama: PreTrainedModel,
    fast_tokenizer: PreTrainedTokenizerFast,
    environ: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Gate()
    environ.setenv("WARMUP_TIMEOUT_SEC", "1")
    assert asyncio.run(warmup_kv_cache(llama, fast_tokenizer, store)) is False
    assert caplog.messages == ["the cache is not warmed in 1 s; what was done stays"]
    assert asyncio.run(warmup_kv_cache(llama, fast_tokenizer, store, timeout_sec=0.02)) is False
    assert caplog.messages[1:] == ["the cache is not warmed in 0.02 s; what was done stays"]
    store.go_on.set()


def test_a_prompt_without_a_full_block_is_not_called_warm(
    llama: PreTrainedModel, fast_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    plain = copy.deepcopy(fast_tokenizer)
    plain.chat_template = None
    assert warmed(llama, plain, system_prompt="Hi.") == (False, {})
    assert "fewer than a block of 16" in caplog.text


class Failing:
    def __getattr__(self, name: str) -> object:
        raise RuntimeError(f"no {name} today")


@pytest.mark.parametrize("part", ["model", "tokenizer", "cache_manager"])
@pytest.mark.parametrize("given", [None, Failing(), object(), ""], ids=["none", "failing", "object", "text"])
def test_something_is_missing_or_fails(
    part: str,
    given: object,
    llama: PreTrainedModel,
    fast_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = InMemoryKVCacheManager(max_memory_mb=100)
    arguments = {"model": llama, "tokenizer": fast_tokenizer, "cache_manager": cache, part: given}
    assert asyncio.run(warmup_kv_cache(**arguments)) is False
    assert cache.get_stats()["total_entries"] == 0
    assert len(caplog.messages) == 1
    if given is None:
        assert caplog.messages == [f"nothing is warmed: {part} is missing"]


def test_a_cache_that_is_too_small(llama: PreTrainedModel, fast_tokenizer: PreTrainedTokenizerFast) -> None:
    cache = InMemoryKVCacheManager(max_memory_mb=0.001)
    assert asyncio.run(warmup_kv_cache(llama, fast_tokenizer, cache)) is False


def test_a_model_that_cannot_be_served(
    checkpoint: CheckpointFactory, fast_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    assert warmed(loaded(checkpoint("mamba")), fast_tokenizer) == (False, {})
    assert "mamba cannot be served" in caplog.text


def test_a_model_with_hooks(
    llama: PreTrainedModel, fast_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    llama.model.layers[0].register_forward_hook(lambda *_: None)
    assert warmed(llama, fast_tokenizer) == (False, {})
    assert "model.layers.0 has hooks" in caplog.text


def test_a_prompt_longer_than_the_context(
    llama: PreTrainedModel, fast_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    assert warmed(llama, fast_tokenizer, system_prompt="zq" * 3000) == (False, {})
    assert "the model's context holds 4096" in caplog.text


@pytest.mark.parametrize(
    "arguments", [{"enabled": False}, {"timeout_sec": 0.0}, {"timeout_sec": float("nan")}], ids=str
)
def test_disabled_or_without_time_nothing_is_done(
    arguments: dict[str, Any], llama: PreTrainedModel, fast_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert warmed(llama, fast_tokenizer, **arguments) == (False, {})
