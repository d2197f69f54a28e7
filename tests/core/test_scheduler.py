"""The scheduler's plans, worked out by hand: 16 blocks of 4 tokens, chunks of 4, unless a test says otherwise."""

from emberkv.core.scheduler import StepPlan
from emberkv.core.sequence import BACKGROUND_PRIORITY, FinishReason, SequenceStatus
from tests.core.harness import Harness


def shape(plan: StepPlan) -> tuple[list[str], list[tuple[str, int, int]]]:
    """Which sequences decode, and which tokens are prefilled."""
    chunks = [(chunk.sequence.request_id, chunk.start, chunk.stop) for chunk in plan.prefills]
    return [each.request_id for each in plan.decodes], chunks


def test_a_prompt_is_prefilled_in_aligned_chunks_then_decoded() -> None:
    harness = Harness(max_step_tokens=8)
    sequence = harness.add("a", range(10), new=2)
    assert shape(harness.step()) == ([], [("a", 0, 4), ("a", 4, 8)])
    assert (sequence.status, sequence.num_computed) == (SequenceStatus.PREFILLING, 8)
    assert shape(harness.step()) == ([], [("a", 8, 10)])
    assert (sequence.status, sequence.chain.slice(10, 11)) == (SequenceStatus.DECODING, [1010])
    assert shape(harness.step()) == (["a"], [])
    assert (sequence.status, sequence.finish_reason) == (SequenceStatus.FINISHED, FinishReason.LENGTH)
    assert sequence.chain.slice(10, 12) == [1010, 1011]
    assert not harness.step()
    stats = harness.pool.stats
    assert (stats.query_tokens, stats.prefill_tokens, stats.decode_tokens, stats.hit_tokens) == (10, 10, 1, 0)


def test_chunks_are_counted_from_the_end_of_the_hit() -> None:
    harness = Harness(chunk=8)
    harness.add("a", range(7))
    assert shape(harness.step()) == ([], [("a", 0, 7)])
    harness.add("b", range(22))
    assert shape(harness.step()) == ([], [("b", 4, 12), ("b", 12, 20)])
    assert shape(harness.step()) == ([], [("b", 20, 22)])


def test_one_new_token_needs_no_decode() -> None:
    harness = Harness()
    sequence = harness.add("a", range(3), new=1)
    plan = harness.scheduler.schedule()
    assert plan.prefills[0].samples
    harness.compute(plan)
    assert harness.complete(plan) == [sequence]
    assert (sequence.num_generated, harness.pool.num_free) == (1, 16)


def test_a_stopped_sequence_keeps_its_last_token_out() -> None:
    harness = Harness()
    sequence = harness.add("a", range(3), new=5)
    harness.step()
    harness.step(stopped={"a"})
    assert (sequence.finish_reason, sequence.num_generated) == (FinishReason.STOP, 1)
    assert harness.scheduler.num_running == 0


def test_decodes_take_their_share_of_the_budget() -> None:
    harness = Harness(max_step_tokens=8)
    for name, token in (("a", 1), ("b", 2)):
        harness.add(name, [token] * 3, new=9)
    harness.step()
    harness.add("c", range(16))
    assert shape(harness.step()) == (["a", "b"], [("c", 0, 4)])


def test_one_chunk_always_goes() -> None:
    harness = Harness(max_step_tokens=1)
    harness.add("a", range(3), new=9)
    harness.step()
    harness.add("b", range(8))
    assert shape(harness.step()) == (["a"], [("b", 0, 4)])
    assert shape(harness.step()) == (["a"], [("b", 4, 8)])


def test_first_come_first_served_within_a_priority() -> None:
    harness = Harness(max_step_tokens=4)
    for name, priority in (("late", 1), ("first", 0), ("second", 0), ("urgent", -1)):
        harness.add(name, [len(name)] * 4, priority=priority)
    assert [shape(harness.step())[1][0][0] for _ in range(4)] == ["urgent", "first", "second", "late"]


def test_who_is_of_a_sooner_priority_overtakes_a_prompt_that_has_begun() -> None:
    harness = Harness(max_step_tokens=8)
    harness.add("patient", [1] * 20, new=1, priority=5)
    assert shape(harness.step()) == ([], [("patient", 0, 4), ("patient", 4, 8)])
    harness.add("equal", [2] * 12, new=1, priority=5)
    harness.add("sooner", [3] * 12, new=1)
    assert shape(harness.step()) == ([], [("sooner", 0, 4), ("sooner", 4, 8)])
    assert shape(harness.step()) == ([], [("sooner", 8, 12), ("patient", 8, 12)])
    assert shape(harness.step()) == ([], [("patient", 12, 16), ("patient", 16, 20)])
    assert shape(harness.step()) == ([], [("equal", 0, 4), ("equal", 4, 8)])


