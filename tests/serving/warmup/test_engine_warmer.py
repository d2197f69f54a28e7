"""A warmup over the engine's own loop: what it warms, real requests hit."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from emberkv.core.hashing import PUBLIC_OWNER, BlockHash, PublicPrefixes
from emberkv.core.policies.eviction import LRU
from emberkv.core.policies.retention import Retaining
from emberkv.core.scheduler import StepPlan
from emberkv.core.sequence import FinishReason
from emberkv.engine.commands import Remove
from emberkv.engine.request import GenerationRequest, OutputListener, SamplingParams
from emberkv.serving.tenancy import Tenants
from emberkv.serving.warmup.learned_prompts import LearnedPrompts
from emberkv.serving.warmup.warm_prompt import WarmPrompt
from emberkv.serving.warmup.warmup import EngineWarmer, Warmup, WarmupOptions, WarmupPhase
from tests.engine.loop_harness import BLOCK, CHUNK, ROOT, FakeExecutor, Harness, Inbox, running
from tests.waiting import DEADLINE, eventually

PROMPT = WarmPrompt(tuple(range(2, 42)))
TENANTS = Tenants(["key a", "key b"], secret=b"s" * 32)
NOBODY = Tenants(secret=b"")
A, B = TENANTS.names


@contextmanager
def warming(
    harness: Harness,
    *prompts: WarmPrompt,
    tenants: Tenants = NOBODY,
    engine: EngineWarmer | None = None,
    learned: LearnedPrompts | None = None,
    clock: Callable[[], float] = time.monotonic,
    **given: object,
) -> Iterator[Warmup]:
    """Over the harness's running loop, after the first pass."""
    settings = WarmupOptions(unit=harness.scheduler.cache.kept_unit, block_size=BLOCK, **given)  # type: ignore[arg-type]  # fields by name
    engine = engine or EngineWarmer(harness.loop, tenants, block_size=BLOCK)
    warmup = Warmup(engine, settings, prompts, learned=learned, clock=clock)
    harness.loop.on_update(warmup.on_update)
    with running(harness):
        warmup.start()
        assert warmup.first_pass_ended.wait(DEADLINE)
        yield warmup
        warmup.close()


def ask(harness: Harness, prompt: WarmPrompt, tenants: Tenants = NOBODY, request_id: str = "real") -> int:
    """How many tokens a real request that begins with ``prompt`` has cached."""
    tenant = tenants.named(prompt.tenant)
    inbox = Inbox()
    request = GenerationRequest(
        request_id, [*prompt.tokens, 45, 46, 47], SamplingParams(max_tokens=2), tenant.salt, tenant=tenant.name
    )
    harness.loop.submit(request, inbox)
    usage = inbox.wait().usage
    assert usage is not None
    return usage.cached_tokens


def test_the_first_real_request_hits_all_of_it() -> None:
    harness = Harness()
    with warming(harness, PROMPT) as warmup:
        assert (warmup.report().phase, warmup.report().tokens) == (WarmupPhase.DONE, 40)
        assert ask(harness, PROMPT) == 40


@pytest.mark.parametrize(("tokens", "tenants"), [(3, NOBODY), (3, TENANTS), (7, NOBODY), (7, TENANTS)])
def test_a_prompt_that_ends_within_a_block_is_hit_whole(tokens: int, tenants: Tenants) -> None:
    system = WarmPrompt(PROMPT.tokens[:tokens], PUBLIC_OWNER)
    harness = Harness(batch_invariant=True, public=PublicPrefixes([system.tokens], BLOCK))
    with warming(harness, system, tenants=tenants) as warmup:
        assert (warmup.report().phase, warmup.report().tokens) == (WarmupPhase.DONE, tokens)
        for number, name in enumerate(tenants.names or [""]):
            assert ask(harness, WarmPrompt(system.tokens, name), tenants, str(number)) == tokens


