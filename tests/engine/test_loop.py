"""The engine's thread: every request ends exactly once, whatever happens to it, and leaves nothing behind."""

import threading

import pytest

from emberkv.core.hashing import TokenChain
from emberkv.core.scheduler import StepPlan
from emberkv.core.sequence import FinishReason, Sequence
from emberkv.engine.active_requests import ActiveRequests
from emberkv.engine.commands import Statistics
from emberkv.engine.request import CacheUsage, GenerationRequest, PrefillProgress, SamplingParams, TokenOutput
from emberkv.errors import DuplicateRequestError, EngineStoppedError, PromptTooLongError, RequestError
from tests.engine.loop_harness import (
    BLOCK,
    CONTEXT,
    EOS,
    ROOT,
    VOCAB,
    FakeExecutor,
    Harness,
    Inbox,
    running,
    successor,
)
from tests.waiting import DEADLINE, eventually

VICTIM = range(2, 22)  # 20 tokens: three chunks
OTHER = range(30, 42)
STEPS = 9
"""The two of them, begun together: the victim's five tokens come from steps 1 to 5, the other's eight from 1 to 8."""


def alone(prompt: range, new: int) -> list[int]:
    with running(Harness()) as harness:
        inbox = harness.submit("alone", prompt, new)
        assert inbox.reason is FinishReason.LENGTH
    return inbox.tokens


def test_an_answer_token_by_token() -> None:
    with running(Harness()) as harness:
        inbox = harness.submit("a", VICTIM, new=3)
        assert inbox.reason is FinishReason.LENGTH
    assert [len(output.token_ids) for output in inbox.outputs] == [1, 1, 1]
    assert [output.finish_reason for output in inbox.outputs] == [None, None, FinishReason.LENGTH]
    assert {output.request_id for output in inbox.outputs} == {"a"}
    assert harness.loop.stats().prefill_tokens == 20
    assert harness.loop.stats().decode_tokens == 2


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_end_of_sequence_is_not_part_of_the_answer(ignore_eos: bool) -> None:
    executor = FakeExecutor(next_token=lambda sequence: EOS if len(sequence.chain) == 22 else 5)
    with running(Harness(executor)) as harness:
        inbox = harness.submit("a", VICTIM, new=6, ignore_eos=ignore_eos)
        reason = inbox.reason
    if ignore_eos:
        assert (reason, inbox.tokens) == (FinishReason.LENGTH, [5, 5, EOS, 5, 5, 5])
    else:
        assert (reason, inbox.tokens) == (FinishReason.STOP, [5, 5])


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_token_ends_the_answer_whatever_the_end_of_sequence_does(ignore_eos: bool) -> None:
    executor = FakeExecutor(next_token=lambda sequence: 7 if len(sequence.chain) == 22 else 5)
    with running(Harness(executor)) as harness:
        inbox = harness.submit("a", VICTIM, new=6, ignore_eos=ignore_eos, stop_token_ids=(7, 8))
        assert (inbox.reason, inbox.tokens) == (FinishReason.STOP, [5, 5])


def test_usage_tells_what_was_reused_and_what_can_be() -> None:
    with running(Harness()) as harness:
        first, longer = harness.submit("a", VICTIM, new=1), range(2, 24)
        first.wait()
        second = harness.submit("b", VICTIM, new=2)
        second.wait()
        third = harness.submit("c", longer, new=1)
        third.wait()
        salted = harness.submit("d", VICTIM, new=1, salt=b"other")
        salted.wait()
    assert first.outputs[0].usage == CacheUsage(20, cached_tokens=0, created_tokens=20)
    assert {output.usage for output in second.outputs} == {CacheUsage(20, cached_tokens=16, created_tokens=4)}
    assert third.outputs[0].usage == CacheUsage(22, cached_tokens=20, created_tokens=0)
    assert salted.outputs[0].usage == CacheUsage(20, cached_tokens=0, created_tokens=20)
    assert harness.loop.stats().prefix_query_tokens == 20 + 20 + 22 + 20
    assert harness.loop.stats().prefix_hit_tokens == 16 + 20