def test_a_prompt_that_has_begun_goes_on_when_who_is_sooner_does_not_fit() -> None:
    harness = Harness(max_step_tokens=4)
    harness.add("patient", [1] * 40, new=1, priority=5)
    harness.step()
    harness.add("sooner", [3] * 40, new=1)
    assert shape(harness.step()) == ([], [("patient", 4, 8)])


def test_no_more_than_max_running_are_admitted() -> None:
    harness = Harness(max_running=2)
    for name, token in (("a", 1), ("b", 2), ("c", 3)):
        harness.add(name, [token] * 3, new=2)
    plan = harness.step()
    assert [each.request_id for each in plan.admitted] == ["a", "b"]
    assert (harness.scheduler.num_running, harness.scheduler.num_waiting) == (2, 1)
    harness.finish()


def test_sequences_decode_by_priority_not_in_the_order_in_which_they_began() -> None:
    harness = Harness()
    harness.add("patient", [1] * 3, new=9, priority=5)
    harness.step()
    harness.add("sooner", [2] * 3, new=9)
    harness.step()
    assert shape(harness.step()) == (["sooner", "patient"], [])


def test_a_second_request_finds_the_firsts_prompt_and_answer() -> None:
    harness = Harness()
    first = harness.add("a", range(10), new=7)
    harness.finish()
    second = harness.add("b", [*first.chain.slice(0, 17), 5])
    plan = harness.step()
    # The last sampled token was never computed: 16 of the 17 have KV state.
    assert (second.cached_tokens, shape(plan)) == (16, ([], [("b", 16, 18)]))
    assert (harness.pool.stats.query_tokens, harness.pool.stats.hit_tokens) == (28, 16)


def test_exact_mode_does_not_find_the_answer() -> None:
    harness = Harness(exact=True)
    first = harness.add("a", range(10), new=7)
    harness.finish()
    second = harness.add("b", [*first.chain.slice(0, 17), 5])
    assert shape(harness.step()) == ([], [("b", 8, 12), ("b", 12, 16), ("b", 16, 18)])
    assert second.cached_tokens == 8


def test_what_another_commits_meanwhile_is_a_late_hit() -> None:
    harness = Harness(max_step_tokens=4)
    late = harness.add("b", range(14), new=3, priority=1)
    assert shape(harness.step()) == ([], [("b", 0, 4)])
    harness.add("a", range(14), new=1)
    assert shape(harness.step()) == ([], [("a", 4, 8)])
    assert shape(harness.step()) == ([], [("a", 8, 12)])
    assert shape(harness.step()) == ([], [("a", 12, 14), ("b", 12, 14)])
    assert (late.cached_tokens, late.held.hit_tokens, harness.pool.stats.late_hit_tokens) == (8, 8, 8)
    harness.finish()


def test_a_prompt_that_another_is_computing_waits_for_it_and_hits() -> None:
    harness = Harness(max_step_tokens=64)
    first, second = harness.add("a", range(10), new=3), harness.add("b", range(10), new=3)
    assert shape(harness.step()) == ([], [("a", 0, 4), ("a", 4, 8), ("a", 8, 10)])
    assert shape(harness.step()) == (["a"], [("b", 8, 10)])
    assert (second.cached_tokens, harness.pool.stats.prefill_tokens) == (8, 12)
    assert first.held.blocks[:2] == second.held.blocks[:2]
    harness.finish()


def test_no_prompt_waits_for_one_of_a_later_priority() -> None:
    harness = Harness(max_step_tokens=4)
    harness.add("background", range(12), priority=BACKGROUND_PRIORITY)
    harness.step()
    harness.add("awaited", range(12))
    assert shape(harness.step()) == ([], [("awaited", 4, 8)])
    harness.finish()


def test_the_same_prompt_twice_in_one_step_leaves_one_copy() -> None:
    harness = Harness(num_blocks=20, max_step_tokens=16)
    patient = harness.add("patient", range(22), new=3, priority=1)
    harness.step()
    sooner = harness.add("sooner", range(22), new=3)
    both = [("sooner", 16, 20), ("sooner", 20, 22), ("patient", 16, 20), ("patient", 20, 22)]
    assert shape(harness.step()) == ([], both)
    assert sooner.held.blocks[:5] == patient.held.blocks[:5]
    assert sooner.held.blocks[5] is not patient.held.blocks[5]
    assert harness.pool.stats.duplicate_blocks == 1
    harness.finish()


