"""What every executor promises: the tiny one in NumPy, and PyTorch's with and without the kernels, with int8 KV, and
over a model with convolutions.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from emberkv.core.hashing import root_hash
from emberkv.core.sequence import FinishReason
from emberkv.engine.assembly import EngineConfig, assemble_around
from emberkv.engine.executor import NOT_NUMBERS, Executor
from emberkv.engine.loop import EngineLoop
from emberkv.engine.request import AllowedTokens, GenerationRequest, ModelLimits, SamplingParams, TokenLogprobs
from emberkv.engine.tier_link import TierLink
from emberkv.engine.torch.engine import TorchEngine
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.errors import ConfigError, RequestError
from emberkv.tiers.kinds import TierConfig, TierSpec
from tests.engine.conftest import ModelFactory
from tests.engine.loop_harness import Inbox
from tests.engine.tiny_executor import TinyExecutor
from tests.models import CONTEXT, VOCAB_SIZE
from tests.waiting import DEADLINE

BLOCK = 8
CHUNK = 32
NUM_BLOCKS = 40
NAN_TOKEN = 7
"""Logits after it are not numbers; no other prompt here has it."""


@pytest.fixture(scope="module", params=["tiny", "torch", "native", "native int8", "native convolutions"])
def executor(request: pytest.FixtureRequest, paged: ModelFactory, kernels: Kernels) -> Executor:
    """One for all tests of the module: each has a cache of its own over what the ones before left in the pool."""
    if request.param == "tiny":
        return TinyExecutor(num_blocks=NUM_BLOCKS, block_size=BLOCK, vocab=VOCAB_SIZE, nan_token=NAN_TOKEN)
    kind, _, variant = str(request.param).partition(" ")
    loaded = paged("lfm2") if variant == "convolutions" else paged("llama", "float32/int8" if variant else "float32")
    made = TorchEngine(
        loaded,
        cache_bytes=NUM_BLOCKS * loaded.geometry.block_bytes(loaded.dtypes.kv, BLOCK),
        block_size=BLOCK,
        prefill_chunk=CHUNK,
        kernels=kernels if kind == "native" else None,
        tile=2 * BLOCK,
    )

    def spoil(_: object, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.masked_fill((given[0] == NAN_TOKEN)[..., None], math.nan)

    loaded.model.get_submodule("model.embed_tokens").register_forward_hook(spoil)
    return made


@dataclass
class Served:
    """A loop over an executor. Requests share their steps where they are submitted before it starts."""

    loop: EngineLoop
    link: TierLink | None

    def submit(
        self,
        name: str,
        prompt: Sequence[int],
        *,
        new: int = 6,
        logprobs: int | None = 3,
        allowed: AllowedTokens | None = None,
        answered: int = 0,
        **params: object,
    ) -> Inbox:
        inbox = Inbox()
        chosen = {"temperature": 0.0, "ignore_eos": True, **params}
        sampling = SamplingParams(max_tokens=new, logprobs=logprobs, **chosen)  # type: ignore[arg-type]  # fields by name
        request = GenerationRequest(name, list(prompt), sampling, allowed_tokens=allowed, answered=answered)
        self.loop.submit(request, inbox)
        return inbox

    def answers(self, *inboxes: Inbox) -> list[Inbox]:
        """Start, and wait for all."""
        self.loop.start()
        for inbox in inboxes:
            inbox.wait()
        return list(inboxes)

    def ask(self, name: str, prompt: Sequence[int], **params: object) -> Inbox:
        """Of a loop that has started."""
        inbox = self.submit(name, prompt, **params)  # type: ignore[arg-type]  # fields by name
        inbox.wait()
        return inbox


@contextmanager
def serving(
    executor: Executor, *, prefix_cache: bool = True, step_tokens: int = 2 * CHUNK, ram: bool = False
) -> Iterator[Served]:
    config = EngineConfig(
        cache_bytes=0,  # the executor has its pool already
        block_size=BLOCK,
        prefill_chunk=CHUNK,
        max_step_tokens=step_tokens,
        prefix_cache=prefix_cache,
        tiers=TierConfig((TierSpec("ram", 400 * executor.pool.block_bytes),) if ram else ()),
    )
    limits = ModelLimits(CONTEXT, VOCAB_SIZE, frozenset({1}))
    made = assemble_around(executor, config, limits=limits, root=root_hash("model", BLOCK), namespace=bytes(32))
    try:
        yield Served(made.loop, made.link)
    finally:
        made.close(DEADLINE)
        made.scheduler.cache.pool.check_integrity(holders=[])


def alone(executor: Executor, prompt: Sequence[int], **params: object) -> Inbox:
    """A cold run with nothing beside it."""
    with serving(executor, prefix_cache=False) as served:
        (inbox,) = served.answers(served.submit("alone", prompt, **params))  # type: ignore[arg-type]  # fields by name
    return inbox


def text(seed: object, length: int) -> list[int]:
    rng = random.Random(f"{seed}")
    return [rng.randrange(NAN_TOKEN + 1, VOCAB_SIZE) for _ in range(length)]


def scores(inbox: Inbox) -> list[TokenLogprobs]:
    return [each for output in inbox.outputs for each in output.logprobs]


def cached(inbox: Inbox) -> int:
    usage = inbox.outputs[0].usage
    assert usage is not None
    return usage.cached_tokens


def assert_same(executor: Executor, ours: Inbox, theirs: Inbox) -> None:
    """To the last bit; where decode steps depend on what is beside them, as far as the first token."""
    assert theirs.wait().error is None
    compared = None if executor.batch_invariant else 1
    assert ours.tokens[:compared] == theirs.tokens[:compared]
    assert scores(ours)[:compared] == scores(theirs)[:compared]


def test_a_hit_answers_as_a_cold_run(executor: Executor) -> None:
    prompt, other = text("hit", 70), text("other", 30)
    with serving(executor) as served:
        served.answers(served.submit("first", prompt[:64] + other))
        hit = served.ask("second", prompt)
    assert cached(hit) == 64
    assert_same(executor, hit, alone(executor, prompt))


def test_a_hit_within_a_block_copies_it_where_any_cut_is_exact(executor: Executor) -> None:
    prompt, other = text("copied", 40), text("other", 9)
    with serving(executor) as served:
        first, *_ = served.answers(served.submit("first", prompt))
        inside = served.ask("second", prompt[:37] + other)
        again = served.ask("third", prompt)
    within = executor.batch_invariant and executor.hits_within_blocks
    assert cached(inside) == (37 if within else 37 // executor.alignment * executor.alignment)
    assert_same(executor, inside, alone(executor, prompt[:37] + other))
    assert_same(executor, again, first)  # the copy left the block as it was


def test_answers_do_not_depend_on_what_is_computed_beside_them(executor: Executor) -> None:
    prompts = [text(length, length) for length in (1, 9, 16, 33, 50)]
    with serving(executor, step_tokens=48) as served:
        together = served.answers(*(served.submit(f"{len(each)}", each) for each in prompts))
    for inbox, prompt in zip(together, prompts, strict=True):
        assert_same(executor, inbox, alone(executor, prompt))


def test_answers_do_not_depend_on_how_prompts_are_cut(executor: Executor) -> None:
    prompt = text("cut", 90)
    with serving(executor, step_tokens=executor.alignment) as served:
        (cut,) = served.answers(served.submit("cut", prompt))
    assert_same(executor, cut, alone(executor, prompt))


def test_blocks_read_back_from_a_tier_are_as_good_as_computed(executor: Executor) -> None:
    prompt, fillers = text("tier", 100), [text(f"filler {number}", 140) for number in range(3)]
    with serving(executor, ram=True) as served:
        assert served.link is not None
        for _ in range(500):
            served.link.computed(CHUNK, 1000.0)  # computing seems slow, so that loading is chosen
        served.answers(served.submit("first", prompt))
        assert served.link.manager.flush(DEADLINE)
        for number, filler in enumerate(fillers):
            served.ask(f"filler {number}", filler)
        onboarded = served.ask("again", prompt)
        stats = served.loop.stats()
    usage = onboarded.outputs[0].usage
    assert usage is not None
    assert usage.tokens_by_tier == {"ram": usage.cached_tokens}
    assert usage.cached_tokens == 96 // executor.alignment * executor.alignment
    assert (stats.loaded_blocks, dict(stats.transfer_errors)) == (usage.cached_tokens // BLOCK, {})
    assert_same(executor, onboarded, alone(executor, prompt))


def test_blocks_can_be_read_and_written_anywhere(executor: Executor) -> None:
    alone(executor, text("bytes", 3 * BLOCK))
    pool = executor.pool
    first, second = pool.read_blocks([0, 1])
    before = bytes(first)
    assert len(first) == len(second) == pool.block_bytes
    assert before != bytes(second)
    pool.write_block(0, second)
    assert bytes(pool.read_blocks([0])[0]) == bytes(second)
    assert bytes(first) == before, "a copy, which later writes do not change"
    with pytest.raises(ConfigError, match=f"3 bytes for a block; one of this pool has {pool.block_bytes}"):
        pool.write_block(0, b"abc")


def test_answers_depend_on_the_bytes_of_the_blocks_they_read(executor: Executor) -> None:
    prompt = text("wrong block", 40)
    with serving(executor) as served:
        (right,) = served.answers(served.submit("right", prompt))
        contents = executor.pool.read_blocks(range(executor.pool.num_blocks))
        for block_id, content in enumerate(contents[1:] + contents[:1]):
            executor.pool.write_block(block_id, content)
        wrong = served.ask("wrong", prompt)
    assert cached(wrong) >= 32 // executor.alignment * executor.alignment
    assert scores(wrong) != scores(right)


@pytest.mark.parametrize("place", [20, 40], ids=["in the middle", "at the end"])
def test_a_row_that_is_no_numbers_fails_alone(executor: Executor, place: int) -> None:
    """With its prompt scored, or for the next token; and its blocks serve other requests afterwards."""
    bad = text("bad", 40)
    bad[place - 1] = NAN_TOKEN
    good = [text("left", 30), text("right", 45)]
    with serving(executor) as served:
        left = served.submit("left", good[0])
        failing = served.submit("bad", bad, prompt_logprobs=0 if place < len(bad) else None)
        right = served.submit("right", good[1])
        served.answers(left, failing, right)
        afterwards = [served.ask(f"after {number}", text(number, 150)) for number in range(2)]
    assert (failing.reason, failing.wait().error, failing.tokens) == (FinishReason.ERROR, NOT_NUMBERS, [])
    for inbox, prompt in zip((left, right, *afterwards), (*good, text(0, 150), text(1, 150)), strict=True):
        assert_same(executor, inbox, alone(executor, prompt))


def test_a_decoded_row_that_is_no_numbers_fails_alone(executor: Executor) -> None:
    """After one good token: the scores that follow it are no numbers, while a neighbour goes on."""
    only_bad = np.packbits(np.arange(VOCAB_SIZE) == NAN_TOKEN, bitorder="little")
    with serving(executor) as served:
        failing = served.submit("bad", text("decodes", 40), allowed=lambda _: only_bad)
        right = served.submit("right", text("beside", 45))
        served.answers(failing, right)
    assert (failing.reason, failing.wait().error, failing.tokens) == (FinishReason.ERROR, NOT_NUMBERS, [NAN_TOKEN])
    assert_same(executor, right, alone(executor, text("beside", 45)))


def test_logprobs_are_of_the_chosen_token_and_the_likeliest(executor: Executor) -> None:
    inbox = alone(executor, text("logprobs", 20), logprobs=5)
    assert len(scores(inbox)) == len(inbox.tokens) == 6
    for token, score in zip(inbox.tokens, scores(inbox), strict=True):
        values = [value for _, value in score.top]
        assert (score.token_id, score.top[0][0]) == (token, token)  # a greedy choice is the likeliest
        assert score.logprob == pytest.approx(values[0], abs=1e-6)
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) < 1
    assert scores(alone(executor, text("logprobs", 20), logprobs=None)) == []


def test_logprobs_of_a_prompt_are_those_of_the_answer_that_it_was(executor: Executor) -> None:
    prompt = text("scored", 37)
    answer = alone(executor, prompt, new=10)
    scored = alone(executor, [*prompt, *answer.tokens], prompt_logprobs=3).outputs[0].prompt_logprobs
    assert [each.token_id for each in scored] == [*prompt, *answer.tokens]
    assert (scored[0].logprob, scored[0].top) == (None, ())
    for ours, theirs in zip(scored[37:], scores(answer), strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_a_mask_and_a_bias_hold_for_their_own_request(executor: Executor) -> None:
    prompt = text("masked", 25)
    wanted = [11, 13, 11, 12, 13, 12]

    def allowed(answer: Sequence[int]) -> np.ndarray:
        return np.packbits(np.isin(np.arange(VOCAB_SIZE), wanted[len(answer)]), bitorder="little")

    with serving(executor) as served:
        masked = served.submit("masked", prompt, allowed=allowed)
        free = served.submit("free", prompt)
        biased = served.submit("biased", prompt, logit_bias={17: 100.0})
        none = served.submit("none", prompt, allowed=lambda _: np.zeros(1, dtype=np.uint8))
        served.answers(masked, free, biased, none)
    assert masked.tokens == wanted
    assert biased.tokens == [17] * 6
    assert none.wait().error == "the request allows no token next; it must allow at least one"
    assert_same(executor, free, alone(executor, prompt))
    assert scores(masked)[0].top == scores(free)[0].top  # of the logits before any change


def test_penalties_count_the_answer(executor: Executor) -> None:
    inbox = alone(executor, text("penalized", 25), new=30, logprobs=20, frequency_penalty=-1.5, presence_penalty=-0.5)
    changed = 0
    for number, (token, score) in enumerate(zip(inbox.tokens, scores(inbox), strict=True)):
        counts = Counter(inbox.tokens[:number])
        known = {**dict(score.top), token: score.logprob or 0.0}
        penalized = {each: value + 1.5 * counts[each] + 0.5 * (counts[each] > 0) for each, value in known.items()}
        assert token == max(penalized, key=penalized.__getitem__)
        changed += token != score.top[0][0]
    assert changed > 0


def test_a_seed_gives_the_same_answer_whatever_is_beside_it(executor: Executor) -> None:
    prompt = text("seeded", 30)
    seeded = {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "new": 12}
    with serving(executor) as served:
        one = served.submit("one", prompt, seed=5, **seeded)  # type: ignore[arg-type]  # fields by name
        others = [served.submit(f"{seed}", prompt, seed=seed, **seeded) for seed in (6, 7)]  # type: ignore[arg-type]
        served.answers(one, *others)
    assert_same(executor, one, alone(executor, prompt, seed=5, **seeded))
    assert len({tuple(inbox.tokens) for inbox in (one, *others)}) == 3


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 1.3, "seed": -3, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.3},
        {"temperature": 0.7, "seed": 11, "presence_penalty": 1.5, "frequency_penalty": 0.8, "logprobs": 0},
        {"repetition_penalty": 1.5, "presence_penalty": -1.0, "frequency_penalty": 2.0, "logit_bias": {9: 2.5}},
    ],
)
def test_an_answer_that_is_cut_anywhere_goes_on_elsewhere_as_if_it_had_not_been(
    executor: Executor, params: dict[str, Any]
) -> None:
    prompt, new = text("cut", 27), 10
    whole = alone(executor, prompt, new=new, **params)
    with serving(executor) as other:
        other.loop.start()
        for length in range(1, new):
            so_far = whole.tokens[:length]
            rest = other.ask(f"from {length}", [*prompt, *so_far], new=new, answered=length, **params)
            assert rest.reason is FinishReason.LENGTH
            if executor.batch_invariant:
                assert so_far + rest.tokens == whole.tokens
                assert scores(rest) == scores(whole)[length:]


def test_an_answer_that_goes_on_needs_no_room_but_its_own(executor: Executor) -> None:
    prompt = text("room", NUM_BLOCKS * BLOCK - 5)
    with serving(executor) as served:
        first, rest = served.answers(
            served.submit("whole", prompt, new=5), served.submit("rest", [*prompt, *prompt[:3]], new=5, answered=3)
        )
    assert (len(first.tokens), len(rest.tokens)) == (5, 2)


@pytest.mark.parametrize(("answered", "new"), [(-1, 6), (6, 6), (9, 20)])
def test_more_cannot_be_answered_than_was_asked(executor: Executor, answered: int, new: int) -> None:
    with serving(executor) as served, pytest.raises(RequestError, match=f"answered is {answered}; "):
        served.submit("a", text("few", 9), new=new, answered=answered)
