"""The sampler: each control by values worked out by hand, and rows that do not feel each other."""

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.engine.sampling import Sampler, SamplingState
from emberkv.engine.sampling_params import SamplingParams

PROBABILITIES = [0.5, 0.3, 0.15, 0.05]
LOGITS = torch.tensor(PROBABILITIES).log()


def state(prompt: Sequence[int] = (), *, rng: random.Random | None = None, **params: object) -> SamplingState:
    return SamplingState(SamplingParams(**params), prompt, rng or random.Random(1))  # type: ignore[arg-type]  # fields by name


def frequencies(draws: int = 4000, logits: torch.Tensor = LOGITS, **params: object) -> dict[int, float]:
    """How often each token is drawn from ``logits`` [vocab]."""
    row, drawing = logits.unsqueeze(0), state(**params)
    counts = Counter(Sampler().sample(row, [drawing])[0].token_id for _ in range(draws))
    return {token: count / draws for token, count in sorted(counts.items())}


def greedy_token(logits: list[float], sampling: SamplingState) -> int:
    return Sampler().sample(torch.tensor([logits]), [sampling])[0].token_id


def test_temperature_zero_takes_the_first_of_the_most_likely() -> None:
    rows = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    tokens = Sampler().sample(rows, [state(temperature=0.0), state(temperature=0.0)])
    assert [(token.token_id, token.logprobs) for token in tokens] == [(1, None), (0, None)]


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
    Sampler().sample(logits, [state([0], repetition_penalty=2.0, presence_penalty=1.0)])
    assert logits.tolist() == [[3.0, 2.0, 1.0]]


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    sampling = state([0], temperature=0.0, repetition_penalty=100.0, logprobs=2)
    sampling.append(0)
    logits = torch.tensor([PROBABILITIES]).log() + 7.0
    (token,) = Sampler().sample(logits, [sampling])
    assert token.token_id == 1
    assert token.logprobs is not None
    assert token.logprobs.token_id == 1
    assert token.logprobs.logprob == pytest.approx(math.log(0.3), abs=1e-6)
    assert [token_id for token_id, _ in token.logprobs.top] == [0, 1]
    assert [value for _, value in token.logprobs.top] == pytest.approx([math.log(0.5), math.log(0.3)], abs=1e-6)


def test_zero_logprobs_report_the_chosen_token_alone() -> None:
    (token,) = Sampler().sample(LOGITS.unsqueeze(0), [state(temperature=0.0, logprobs=0)])
    assert token.logprobs is not None
    assert token.logprobs.top == ()
    assert token.logprobs.logprob == pytest.approx(math.log(0.5), abs=1e-6)


def draw_answer(sampling: SamplingState, length: int = 20) -> list[int]:
    rows = torch.randn(length, 1, 64, generator=torch.Generator().manual_seed(3))
    answer = []
    for row in rows:
        answer.append(Sampler().sample(row, [sampling])[0].token_id)
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
        batch = Sampler().sample(logits, together)
        singles = [Sampler().sample(logits[i : i + 1], [single])[0] for i, single in enumerate(alone)]
        assert batch == singles
        for token, one, other in zip(batch, together, alone, strict=True):
            one.append(token.token_id)
            other.append(token.token_id)