def test_a_prompt_leaves_a_checkpoint_before_its_last_token_and_at_its_borders() -> None:
    prompt = [*range(2, 17)]

    def cached(*requests: tuple[list[int], int, tuple[int, ...]]) -> int:
        """tokens, max_tokens and borders of each; what the last one finds."""
        harness = Harness(batch_invariant=True, within_blocks=False, branch_tokens=1)
        found = 0
        with running(harness):
            for number, (tokens, new, borders) in enumerate(requests):
                params, inbox = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True), Inbox()
                harness.loop.submit(GenerationRequest(str(number), tokens, params, borders=borders), inbox)
                inbox.wait()
                usage = inbox.outputs[0].usage
                assert usage is not None
                found = usage.cached_tokens
        assert harness.loop.stats().checkpoints["hits"] == (found % BLOCK > 0)
        return found

    other = [*prompt[:10], 40, 41]
    assert cached((prompt, 4, ()), (prompt, 4, ())) == 14
    assert cached((prompt, 1, ()), (prompt, 1, ())) == 12
    assert cached((prompt, 4, (10,)), (other, 4, ())) == 10
    assert cached((prompt, 4, ()), (other, 4, ())) == 8


def test_without_a_prefix_cache_nothing_is_reused_or_created() -> None:
    with running(Harness(prefix_cache=False)) as harness:
        for request_id in "ab":
            inbox = harness.submit(request_id, VICTIM, new=1)
            assert inbox.wait().usage == CacheUsage(20, cached_tokens=0, created_tokens=0)


def test_queue_time_is_from_submit_to_the_first_step() -> None:
    now = [10.0]
    harness = Harness(clock=lambda: now[0])
    inbox = harness.submit("a", VICTIM, new=2)
    now[0] = 12.5
    with running(harness):
        inbox.wait()
    assert [output.queue_seconds for output in inbox.outputs] == [2.5, None]


@pytest.mark.parametrize("step", range(STEPS))
def test_abort_at_every_point(step: int) -> None:
    """While it waits, in each chunk, at each token, and after its end; the other goes on."""
    harness = Harness()

    def abort(_: StepPlan, number: int) -> None:
        if number == step:
            harness.loop.abort("victim")

    harness.executor.on_step = abort
    victim = harness.submit("victim", VICTIM, new=5)
    other = harness.submit("other", OTHER, new=8)
    with running(harness):
        assert other.reason is FinishReason.LENGTH
        expected = FinishReason.ABORT if step < 5 else FinishReason.LENGTH
        assert victim.reason is expected
        again = harness.submit("victim", VICTIM, new=5)
        assert again.reason is FinishReason.LENGTH
    assert victim.tokens == alone(VICTIM, 5)[: len(victim.tokens)]
    assert other.tokens == alone(OTHER, 8)
    assert again.tokens == alone(VICTIM, 5)


def test_the_progress_of_a_prompt_is_known_from_its_admission_to_its_end() -> None:
    harness = Harness()
    seen: list[PrefillProgress | None] = []
    harness.executor.on_step = lambda plan, number: seen.append(harness.loop.progress("a"))
    inbox = harness.submit("a", VICTIM, new=2)
    assert harness.loop.progress("a") is None
    with running(harness):
        assert inbox.reason is FinishReason.LENGTH
        assert harness.loop.progress("a") is None
    assert seen == [PrefillProgress(16, 20), PrefillProgress(20, 20), PrefillProgress(20, 20)]


def test_abort_before_the_first_step() -> None:
    harness = Harness()
    inbox = harness.submit("a", VICTIM)
    harness.loop.abort("a")
    with running(harness):
        assert inbox.reason is FinishReason.ABORT
    assert inbox.outputs == [TokenOutput("a", usage=CacheUsage(20, 0, 20), finish_reason=FinishReason.ABORT)]
    assert harness.executor.steps == 0