def test_the_last_in_rank_is_preempted_and_resumes() -> None:
    harness = Harness(num_blocks=4)
    first, second = harness.add("a", [1] * 7, new=9), harness.add("b", [2] * 7, new=9)
    assert [each.request_id for each in harness.step().admitted] == ["a", "b"]
    assert shape(harness.step()) == (["a", "b"], [])
    plan = harness.step()
    assert (shape(plan), plan.preempted) == ((["a"], []), [second])
    assert (second.status, second.lease, second.num_computed) == (SequenceStatus.WAITING, None, 0)
    assert (len(second.chain), second.num_preemptions, harness.pool.stats.preemptions) == (9, 1, 1)
    harness.finish()
    assert (first.num_preemptions, second.finish_reason, second.num_generated) == (0, FinishReason.LENGTH, 9)
    assert second.chain.slice(7, 16) == list(range(1007, 1016))
    assert second.cached_tokens == 0, "what it found of its own on coming back is no hit of the prompt"


def test_priority_decides_who_is_preempted() -> None:
    harness = Harness(num_blocks=4)
    low, high = harness.add("low", [1] * 7, new=9, priority=5), harness.add("high", [2] * 7, new=9)
    for _ in range(3):
        harness.step()
    assert (low.num_preemptions, high.num_preemptions) == (1, 0)
    harness.finish()


def test_admission_leaves_a_block_for_each_that_decodes() -> None:
    harness = Harness(num_blocks=4)
    harness.add("a", [1] * 4, new=12)
    harness.step()
    harness.add("b", [2] * 8)
    plan = harness.step()  # a takes its second block, so that two are free, one of which a may need
    assert (shape(plan), harness.pool.num_free) == ((["a"], []), 2)
    harness.finish()
    assert harness.pool.stats.preemptions == 0


def test_who_waits_is_admitted_once_it_can_share() -> None:
    harness = Harness(num_blocks=7)
    harness.add("a", range(16), new=8)
    waiting = harness.add("b", range(17), new=1)
    assert [each.request_id for each in harness.step().admitted] == ["a"]  # b needs 5 blocks, 3 are free
    plan = harness.step()  # now 4 of the 5 are a's, and held anyhow
    assert shape(plan) == (["a"], [("b", 16, 17)])
    assert waiting.cached_tokens == 16


def test_who_waits_is_admitted_once_fewer_decode() -> None:
    harness = Harness(num_blocks=8)
    harness.add("a", [1] * 7, new=9)
    harness.add("b", [2], new=9)
    harness.step()
    harness.add("c", [3] * 16)
    assert not harness.step().admitted  # 4 blocks and 2 of slack, 5 are free
    assert not harness.step(stopped={"b"}).admitted  # a takes a block, then b gives one back
    plan = harness.step()  # 5 are free again, but 1 of slack will do
    assert [each.request_id for each in plan.admitted] == ["c"]


def test_a_late_hit_after_a_preemption_is_no_hit_of_the_prompt() -> None:
    harness = Harness(max_step_tokens=4)
    late = harness.add("b", range(14), new=3, priority=1)
    harness.step()
    harness.scheduler._preempt(late)
    harness.pool.clear()
    harness.step()
    harness.add("a", range(14), new=3)
    for _ in range(3):
        harness.step()
    assert harness.pool.stats.late_hit_tokens == 8
    assert (late.held.hit_tokens, late.cached_tokens) == (8, 0)
    harness.finish()


def test_a_refusal_is_taken_back_when_a_sooner_one_arrives() -> None:
    harness = Harness(num_blocks=5)
    harness.add("a", [1] * 8, new=8)
    harness.add("large", [2] * 15)
    harness.step()
    assert not harness.step().admitted
    harness.add("small", [3] * 2, priority=-1)
    assert [each.request_id for each in harness.step().admitted] == ["small"]
    harness.finish()


def test_background_work_gets_one_chunk_a_step_and_none_beside_anothers() -> None:
    harness = Harness(max_step_tokens=16)
    harness.add("background", range(12), priority=BACKGROUND_PRIORITY)
    assert shape(harness.step()) == ([], [("background", 0, 4)])
    assert shape(harness.step()) == ([], [("background", 4, 8)])
    harness.add("awaited", [7] * 8)
    assert shape(harness.step()) == ([], [("awaited", 0, 4), ("awaited", 4, 8)])
    harness.finish()
