"""The sampler: each control by values worked out by hand, and rows that do not feel each other."""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from emberkv.engine.executor import SampledToken, SamplingState
from emberkv.engine.request import AllowedTokens, SamplingParams
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.sampling import Sampler, SamplingFailure
from emberkv.errors import RequestError

PROBABILITIES = [0.5, 0.3, 0.15, 0.05]
LOGITS = torch.tensor(PROBABILITIES).log()


def state(
    prompt: Sequence[int] = (),
    *,
    rng: random.Random | None = None,
    allowed: AllowedTokens | None = None,
    ends: frozenset[int] = frozenset(),
    **params: object,
) -> SamplingState:
    given = SamplingParams(**params)  # type: ignore[arg-type]  # fields by name
    return SamplingState(given, prompt, rng or random.Random(1), allowed, end_token_ids=ends)


def bits(*token_ids: int, vocab: int = 4) -> NDArray[np.uint8]:
    """Allows these tokens and no others."""
    return np.packbits(np.isin(np.arange(vocab), token_ids), bitorder="little")


def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[SampledToken]:
    """The tokens of rows none of which fails."""
    tokens = []
    for each in Sampler().sample(logits, states):
        assert isinstance(each, SampledToken), each
        tokens.append(each)
    return tokens


def frequencies(draws: int = 4000, logits: torch.Tensor = LOGITS, **params: object) -> dict[int, float]:
    """How often each token is drawn from ``logits`` [vocab], by one random generator, in steps of 50 rows."""
    rows, drawing = logits.expand(50, -1), state(**params)
    counts = Counter(drawn.token_id for _ in range(draws // 50) for drawn in sample(rows, [drawing] * 50))
    return {token: count / draws for token, count in sorted(counts.items())}


def greedy_token(logits: list[float], sampling: SamplingState) -> int:
    return sample(torch.tensor([logits]), [sampling])[0].token_id


def test_temperature_zero_takes_the_first_of_the_most_likely() -> None:
    rows = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    tokens = sample(rows, [state(temperature=0.0), state(temperature=0.0)])
    assert [(token.token_id, token.logprobs) for token in tokens] == [(1, None), (0, None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [3, 64, 1024, 1030, 5000])
def test_the_kernels_find_the_likeliest_that_torch_finds(kernels: Kernels, dtype: torch.dtype, vocab: int) -> None:
    """Of equal ones the first; a NaN, an infinite value or nothing but -inf makes a row fail either way."""
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    logits[1:6] = logits[1:6].round()  # with many equal ones
    logits[6] = -torch.inf
    logits[7, vocab // 2] = torch.inf
    logits[8, :2] = -torch.inf
    for row, place in enumerate((0, vocab // 2, vocab - 1, vocab * 3 // 4), start=9):
        logits[row, place] = torch.nan
        logits[row + 4, place] = 100.0
        logits[row + 8] = -0.0
        logits[row + 8, place:] = 0.0
    asked = [state(temperature=0.0) for _ in logits]
    expected = Sampler().sample(logits, asked)
    assert Sampler(kernels).sample(logits, asked) == expected
    failed = [row for row, each in enumerate(expected) if isinstance(each, SamplingFailure)]
    assert failed == [6, 7, 9, 10, 11, 12]


def test_temperature_one_draws_the_models_own_distribution() -> None:
    assert frequencies() == pytest.approx(dict(enumerate(PROBABILITIES)), abs=0.03)


def test_temperature_sharpens() -> None:
    squared = [p * p for p in PROBABILITIES]  # a temperature of one half squares each probability
    expected = {token: p / sum(squared) for token, p in enumerate(squared)}
    assert frequencies(temperature=0.5) == pytest.approx(expected, abs=0.03)


def test_tiny_temperature_is_greedy_without_overflow() -> None:
    assert frequencies(draws=50, temperature=1e-30) == {0: 1.0}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"top_k": 1}, {0: 1.0}),
        ({"top_k": 2}, {0: 0.625, 1: 0.375}),
        ({"top_k": 99}, dict(enumerate(PROBABILITIES))),
        ({"top_p": 0.45}, {0: 1.0}),
        ({"top_p": 0.79}, {0: 0.625, 1: 0.375}),
        ({"top_p": 0.81}, {0: 0.5 / 0.95, 1: 0.3 / 0.95, 2: 0.15 / 0.95}),
        ({"top_k": 2, "top_p": 0.6}, {0: 1.0}),  # of the two that top_k leaves, the first has 0.625
        ({"min_p": 0.25}, {0: 0.5 / 0.95, 1: 0.3 / 0.95, 2: 0.15 / 0.95}),
        ({"min_p": 1.0}, {0: 1.0}),
        ({"top_p": 0.96, "min_p": 0.5}, {0: 0.625, 1: 0.375}),
    ],
)
def test_truncation_leaves_the_right_tokens_in_proportion(params: dict[str, float], expected: dict[int, float]) -> None:
    assert frequencies(**params) == pytest.approx(expected, abs=0.03)


def test_top_p_over_a_flat_large_vocabulary_keeps_more_than_the_first_guess() -> None:
    logits = torch.zeros(5000)
    drawn = frequencies(draws=3000, logits=logits, top_p=0.9)
    assert max(drawn) < 5000
    assert len(drawn) > 1500


def test_unlikely_tokens_of_weight_zero_are_never_drawn() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    assert set(frequencies(draws=500, logits=logits)) == {0, 2}


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    # Positive logits are divided, negative ones multiplied.
    assert greedy_token([3.0, 2.0, -1.0], state([0], temperature=0.0, repetition_penalty=2.0)) == 1
    assert greedy_token([-1.0, -1.5, -9.0], state([0], temperature=0.0, repetition_penalty=2.0)) == 1
    answered = state([], temperature=0.0, repetition_penalty=2.0)
    assert greedy_token([3.0, 2.0, -1.0], answered) == 0
    answered.append(0)
    assert greedy_token([3.0, 2.0, -1.0], answered) == 1


def test_presence_penalty_is_flat_and_for_the_answer_only() -> None:
    penalized = state([1, 1], temperature=0.0, presence_penalty=1.0)
    assert greedy_token([1.0, 1.5, 0.0], penalized) == 1
    penalized.append(1)
    penalized.append(1)
    penalized.append(1)
    assert greedy_token([0.4, 1.5, 0.0], penalized) == 1  # 0.5 is left of it however often it came
    assert greedy_token([0.6, 1.5, 0.0], penalized) == 0


def test_frequency_penalty_grows_with_each_use() -> None:
    penalized = state([], temperature=0.0, frequency_penalty=0.5)
    chosen = []
    for _ in range(5):
        chosen.append(greedy_token([1.0, 1.9, 0.0], penalized))
        penalized.append(chosen[-1])
    assert chosen == [1, 1, 0, 1, 0]


def test_penalties_leave_the_models_logits_alone() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    sample(logits, [state([0], repetition_penalty=2.0, presence_penalty=1.0)])
    assert logits.tolist() == [[3.0, 2.0, 1.0]]


def test_a_bias_is_added_to_its_tokens_after_the_penalties() -> None:
    biased = state([2], temperature=0.0, repetition_penalty=2.0, logit_bias={2: 1.25, 0: -1.0})
    logits = torch.tensor([[3.0, 2.0, 1.6]])
    assert sample(logits, [biased])[0].token_id == 2  # 0.8 + 1.25 against 2.0 each
    assert logits.tolist() == [pytest.approx([3.0, 2.0, 1.6])]


def test_a_bias_shifts_the_distribution() -> None:
    assert frequencies(logit_bias={0: -100.0, 1: math.log(2)}) == pytest.approx(
        {1: 0.75, 2: 0.1875, 3: 0.0625}, abs=0.03
    )


@pytest.mark.parametrize("bias", [{0: 100.1}, {0: -100.1}, {0: math.nan}, {-1: 1.0}])
def test_a_bias_out_of_range_is_refused(bias: dict[int, float]) -> None:
    with pytest.raises(RequestError, match=r"logit_bias is .*; it must be ") as refused:
        state(logit_bias=bias)
    assert refused.value.param == "logit_bias"


def test_only_allowed_tokens_are_drawn_in_proportion() -> None:
    row, drawing = LOGITS.unsqueeze(0), state(allowed=lambda answer: bits(1, 3))
    counts = Counter(sample(row, [drawing])[0].token_id for _ in range(4000))
    assert {token: count / 4000 for token, count in counts.items()} == pytest.approx({1: 6 / 7, 3: 1 / 7}, abs=0.03)


def test_which_tokens_are_allowed_follows_from_the_answer_so_far() -> None:
    order = [3, 0, 2]
    restricted = state(temperature=0.0, allowed=lambda answer: bits(order[len(answer)]) if len(answer) < 3 else None)
    chosen = []
    for _ in range(4):
        chosen.append(greedy_token(PROBABILITIES, restricted))
        restricted.append(chosen[-1])
    assert chosen == [3, 0, 2, 0]


def test_no_bias_lets_a_token_pass_that_is_not_allowed() -> None:
    assert greedy_token(PROBABILITIES, state(temperature=0.0, logit_bias={0: 100.0}, allowed=lambda _: bits(2))) == 2


def test_an_answer_does_not_end_before_its_least_tokens() -> None:
    sampling = state(temperature=0.0, min_tokens=2, ends=frozenset({0, 1, 99}))
    chosen = []
    for _ in range(3):
        chosen.append(greedy_token(PROBABILITIES, sampling))
        sampling.append(chosen[-1])
    assert chosen == [2, 2, 0]


def test_an_answer_that_may_only_end_ends_before_its_least_tokens() -> None:
    sampling = state(temperature=0.0, min_tokens=2, ends=frozenset({0, 1}), allowed=lambda _: bits(1))
    assert greedy_token(PROBABILITIES, sampling) == 1


def test_a_token_beyond_the_end_of_the_bits_is_not_allowed() -> None:
    logits = torch.arange(20.0).unsqueeze(0)
    assert sample(logits, [state(temperature=0.0, allowed=lambda _: bits(1, 5, vocab=8))])[0].token_id == 5


@pytest.mark.parametrize(
    ("logits", "allowed", "reason"),
    [
        (PROBABILITIES, lambda _: bits(), "the request allows no token next; it must allow at least one"),
        ([0.0, -math.inf, 1.0, 1.0], lambda _: bits(1), "no token that the request allows can follow"),
        (PROBABILITIES, lambda answer: bits(answer[0]), "sampling failed: IndexError"),
    ],
    ids=["none allowed", "only impossible ones", "an error in the hook"],
)
def test_a_restriction_that_leaves_nothing_fails_its_own_row(
    logits: list[float], allowed: AllowedTokens, reason: str
) -> None:
    rows = torch.tensor([logits, PROBABILITIES])
    failed, other = Sampler().sample(rows, [state(temperature=0.0, allowed=allowed), state(temperature=0.0)])
    assert isinstance(failed, SamplingFailure)
    assert failed.reason.startswith(reason)
    assert other == SampledToken(0, None)


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    sampling = state([0], temperature=0.0, repetition_penalty=100.0, logprobs=2)
    sampling.append(0)
    logits = torch.tensor([PROBABILITIES]).log() + 7.0
    (token,) = sample(logits, [sampling])
    assert token.token_id == 1
    assert token.logprobs is not None
    assert token.logprobs.token_id == 1
    assert token.logprobs.logprob == pytest.approx(math.log(0.3), abs=1e-6)
    assert [token_id for token_id, _ in token.logprobs.top] == [0, 1]
    assert [value for _, value in token.logprobs.top] == pytest.approx([math.log(0.5), math.log(0.3)], abs=1e-6)


def test_zero_logprobs_report_the_chosen_token_alone() -> None:
    (token,) = sample(LOGITS.unsqueeze(0), [state(temperature=0.0, logprobs=0)])
    assert token.logprobs is not None
    assert token.logprobs.top == ()
    assert token.logprobs.logprob == pytest.approx(math.log(0.5), abs=1e-6)


def draw_answer(sampling: SamplingState, length: int = 20) -> list[int]:
    rows = torch.randn(length, 1, 64, generator=torch.Generator().manual_seed(3))
    answer = []
    for row in rows:
        answer.append(sample(row, [sampling])[0].token_id)
        sampling.append(answer[-1])
    return answer


def test_a_seed_gives_the_same_answer_whatever_the_injected_generator() -> None:
    first = draw_answer(state(seed=-5, rng=random.Random(1)))
    assert draw_answer(state(seed=-5, rng=random.Random(2))) == first
    assert draw_answer(state(seed=5, rng=random.Random(1))) != first


def test_without_a_seed_the_injected_generator_decides() -> None:
    first = draw_answer(state(rng=random.Random(1)))
    assert draw_answer(state(rng=random.Random(1))) == first
    assert draw_answer(state(rng=random.Random(2))) != first


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 5]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 9),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    logprobs=st.sampled_from([None, 0, 3]),
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(params, min_size=1, max_size=6), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_row_in_a_batch_gets_what_it_gets_alone(rows: list[SamplingParams], dtype: torch.dtype) -> None:
    steps = torch.randn(4, len(rows), 100, generator=torch.Generator().manual_seed(len(rows))).to(dtype)
    together = [SamplingState(row, [1, 2, 3], random.Random(0)) for row in rows]
    alone = [SamplingState(row, [1, 2, 3], random.Random(0)) for row in rows]
    for logits in steps:
        batch = sample(logits, together)
        singles = [sample(logits[i : i + 1], [single])[0] for i, single in enumerate(alone)]
        assert batch == singles
        for token, one, other in zip(batch, together, alone, strict=True):
            one.append(token.token_id)
            other.append(token.token_id)