def test_abort_while_another_holds_the_pool() -> None:
    harness = Harness(num_blocks=8)

    def abort(plan: StepPlan, number: int) -> None:
        if number == 4:
            assert harness.scheduler.num_waiting == 1
            harness.loop.abort("waits")

    harness.executor.on_step = abort
    holds = harness.submit("holds", VICTIM, new=8)
    waits = harness.submit("waits", range(40, 12, -1), new=1)
    with running(harness):
        assert (holds.reason, waits.reason) == (FinishReason.LENGTH, FinishReason.ABORT)
    assert holds.outputs[-1].request_id == "holds"
    assert waits.outputs[0].queue_seconds is None


def test_unknown_and_finished_ids_are_ignored() -> None:
    with running(Harness()) as harness:
        harness.submit("a", VICTIM).wait()
        harness.loop.abort("a")
        harness.loop.abort("nobody")
        assert harness.submit("a", VICTIM).reason is FinishReason.LENGTH


@pytest.mark.parametrize("step", range(STEPS))
def test_a_failed_step_ends_those_in_it_and_no_others(step: int) -> None:
    caught: list[set[str]] = []

    def fail(plan: StepPlan, number: int) -> None:
        if number == step:
            caught.append({each.request_id for each in plan.decodes + [chunk.sequence for chunk in plan.prefills]})
            raise RuntimeError("out of memory")

    harness = Harness(FakeExecutor(on_step=fail))
    inboxes = {"victim": harness.submit("victim", VICTIM, new=5), "other": harness.submit("other", OTHER, new=8)}
    with running(harness):
        inboxes["other"].wait()
        for request_id, inbox in inboxes.items():
            last = inbox.wait()
            failed = request_id in caught[0]
            assert last.finish_reason is (FinishReason.ERROR if failed else FinishReason.LENGTH)
            assert last.error == ("the engine failed: RuntimeError" if failed else None)
        assert harness.submit("after", VICTIM, new=5).reason is FinishReason.LENGTH
    assert len(caught) == 1


@pytest.mark.parametrize("tokens", [20, 22], ids=["after prefill", "in decode"])
@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_end_their_own_request_only(tokens: int, score: float) -> None:
    executor = FakeExecutor()
    executor.scores = lambda sequence: score if sequence.request_id == "victim" and len(sequence.chain) == tokens else 1
    harness = Harness(executor)
    victim, other = harness.submit("victim", VICTIM, new=5), harness.submit("other", OTHER, new=8)
    with running(harness):
        last = victim.wait()
        assert last.finish_reason is FinishReason.ERROR
        assert last.error == "the model's scores for the next token are not numbers"
        assert other.reason is FinishReason.LENGTH
        after = harness.submit("after", range(2, 30), new=1)
        # Nothing of the step that gave the bad scores was committed.
        cached = 8 if tokens == 20 else 20
        assert after.wait().usage == CacheUsage(28, cached_tokens=cached, created_tokens=28 - cached)
    assert victim.tokens == alone(VICTIM, 5)[: tokens - 20]
    assert other.tokens == alone(OTHER, 8)


def test_a_request_that_cannot_be_sampled_ends_alone() -> None:
    """Its penalties make the scores overflow; the step that it is in goes on for the other."""
    executor = FakeExecutor(scores=lambda sequence: 3e38 if sequence.request_id == "victim" else 1.0)
    executor.next_token = lambda sequence: 2 if sequence.request_id == "victim" else successor(sequence)
    harness = Harness(executor)
    victim, params = Inbox(), SamplingParams(max_tokens=5, temperature=0.0, repetition_penalty=0.01)
    harness.loop.submit(GenerationRequest("victim", list(VICTIM), params), victim)
    other = harness.submit("other", OTHER, new=8)
    with running(harness):
        last = victim.wait()
        assert last.finish_reason is FinishReason.ERROR
        assert last.error == "the penalties make the scores for the next token overflow; use weaker ones"
        assert other.reason is FinishReason.LENGTH
    assert other.tokens == alone(OTHER, 8)


@pytest.mark.parametrize(
    ("field", "params"),
    [
        ("logit_bias", SamplingParams(logit_bias={2: 1.0, VOCAB: 1.0})),
        ("stop_token_ids", SamplingParams(stop_token_ids=(2, VOCAB))),
    ],
)
def test_a_token_outside_the_vocabulary_is_refused(field: str, params: SamplingParams) -> None:
    with pytest.raises(RequestError, match=f"{field} names token id {VOCAB}; the vocabulary has {VOCAB}") as refused:
        Harness().loop.submit(GenerationRequest("a", [2], params), Inbox())
    assert refused.value.param == field


