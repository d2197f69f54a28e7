"""What an engine reports of the work that it has."""

from emberkv.core.sequence import BACKGROUND_PRIORITY
from emberkv.engine.commands import EngineLoad, StepTimes, load_of
from tests.core.harness import Harness


def test_requests_are_counted_by_what_is_left_of_them() -> None:
    harness = Harness(num_blocks=16, block_size=4, max_step_tokens=16)
    harness.add("begun", range(24), 2)
    harness.step()
    harness.add("waits", range(100, 109))
    load = load_of(harness.scheduler, StepTimes())
    assert (load.running, load.prefill_tokens, load.free_blocks) == (1, 24 - 16, 16 - 6)
    assert (load.waiting, load.waiting_tokens, load.decoding) == (1, 9, 0)


def test_what_is_computed_in_the_background_is_no_load() -> None:
    harness = Harness(num_blocks=16, block_size=4, max_step_tokens=16)
    harness.add("begun", range(24), priority=BACKGROUND_PRIORITY)
    harness.step()
    harness.add("waits", range(100, 109), priority=BACKGROUND_PRIORITY)
    assert harness.scheduler.num_running == 1
    assert harness.scheduler.num_waiting == 1
    load = load_of(harness.scheduler, StepTimes())
    assert load == EngineLoad(load.sequence, total_blocks=16, free_blocks=16)
    harness.add("alike", range(24), priority=BACKGROUND_PRIORITY)
    harness.step()
    assert harness.scheduler.num_running > 1
    assert load_of(harness.scheduler, StepTimes()).free_blocks == 16
    harness.add("real", range(200, 207))
    load = load_of(harness.scheduler, StepTimes())
    assert (load.waiting, load.waiting_tokens) == (1, 7)