SMALLEST = 5e-324
edges = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, -0.0, SMALLEST, 1e-300, 1e-30, 1.0, 2.0]),
        "top_p": st.sampled_from([SMALLEST, 1e-320, 1e-300, 0.5, math.nextafter(1.0, 0.0), 1.0]),
        "top_k": st.sampled_from([0, 1, 2, 99, 100, 101, 2**63, 10**30]),
        "min_p": st.sampled_from([0.0, SMALLEST, 0.5, 1.0]),
        "seed": st.sampled_from([-(2**63), -1, 0, 2**63 - 1]),
        "repetition_penalty": st.sampled_from([0.01, math.nextafter(1.0, 2.0), 100.0]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 2.0]),
        "frequency_penalty": st.sampled_from([-2.0, SMALLEST, 2.0]),
        "logprobs": st.sampled_from([None, 0, 20]),
    },
)
ROWS = {
    "flat": torch.zeros(100),
    "steep": torch.arange(100) * 100.0,
    "far below zero": torch.full((100,), -1e30),
    "one token only": torch.full((100,), -math.inf).index_fill(0, torch.tensor(7), 3.0),
    "tiny": torch.linspace(-1e-40, 1e-40, 100),
}


@settings(max_examples=300, deadline=None)
@given(parameters=edges, row=st.sampled_from(sorted(ROWS)), uniform=st.sampled_from([0.0, math.nextafter(1.0, 0.0)]))
def test_accepted_parameters_always_choose_a_possible_token(
    parameters: dict[str, float], row: str, uniform: float
) -> None:
    drawing = state([7, 8], rng=_Constant(uniform), **parameters)
    logits = ROWS[row]
    for _ in range(3):
        (token,) = sample(logits.unsqueeze(0), [drawing])
        assert math.isfinite(logits[token.token_id])
        drawing.append(token.token_id)