def test_preempted_requests_answer_in_full() -> None:
    with running(Harness(num_blocks=10)) as harness:
        prompts = [range(start, start + 8) for start in (2, 12, 22, 32)]
        inboxes = [harness.submit(str(prompt), prompt, new=20) for prompt in prompts]
        assert {inbox.reason for inbox in inboxes} == {FinishReason.LENGTH}
        assert harness.loop.stats().preemptions > 0
    assert [inbox.tokens for inbox in inboxes] == [alone(prompt, 20) for prompt in prompts]
    assert all(output.usage == CacheUsage(8, 0, 8) for inbox in inboxes for output in inbox.outputs)


def test_a_tenants_first_token_comes_soon_beside_a_hundred_long_requests_of_another() -> None:
    harness, steps, ann = Harness(num_blocks=400), [], Inbox(lambda output: steps.append(harness.executor.steps))
    params = SamplingParams(max_tokens=1, temperature=0.0)

    def come(plan: StepPlan, number: int) -> None:
        if number == 30:  # many of the other's run, and many wait
            steps.append(number)
            harness.loop.submit(GenerationRequest("ann", list(OTHER), params, b"ann", tenant="ann"), ann)

    harness.executor.on_step = come
    others = [Inbox() for _ in range(100)]
    for number, inbox in enumerate(others):
        tokens = [2 + (number + at * at) % (VOCAB - 2) for at in range(60)]
        bob = GenerationRequest(f"{number}", tokens, params, b"bob", tenant="bob")
        harness.loop.submit(bob, inbox)
    with running(harness):
        assert {inbox.reason for inbox in (ann, *others)} == {FinishReason.LENGTH}
    asked, answered = steps
    assert answered - asked <= 3


def test_stop_ends_every_request_and_takes_no_more() -> None:
    harness, begun = Harness(), threading.Event()
    harness.executor.on_step = lambda plan, number: begun.set() if plan.decodes else None
    endless = [harness.submit(f"{start}", range(start, start + 6), new=40) for start in (2, 10, 20)]
    harness.loop.start()
    assert begun.wait(DEADLINE)
    harness.loop.stop()
    assert {inbox.reason for inbox in endless} <= {FinishReason.ABORT, FinishReason.LENGTH}
    with pytest.raises(EngineStoppedError, match="no request can begin"):
        harness.submit("late", VICTIM)
    harness.loop.stop()
    harness.check_idle()


def is_stopping(harness: Harness) -> bool:
    try:
        harness.loop.execute(Statistics())
    except EngineStoppedError:
        return True
    return False


def test_stop_in_the_middle_of_a_step() -> None:
    harness, inside, stopping = Harness(), threading.Event(), threading.Event()

    def hold(plan: StepPlan, number: int) -> None:
        inside.set()
        assert stopping.wait(DEADLINE)

    harness.executor.on_step = hold
    inbox = harness.submit("a", VICTIM, new=5)
    harness.loop.start()
    assert inside.wait(DEADLINE)
    late = harness.submit("b", OTHER, new=5)
    stopper = threading.Thread(target=harness.loop.stop)
    stopper.start()
    eventually(lambda: is_stopping(harness))
    stopping.set()
    stopper.join(DEADLINE)
    assert late.reason is FinishReason.ABORT
    assert inbox.wait().finish_reason is FinishReason.ABORT
    harness.check_idle()


def test_a_listener_that_raises_ends_its_own_request_only(caplog: pytest.LogCaptureFixture) -> None:
    reported: list[Exception] = []
    harness = Harness(on_crash=reported.append)
    outputs: list[TokenOutput] = []

    def faulty(output: TokenOutput) -> None:
        outputs.append(output)
        raise ValueError("a fault of the caller's")

    params = SamplingParams(max_tokens=5, temperature=0.0)
    harness.loop.submit(GenerationRequest("faulty", list(VICTIM), params), faulty)
    other = harness.submit("other", OTHER, new=8)
    with running(harness):
        assert other.reason is FinishReason.LENGTH
        again = harness.submit("faulty", VICTIM, new=1)  # the id is free
        assert again.reason is FinishReason.LENGTH
    assert [output.finish_reason for output in outputs] == [None]
    assert (reported, other.tokens) == ([], alone(OTHER, 8))
    (record,) = caplog.records
    assert record.getMessage() == "the listener of request faulty failed, and the request ends"