@pytest.mark.parametrize("tokens", [3, 7])
@pytest.mark.parametrize("tenants", [NOBODY, TENANTS])
def test_where_a_block_has_a_state_a_prompt_that_ends_within_it_is_kept_as_a_checkpoint(
    tokens: int, tenants: Tenants
) -> None:
    """Also one that fills no block; and a real request that fills the block does not take the checkpoint's place."""
    system = WarmPrompt(PROMPT.tokens[:tokens], PUBLIC_OWNER)
    harness = Harness(batch_invariant=True, within_blocks=False, public=PublicPrefixes([system.tokens], BLOCK))
    with warming(harness, system, tenants=tenants, required=True) as warmup:
        report = warmup.report()
        assert (report.phase, report.tokens, report.problems) == (WarmupPhase.DONE, tokens, ())
        for number, name in enumerate([*(tenants.names or [""])] * 2):
            assert ask(harness, WarmPrompt(system.tokens, name), tenants, str(number)) >= tokens
        kept = [block for block in harness.pool.blocks if block.retained]
        assert [block.num_tokens for block in kept] == [tokens % BLOCK]


def test_tenants_find_their_own_prompts_and_public_ones() -> None:
    public = WarmPrompt(tuple(range(10, 22)))
    harness = Harness(num_blocks=48, public=PublicPrefixes([public.tokens], BLOCK))
    with warming(harness, public, WarmPrompt(PROMPT.tokens, A), tenants=TENANTS) as warmup:
        assert warmup.report().is_warm
        assert ask(harness, WarmPrompt(PROMPT.tokens, A), TENANTS, "1") == 40
        assert ask(harness, WarmPrompt(PROMPT.tokens, B), TENANTS, "2") == 0
        assert ask(harness, WarmPrompt(public.tokens, A), TENANTS, "3") == 12
        assert ask(harness, WarmPrompt(public.tokens, B), TENANTS, "4") == 12
        owners = {block.owner for block in harness.pool.blocks}
        assert {PUBLIC_OWNER, A, B} <= owners


class AbortOpensGate(EngineWarmer):
    """Begins to wait for a prompt once ``begun`` is set. Lets the engine go on only when the warmup gives up."""

    begun: threading.Event
    gate: threading.Event

    def compute(self, prompt: WarmPrompt, request_id: str, listener: OutputListener) -> None:
        super().compute(prompt, request_id, listener)
        assert self.begun.wait(DEADLINE)

    def abort(self, request_id: str) -> None:
        super().abort(request_id)
        self.gate.set()


def test_the_time_limit_holds_to_within_one_chunk_and_what_was_done_stays() -> None:
    begun, gate = threading.Event(), threading.Event()

    def stay_in_the_second_chunk(plan: StepPlan, number: int) -> None:
        if number == 1:
            begun.set()
            assert gate.wait(DEADLINE)

    harness = Harness(FakeExecutor(on_step=stay_in_the_second_chunk))
    engine = AbortOpensGate(harness.loop, NOBODY, block_size=BLOCK)
    engine.begun, engine.gate = begun, gate
    with warming(harness, PROMPT, engine=engine, clock=lambda: 0.0, timeout=0.05, rewarm_seconds=1000.0) as warmup:
        report = warmup.report()
        assert (report.phase, report.timeouts) == (WarmupPhase.TIMED_OUT, 1)
        assert harness.executor.steps == 2
        assert (report.tokens, report.computed_tokens) == (2 * CHUNK, 2 * CHUNK)
        assert ask(harness, PROMPT) == 2 * CHUNK


def test_real_requests_go_first() -> None:
    """A request that comes while a prompt is being warmed is answered before the prompt is."""
    submitted, order = threading.Event(), []

    def on_step(plan: StepPlan, number: int) -> None:
        if number == 0:
            assert submitted.wait(DEADLINE)
        order.extend(chunk.sequence.request_id.partition("-")[0] for chunk in plan.prefills)

    harness = Harness(FakeExecutor(on_step=on_step), num_blocks=48)
    warmup = Warmup(EngineWarmer(harness.loop, NOBODY, block_size=BLOCK), WarmupOptions(unit=BLOCK), [PROMPT])
    with running(harness):
        warmup.start()
        eventually(lambda: harness.executor.steps == 1)
        inbox = harness.submit("real", [7] * 32, new=1)
        submitted.set()
        assert inbox.reason is FinishReason.LENGTH
        assert warmup.first_pass_ended.wait(DEADLINE)
        warmup.close()
    assert order == ["warmup"] + 4 * ["real"] + 4 * ["warmup"]