class _Constant(random.Random):
    """Draws one number for ever."""

    def __init__(self, number: float) -> None:
        super().__init__(0)
        self._number = number

    def random(self) -> float:
        return self._number


REFUSED = {
    "temperature": [-SMALLEST, 2.1, math.nan, math.inf],
    "top_p": [0.0, -1.0, 1.1, math.nan],
    "top_k": [-1],
    "min_p": [-SMALLEST, 1.1, math.nan],
    "seed": [-(2**63) - 1, 2**63],
    "repetition_penalty": [0.0, SMALLEST, 1e-39, 0.009, 100.1, 1e39, math.inf, math.nan],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "frequency_penalty": [-2.1, 2.1, math.nan],
    "logprobs": [-1, 21],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_parameters_beyond_their_bounds_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(RequestError, match=f"{name} is .*; it must be ") as refused:
        state(**{name: value})
    assert refused.value.param == name


@pytest.mark.parametrize(
    ("bad", "params", "reason"),
    [
        (torch.full((4,), math.nan), {}, "the model's scores for the next token are not numbers"),
        (torch.tensor([0.0, math.inf, 0.0, 0.0]), {}, "the model's scores for the next token are not numbers"),
        (torch.full((4,), 3e38), {"repetition_penalty": 0.01}, "the penalties make the scores .* overflow"),
    ],
)
def test_a_row_that_cannot_be_sampled_fails_alone(bad: torch.Tensor, params: dict[str, float], reason: str) -> None:
    good = torch.tensor([0.0, 1.0, 5.0, 2.0])
    rows = [state(temperature=0.0), state([0, 1, 2, 3], **params), state(top_k=1)]
    before, failed, after = Sampler().sample(torch.stack([good, bad, good]), rows)
    assert isinstance(failed, SamplingFailure)
    assert re.match(reason, failed.reason)
    assert [before, after] == [SampledToken(2, None)] * 2


def test_an_unexpected_error_fails_its_row_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    outside = state([99], repetition_penalty=2.0)  # a prompt token that the scores have no place for
    failed, other = Sampler().sample(LOGITS.repeat(2, 1), [outside, state(temperature=0.0)])
    assert failed == SamplingFailure("sampling failed: IndexError")
    assert other == SampledToken(0, None)
    (record,) = caplog.records
    assert record.exc_info is not None
