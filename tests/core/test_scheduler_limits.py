"""What the scheduler refuses, and that a refusal leaves nothing behind."""

import pytest

from emberkv.core.scheduler import Scheduler, SchedulerConfig
from emberkv.core.sequence import FinishReason
from emberkv.errors import ConfigError, DuplicateRequestError, PromptTooLongError, RequestError
from tests.core.harness import Harness


def test_the_pool_bounds_prompt_and_answer_together() -> None:
    harness = Harness(num_blocks=4)
    harness.add("fits", range(9), new=7)
    with pytest.raises(PromptTooLongError, match="9 prompt tokens and 8 to generate are 17; the KV pool holds 16"):
        harness.add("too long", range(9), new=8)
    assert harness.scheduler.num_waiting == 1
    harness.finish()


def test_nothing_to_compute_is_refused() -> None:
    harness = Harness()
    with pytest.raises(RequestError, match="the prompt has no tokens"):
        harness.add("a", [])
    with pytest.raises(RequestError, match="max_tokens is 0; it must be at least 1"):
        harness.add("a", [1], new=0)
    assert (harness.scheduler.num_waiting, harness.step().num_tokens) == (0, 0)


def test_an_id_is_unique_while_in_flight() -> None:
    harness = Harness()
    harness.add("a", [1])
    with pytest.raises(DuplicateRequestError, match="'a' is in flight"):
        harness.add("a", [2])
    harness.scheduler.finish("a", FinishReason.ABORT)
    again = harness.add("a", [3] * 5)
    assert [chunk.stop for chunk in harness.step().prefills] == [4, 5]
    assert again.finish_reason is FinishReason.LENGTH
    assert harness.scheduler.num_waiting == 0


@pytest.mark.parametrize("config", [SchedulerConfig(4, 0, 8), SchedulerConfig(4, 16, 0)])
def test_a_scheduler_that_could_never_run_is_refused(config: SchedulerConfig) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Scheduler(Harness().cache, config)


@pytest.mark.parametrize("chunk", [0, -4, 6])
def test_a_chunk_is_a_multiple_of_the_alignment(chunk: int) -> None:
    with pytest.raises(ConfigError, match=f"prefill_chunk is {chunk}; it must be a multiple of 4"):
        Harness(chunk=chunk)