def test_after_a_clear_it_is_warmed_again() -> None:
    harness = Harness()
    with warming(harness, PROMPT, rewarm_seconds=0.0) as warmup:
        harness.loop.execute(Remove(None, tiers=False)).result(DEADLINE)
        eventually(lambda: warmup.report().computed_tokens == 80)
        eventually(lambda: warmup.report().is_warm)
        assert ask(harness, PROMPT) == 40


def test_after_an_eviction_it_is_warmed_again() -> None:
    harness = Harness(num_blocks=16)
    with warming(harness, PROMPT, rewarm_seconds=0.0) as warmup:
        assert harness.submit("other", [44] * 52, new=1).reason is FinishReason.LENGTH
        eventually(lambda: warmup.report().computed_tokens > 40)
        eventually(lambda: warmup.report().is_warm)
        assert ask(harness, PROMPT) == 40


def test_where_retention_is_possible_it_is_evicted_last() -> None:
    policy: Retaining[BlockHash] = Retaining(LRU(), max_bytes=20)
    harness = Harness(policy=policy)
    with warming(harness, PROMPT) as warmup:
        for number in range(5):
            assert harness.submit(f"{number}", [number + 3] * 40, new=1).reason is FinishReason.LENGTH
        assert ask(harness, PROMPT) == 40
        assert warmup.report().computed_tokens == 40
        assert warmup.unpin(PROMPT.tokens)
        assert policy.retained_bytes == 0


def test_without_a_prefix_cache_it_says_so() -> None:
    harness = Harness(prefix_cache=False)
    with warming(harness, PROMPT) as warmup:
        assert warmup.report().problems == ("prompt 1: the pool has kept 0 of 40 tokens",)


def test_prompts_that_can_never_fit() -> None:
    harness = Harness()
    with warming(harness, WarmPrompt((3,) * 200), WarmPrompt((1000,) * 8)) as warmup:
        first, second = warmup.report().problems
        assert "200 prompt tokens" in first
        assert "token id 1000 is not in the vocabulary" in second
        assert ask(harness, PROMPT) == 0


def test_an_engine_that_stopped() -> None:
    harness = Harness()
    warmup = Warmup(EngineWarmer(harness.loop, NOBODY, block_size=BLOCK), WarmupOptions(unit=BLOCK), [PROMPT])
    harness.loop.stop()
    warmup.start()
    assert warmup.first_pass_ended.wait(DEADLINE)
    warmup.close()
    assert warmup.report().phase is WarmupPhase.FAILED
    assert "stop" in warmup.report().problems[0]


@pytest.mark.parametrize("tenant", ["", A], ids=["everybody", "tenant"])
def test_use_teaches_the_next_start(tenant: str, tmp_path: Path) -> None:
    tenants = TENANTS if tenant else NOBODY
    prompt = replace(PROMPT, tenant=tenant)

    def learned(harness: Harness) -> LearnedPrompts:
        chain = EngineWarmer(harness.loop, tenants, block_size=BLOCK).chain
        return LearnedPrompts(tmp_path, ROOT, chain)

    first = Harness()
    with warming(first, tenants=tenants, learned=learned(first)):
        assert [ask(first, prompt, tenants, str(number)) for number in range(3)] == [0, 40, 40]
    second = Harness()
    with warming(second, tenants=tenants, learned=learned(second)) as warmup:
        assert (warmup.report().learned, warmup.report().restored) == (1, 1)
        assert ask(second, prompt, tenants) == 40
    third = Harness()
    assert learned(third).restore() == [prompt]  # what the warmup itself reused counts for nothing
