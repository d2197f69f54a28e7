"""Serving together gives what serving alone gives, when the pool is too small for all and prefixes are shared."""

import random

import pytest

from tests.architectures import SUPPORTED
from tests.engine.conftest import DriverFactory, ModelFactory
from tests.engine.torch.test_exactness import text


@pytest.mark.parametrize("arch", sorted(SUPPORTED))
def test_greedy_answers_are_those_given_alone(driver: DriverFactory, paged: ModelFactory, arch: str) -> None:
    rng = random.Random(arch)
    stem = text(rng, 520)
    prompts = [stem + text(rng, tail) for tail in (1, 3, 20, 50)] + [text(rng, length) for length in (1, 40, 130)]
    alone = driver(paged(arch), prefix_cache=False)
    expected = [alone.run_one(prompt, new=12).tokens for prompt in prompts]
    together = driver(alone.executor.loaded, num_blocks=80, executor=alone.executor)
    assert len(stem) > together.least_shared
    together.run_one(stem)

    answers = together.run(*prompts, new=12)

    assert [run.tokens for run in answers] == expected
    assert together.stats.preemptions > 0
    assert together.stats.hit_tokens > 0
    assert together.shared_decodes > 0
    assert all(run.cached == 0 for run in answers[4:])
    assert together.pool.num_free == together.pool.num_blocks


def test_a_second_visit_decodes_the_same_answer(driver: DriverFactory, paged: ModelFactory) -> None:
    rng = random.Random(0)
    prompt = text(rng, 100)
    served = driver(paged("llama"))
    first, second = served.run_one(prompt, new=40), served.run_one(prompt, new=40)
    assert second.cached > 0
    assert first.tokens == second.tokens


def test_a_prompt_that_arrives_twice_at_once_is_computed_once(driver: DriverFactory, paged: ModelFactory) -> None:
    rng = random.Random(0)
    prompt = text(rng, 200)
    served = driver(paged("llama"), max_step_tokens=64)
    unit = served.scheduler.cache.hit_unit
    first, second = served.run(prompt, prompt, new=8)
    assert first.tokens == second.tokens
    assert served.stats.prefill_tokens == 200 + (200 - 199 // unit * unit)
