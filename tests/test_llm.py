"""The in-process engine: the answers of the plain model, counted hits, and nothing left running."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from emberkv import LLM, Constraint, SamplingParams
from emberkv.core.explaining.explanation import MissReason
from emberkv.core.sequence import FinishReason
from emberkv.errors import ConfigError, EngineStoppedError, ModelNotFoundError, PromptTooLongError, RequestError
from tests.conftest import CheckpointFactory
from tests.machine import MACHINE_CACHE
from tests.waiting import eventually

TEXT = "The library opens at nine and closes when the last reader has gone home. " * 3
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
CHAT = [{"role": "system", "content": TEXT}, {"role": "user", "content": "When does it open?"}]


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointFactory) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, dtype="float32", cache_ram="4MiB", machine_cache=MACHINE_CACHE) as opened:
        yield opened


def test_generates_what_the_plain_model_generates(llm: LLM, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = llm.encode(TEXT)
    expected = model.generate(torch.tensor([tokens]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    completion = llm.generate(TEXT, GREEDY)
    assert completion.token_ids == tuple(expected[0, len(tokens) :].tolist())
    assert completion.text == llm.decode(completion.token_ids)
    assert completion.finish_reason is FinishReason.LENGTH


def test_a_repeated_prompt_is_a_hit_but_for_its_last_token(llm: LLM) -> None:
    prompt = "A river carries what the rain gives it. " * 5
    cold, warm = llm.generate(prompt, GREEDY), llm.generate(prompt, GREEDY)
    count = len(llm.encode(prompt))
    assert (cold.usage.cached_tokens, warm.usage.cached_tokens) == (0, count - 1)
    assert warm.text == cold.text


def test_token_ids_and_a_rendered_chat_are_prompts_too(llm: LLM, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert llm.encode(CHAT) == rendered
    assert llm.encode(rendered) == rendered
    assert llm.generate(rendered, GREEDY).text == llm.generate(CHAT, GREEDY).text


def test_an_answer_follows_its_constraint(llm: LLM) -> None:
    lamps = Constraint(
        "json_schema", '{"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 2}'
    )
    completion = llm.generate(CHAT, SamplingParams(max_tokens=200, seed=3, constraint=lamps))
    assert completion.finish_reason is FinishReason.STOP
    assert set(json.loads(completion.text)) <= {"red", "green"}
    with pytest.raises(RequestError, match="unclosed group"):
        llm.generate(CHAT, SamplingParams(constraint=Constraint("regex", "(a")))
    with pytest.raises(RequestError, match="unknown special token"):
        llm.generate(CHAT, SamplingParams(constraint=Constraint("lark", "start: <|nothing|>")))


def test_a_batch_answers_each_prompt_as_alone_and_in_order(llm: LLM) -> None:
    prompts = [f"{number}: {TEXT}" for number in range(5)]
    together = llm.generate_batch(prompts, GREEDY)
    assert [each.text for each in together] == [llm.generate(prompt, GREEDY).text for prompt in prompts]


def test_a_stream_gives_the_answer_piece_by_piece(llm: LLM) -> None:
    with llm.stream(TEXT, GREEDY) as stream:
        first = next(iter(stream))
        assert stream.usage.prompt_tokens == len(llm.encode(TEXT))
        with pytest.raises(RequestError, match="not complete"):
            _ = stream.completion
        rest = list(stream)
    assert len(rest) > 1
    assert "".join([first, *rest]) == stream.completion.text == llm.generate(TEXT, GREEDY).text


def test_a_stop_string_ends_the_answer_and_is_not_in_it(llm: LLM) -> None:
    whole = llm.generate(TEXT, GREEDY).text
    stop = whole[len(whole) // 2 :][:3]
    completion = llm.generate(TEXT, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, stop=(stop,)))
    assert (completion.text, completion.stop_sequence) == (whole[: whole.index(stop)], stop)
    assert completion.finish_reason is FinishReason.STOP


def test_leaving_a_stream_early_gives_its_blocks_back(llm: LLM) -> None:
    with llm.stream(TEXT, SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True)) as stream:
        next(iter(stream))
    with pytest.raises(EngineStoppedError, match="aborted"):
        list(stream)
    eventually(lambda: llm.stats().free_blocks == llm.stats().total_blocks)


def test_logprobs_come_one_for_each_token(llm: LLM) -> None:
    completion = llm.generate(TEXT, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, logprobs=2))
    assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in completion.logprobs)


def test_explain_says_what_would_hit_and_where_it_diverges(llm: LLM) -> None:
    llm.generate(TEXT, GREEDY)
    changed = TEXT.replace("gone home. The library opens at nine", "gone home. The library opens at four", 1)
    explanation = llm.explain(changed)
    shared = next(i for i, (a, b) in enumerate(zip(llm.encode(TEXT), llm.encode(changed), strict=False)) if a != b)
    assert explanation.divergence is not None
    assert explanation.divergence.position == shared
    assert explanation.misses[0].reason is MissReason.DIVERGED
    assert explanation.hit_tokens + sum(miss.tokens for miss in explanation.misses) == len(llm.encode(changed))


def test_a_folder_keeps_blocks_for_the_next_process(folder: Path, tmp_path: Path) -> None:
    settings = {"dtype": "float32", "cache_ram": "4MiB", "cache_dir": tmp_path, "machine_cache": MACHINE_CACHE}
    with LLM(folder, **settings) as first:
        text = first.generate(TEXT, GREEDY).text
        full_blocks = len(first.encode(TEXT)) // 16 * 16
    with LLM(folder, **settings) as second:
        completion = second.generate(TEXT, GREEDY)
        assert completion.usage.tokens_by_tier["disk"] == full_blocks
        assert completion.text == text


def test_what_cannot_be_served_is_refused_in_words(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(PromptTooLongError):
        llm.generate([1] * 5000, GREEDY)
    with pytest.raises(RequestError, match="vocabulary"):
        llm.generate([10**6], GREEDY)
    with pytest.raises(RequestError, match="list of int, str"):
        llm.generate([1, "two"], GREEDY)  # type: ignore[list-item]
    with pytest.raises(RequestError, match="empty"):
        llm.generate("", GREEDY)
    with pytest.raises(ModelNotFoundError):
        LLM(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="lots"):
        LLM(cache_ram="lots")


def test_after_close_nothing_is_generated(folder: Path) -> None:
    llm = LLM(folder, dtype="float32", cache_ram="4MiB", machine_cache=MACHINE_CACHE)
    llm.close()
    llm.close()
    with pytest.raises(EngineStoppedError):
        llm.generate(TEXT, GREEDY)