def test_a_crash_of_the_loop_itself_ends_all_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Exception] = []
    harness = Harness(on_crash=reported.append)
    crash = ValueError("the plan cannot be accounted for")

    def fail(*_: object) -> None:
        raise crash

    monkeypatch.setattr(ActiveRequests, "deliver", fail)
    inboxes = [harness.submit("one", VICTIM, new=5), harness.submit("other", OTHER, new=30)]
    with running(harness):
        assert [inbox.reason for inbox in inboxes] == [FinishReason.ABORT] * 2
    assert reported == [crash]
    with pytest.raises(EngineStoppedError):
        harness.submit("late", VICTIM)


def test_a_crash_while_requests_are_queued_ends_those_behind_it_too() -> None:
    reported: list[Exception] = []
    harness = Harness(on_crash=reported.append)
    inboxes = [harness.submit(name, VICTIM) for name in ("first", "second", "third")]
    harness.scheduler.add(Sequence("second", TokenChain(ROOT, [2], BLOCK), 1))
    with running(harness):
        assert [inbox.reason for inbox in inboxes] == [FinishReason.ABORT] * 3
    assert [type(error) for error in reported] == [DuplicateRequestError]


def test_stop_before_start_ends_what_was_submitted() -> None:
    harness = Harness()
    inbox = harness.submit("a", VICTIM)
    harness.loop.stop()
    assert inbox.reason is FinishReason.ABORT
    harness.check_idle()


def test_an_id_in_flight_cannot_be_used_again() -> None:
    harness = Harness()
    inbox = harness.submit("a", VICTIM)
    with pytest.raises(DuplicateRequestError, match="'a' is in flight"):
        harness.submit("a", OTHER)
    with running(harness):
        assert inbox.reason is FinishReason.LENGTH
        assert harness.submit("a", OTHER).reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("prompt", "new", "error", "param", "message"),
    [
        ([], 1, RequestError, "prompt", "the prompt is empty"),
        ([2, VOCAB], 1, RequestError, "prompt", f"token id {VOCAB} is not in the vocabulary of {VOCAB}"),
        ([2**40], 1, RequestError, "prompt", f"token id {2**40} is not in the vocabulary of {VOCAB}"),
        ([-1], 1, RequestError, "prompt", "token id -1 is not"),
        ([2] * 96, 1, PromptTooLongError, "prompt", "96 prompt tokens and 1 to generate are 97; the KV pool holds 96"),
        ([2] * 90, 7, PromptTooLongError, "max_tokens", "90 prompt tokens and 7 to generate are 97"),
    ],
)
def test_what_can_never_be_served_is_refused(
    prompt: list[int], new: int, error: type[RequestError], param: str, message: str
) -> None:
    with running(Harness()) as harness:
        with pytest.raises(error, match=message) as refused:
            harness.submit("a", prompt, new)
        assert refused.value.param == param
        assert harness.submit("a", [2] * 90, new=6).reason is FinishReason.LENGTH  # just fits


def test_the_limit_is_the_smaller_of_context_and_pool() -> None:
    wide = Harness(num_blocks=100)
    assert (wide.loop.context_length, wide.loop.max_prompt_tokens) == (CONTEXT, CONTEXT - 1)
    with pytest.raises(PromptTooLongError, match="the model's context holds 100"):
        wide.submit("a", [2] * CONTEXT, 1)
    assert Harness(num_blocks=5).loop.context_length == 5 * BLOCK


def test_stats_before_anything_has_happened() -> None:
    stats = Harness().loop.stats()
    assert (stats.total_blocks, stats.free_blocks, stats.cached_blocks, stats.running) == (24, 24, 0, 0)
