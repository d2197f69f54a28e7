"""The warmup: what is warmed when, how it ends in time, and what it tells."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from emberkv.core.hashing import TokenChain
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import CacheUsage, OutputListener, TokenOutput
from emberkv.errors import ConfigError, EngineStoppedError, PromptTooLongError
from emberkv.serving.warmup.learned_prompts import LearnedPrompts
from emberkv.serving.warmup.warm_prompt import WarmPrompt, kept_hashes
from emberkv.serving.warmup.warmup import Warmup, WarmupOptions, WarmupPhase, WarmupReport
from tests.waiting import DEADLINE, eventually

BLOCK = 2
ROOT = b"r" * 32
ONE, TWO, THREE = (WarmPrompt((number,) * 8) for number in (1, 2, 3))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakePool:
    """An engine that computes a prompt in ``seconds`` of its clock, unless ``stuck`` or set to end it otherwise.

    computed: the prompts it was asked for, in order. blocks_done: of a stuck prompt, those that are cached by then.
    """

    clock: Clock = field(default_factory=Clock)
    seconds: float = 0.5
    stuck: bool = False
    blocks_done: int = 0
    finish: FinishReason = FinishReason.LENGTH
    size: int = 1000
    refusal: Exception | None = None
    broken: Exception | None = None
    computed: list[WarmPrompt] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    listeners: dict[str, OutputListener] = field(default_factory=dict)
    cached: set[bytes] = field(default_factory=set)
    kept: list[bytes] = field(default_factory=list)
    began: threading.Event = field(default_factory=threading.Event)

    def chain(self, prompt: WarmPrompt) -> TokenChain:
        if prompt.tenant == "gone":
            raise ConfigError("tenant 'gone' is unknown")
        return TokenChain(ROOT, prompt.tokens, BLOCK, owner=prompt.tenant, salt=prompt.tenant.encode())

    def cached_tokens(self, chain: TokenChain) -> int:
        if self.broken is not None:
            raise self.broken
        count = 0
        for block_hash in chain.block_hashes:
            if block_hash not in self.cached:
                break
            count += 1
        is_whole = set(kept_hashes(chain)) <= self.cached
        return len(chain) if is_whole else count * BLOCK

    def keep(self, chain: TokenChain) -> None:
        self.kept += [block_hash for block_hash in kept_hashes(chain) if block_hash not in self.kept]

    def unretain(self, block_hashes: Iterable[bytes]) -> None:
        self.kept = [block_hash for block_hash in self.kept if block_hash not in set(block_hashes)]

    def room(self) -> int:
        return (self.size - len(self.cached)) * BLOCK

    def compute(self, prompt: WarmPrompt, request_id: str, listener: OutputListener) -> None:
        self.computed.append(prompt)
        if self.refusal is not None:
            raise self.refusal
        chain = self.chain(prompt)
        done = chain.block_hashes[: self.blocks_done] if self.stuck else kept_hashes(chain)
        usage = CacheUsage(len(prompt.tokens), self.cached_tokens(chain))
        self.cached.update(done[: self.size - len(self.cached)])
        self.listeners[request_id] = listener
        self.began.set()
        if not self.stuck:
            del self.listeners[request_id]
            self.clock.now += self.seconds
            error = "out of order" if self.finish is FinishReason.ERROR else None
            listener(TokenOutput(request_id, (7,), usage=usage, finish_reason=self.finish, error=error))

    def abort(self, request_id: str) -> None:
        if request_id in self.listeners:
            self.aborted.append(request_id)
            self.clock.now += self.seconds
            self.listeners.pop(request_id)(TokenOutput(request_id, finish_reason=FinishReason.ABORT))

    def lose(self, prompt: WarmPrompt, blocks: int) -> list[bytes]:
        """Evict from the prompt's tail."""
        lost = list(self.chain(prompt).block_hashes[-blocks:])
        self.cached.difference_update(lost)
        return lost


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@pytest.fixture
def make(pool: FakePool) -> Iterator["Maker"]:
    maker = Maker(pool)
    yield maker
    for warmup in maker.made:
        warmup.close()


class Maker:
    """Makes warmups over one pool."""

    def __init__(self, pool: FakePool) -> None:
        self.pool = pool
        self.made: list[Warmup] = []
        self.ready: list[WarmupPhase] = []

    def __call__(
        self,
        *prompts: WarmPrompt,
        learned: LearnedPrompts | None = None,
        problems: tuple[str, ...] = (),
        **settings: object,
    ) -> Warmup:
        warmup = Warmup(
            self.pool,
            WarmupOptions(**settings),  # type: ignore[arg-type]  # fields by name
            prompts,
            problems=problems,
            learned=learned,
            on_ready=lambda: self.ready.append(warmup.report().phase),
            clock=self.pool.clock,
        )
        self.made.append(warmup)
        return warmup

    def run(self, *prompts: WarmPrompt, **arguments: object) -> Warmup:
        """One whose first pass has ended."""
        warmup = self(*prompts, **arguments)  # type: ignore[arg-type]  # settings by name
        warmup.start()
        assert warmup.first_pass_ended.wait(DEADLINE)
        return warmup


def test_all_prompts_are_warmed_and_then_it_is_ready(make: Maker, pool: FakePool) -> None:
    report = make.run(ONE, TWO, unit=4).report()
    assert pool.computed == [ONE, TWO]
    assert report == WarmupReport(
        WarmupPhase.DONE, prompts=2, warm_prompts=2, tokens=16, computed_tokens=16, seconds=1.0
    )
    assert report.is_warm
    assert str(report) == "done: 2 of 2 prompts warm, 16 tokens, 1.0 s"
    eventually(lambda: make.ready == [WarmupPhase.DONE])


def test_what_is_cached_already_is_not_computed(make: Maker, pool: FakePool) -> None:
    pool.cached.update(pool.chain(ONE).block_hashes)
    assert make.run(ONE).report() == WarmupReport(WarmupPhase.DONE, prompts=1, warm_prompts=1, tokens=8)
    assert pool.computed == []


def test_prompts_are_cut_to_what_can_be_hit(make: Maker, pool: FakePool) -> None:
    report = make.run(WarmPrompt(tuple(range(11))), unit=4).report()
    assert pool.computed == [WarmPrompt(tuple(range(8)))]
    assert (report.phase, report.prompts, report.tokens) == (WarmupPhase.DONE, 1, 8)


def test_a_prompt_shorter_than_what_can_be_hit_is_a_problem_that_readiness_waits_for(make: Maker) -> None:
    report = make.run(ONE, WarmPrompt((1, 2, 3)), unit=4, required=True).report()
    assert (report.phase, report.prompts, report.warm_prompts) == (WarmupPhase.FAILED, 2, 1)
    assert report.problems == (
        "requests with a system prompt have 3 tokens in common, too few to be kept warm: 4 are reused at a time",
    )
    assert make.ready == []


def test_where_hits_end_at_any_token_a_short_prompt_is_warmed_whole(make: Maker, pool: FakePool) -> None:
    report = make.run(WarmPrompt((1,)), WarmPrompt((2, 3, 4)), required=True).report()
    assert (report.phase, report.prompts, report.warm_prompts, report.tokens) == (WarmupPhase.DONE, 2, 2, 4)
    assert report.problems == ()
    assert set(pool.kept) == {hash_ for prompt in pool.computed for hash_ in kept_hashes(pool.chain(prompt))}
    eventually(lambda: make.ready == [WarmupPhase.DONE])


def test_a_partial_block_is_looked_at_again_because_no_event_tells_of_its_loss(make: Maker, pool: FakePool) -> None:
    prompt = WarmPrompt((2, 3, 4))
    warmup = make(prompt, rewarm_seconds=30.0)
    assert warmup.tick() == pytest.approx(30)
    pool.clock.now += 30
    assert warmup.tick() == pytest.approx(30)
    assert pool.computed == [prompt]
    pool.cached.discard(kept_hashes(pool.chain(prompt))[-1])
    pool.clock.now += 30
    warmup.tick()
    assert pool.computed == [prompt, prompt]
    assert warmup.report().is_warm


def test_a_pin_ends_by_its_full_blocks_alone(make: Maker, pool: FakePool) -> None:
    warmup = make(WarmPrompt((2,)), WarmPrompt((2, 3, 4)), block_size=BLOCK)
    warmup.tick()
    assert not warmup.unpin([])
    assert warmup.unpin([2, 3])
    assert warmup.pins() == [WarmPrompt((2,))]
    assert pool.kept == kept_hashes(pool.chain(WarmPrompt((2,))))


def test_the_time_is_up_while_a_prompt_is_computed(make: Maker, pool: FakePool) -> None:
    pool.stuck, pool.blocks_done = True, 3
    report = make.run(ONE, TWO, timeout=0.05, rewarm_seconds=1000.0).report()
    assert pool.computed == [ONE]
    assert len(pool.aborted) == 1
    assert (report.phase, report.warm_prompts, report.tokens, report.computed_tokens) == (
        WarmupPhase.TIMED_OUT, 0, 6, 6,
    )  # fmt: skip
    assert report.timeouts == 2
    assert report.problems == ("prompt 1: the time was up", "prompt 2: the time was up before it began")
    eventually(lambda: make.ready == [WarmupPhase.TIMED_OUT])


def test_the_time_is_up_between_prompts(make: Maker, pool: FakePool) -> None:
    pool.seconds = 6.0
    report = make.run(ONE, TWO, THREE, timeout=10.0, rewarm_seconds=1000.0).report()
    assert pool.computed == [ONE, TWO]
    assert (report.phase, report.warm_prompts, report.tokens) == (WarmupPhase.TIMED_OUT, 2, 16)


def test_what_timed_out_is_gone_on_with_later(make: Maker, pool: FakePool) -> None:
    pool.seconds = 11.0
    warmup = make(ONE, TWO, timeout=10.0, rewarm_seconds=30.0)
    warmup.tick()
    assert pool.computed == [ONE]
    assert warmup.tick() == pytest.approx(30.0)
    pool.clock.now += 30
    assert warmup.tick() is None
    assert pool.computed == [ONE, TWO]
    assert warmup.report().is_warm


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"refusal": PromptTooLongError("it is too long")}, "it is too long"),
        ({"refusal": EngineStoppedError("it has stopped")}, "it has stopped"),
        ({"broken": EngineStoppedError("no answer")}, "no answer"),
        ({"finish": FinishReason.ERROR, "size": 0}, "out of order"),
        ({"finish": FinishReason.ABORT, "size": 0}, "the engine gave it up"),
        ({"size": 3}, "the pool has kept 6 of 8 tokens"),
    ],
)  # fmt: skip
def test_a_failure_is_told_and_stops_nobody(
    change: dict[str, object], problem: str, make: Maker, pool: FakePool, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in change.items():
        setattr(pool, name, value)
    report = make.run(ONE).report()
    assert (report.phase, report.prompts, report.warm_prompts) == (WarmupPhase.FAILED, 1, 0)
    assert report.problems == (f"prompt 1: {problem}",)
    assert problem in caplog.text
    eventually(lambda: make.ready == [WarmupPhase.FAILED])


def test_a_crash_of_the_warmup_stops_nobody(make: Maker, pool: FakePool, caplog: pytest.LogCaptureFixture) -> None:
    pool.broken = ZeroDivisionError("a bug")
    assert make.run(ONE).report().phase is WarmupPhase.FAILED
    assert "the server goes on without" in caplog.text
    eventually(lambda: make.ready == [WarmupPhase.FAILED])


def test_a_wish_that_cannot_be_a_prompt(make: Maker) -> None:
    report = make.run(ONE, problems=("system prompt 2: the template takes none",)).report()
    assert (report.phase, report.prompts, report.warm_prompts) == (WarmupPhase.FAILED, 2, 1)
    assert report.problems == ("system prompt 2: the template takes none",)


def test_required_readiness_waits_until_all_is_warm(make: Maker, pool: FakePool) -> None:
    pool.size = 6
    warmup = make(ONE, TWO, required=True, rewarm_seconds=30.0)
    warmup.tick()
    assert make.ready == []
    assert not warmup.report().is_warm
    pool.size = 1000
    pool.clock.now += 30
    warmup.tick()
    assert make.ready == [WarmupPhase.RUNNING]
    warmup.tick()
    assert len(make.ready) == 1


def test_required_but_impossible_is_never_ready(make: Maker, pool: FakePool) -> None:
    pool.refusal = PromptTooLongError("it is too long")
    warmup = make.run(ONE, required=True)
    assert warmup.report().required
    assert warmup.tick() is None  # nor is it tried again
    assert pool.computed == [ONE]
    assert make.ready == []


def test_switched_off_it_is_ready_at_once_and_warms_what_is_pinned_later(make: Maker, pool: FakePool) -> None:
    warmup = make.run(enabled=False, required=True)
    eventually(lambda: make.ready == [WarmupPhase.OFF])
    assert warmup.pin(ONE.tokens) == 8
    eventually(lambda: pool.computed == [ONE])
    eventually(lambda: warmup.report().is_warm)
    assert warmup.report().phase is WarmupPhase.OFF


def test_pins_come_and_go(make: Maker, pool: FakePool) -> None:
    warmup = make(unit=4)
    assert warmup.pin([1] * 9, "a") == 8
    assert warmup.pin([1] * 8, "a") == 8
    assert warmup.pin([1] * 8, "b") == 8
    assert warmup.pin([1] * 3, "b") == 0
    assert warmup.pins() == [WarmPrompt((1,) * 8, "a"), WarmPrompt((1,) * 8, "b")]
    warmup.tick()
    assert pool.computed == warmup.pins()
    assert len(pool.kept) == 8
    assert warmup.unpin([1] * 10, "a")
    assert not warmup.unpin([1] * 10, "a")
    assert warmup.pins() == [WarmPrompt((1,) * 8, "b")]
    assert pool.kept == pool.chain(WarmPrompt((1,) * 8, "b")).block_hashes
    assert (warmup.report().prompts, warmup.report().tokens) == (1, 8)


def test_an_unknown_tenants_pin_is_impossible(make: Maker) -> None:
    warmup = make()
    warmup.pin([1] * 8, "gone")
    assert warmup.tick() is None
    assert warmup.report().problems == ("prompt 1: tenant 'gone' is unknown",)


def test_what_was_evicted_is_warmed_again_but_not_too_often(make: Maker, pool: FakePool) -> None:
    warmup = make(ONE, TWO, rewarm_seconds=30.0)
    assert warmup.tick() is None
    warmup.pool_lost(pool.lose(ONE, 1))
    assert warmup.report().warm_prompts == 1
    assert warmup.tick() == pytest.approx(29.5)  # ONE was warm half a second before TWO
    assert pool.computed == [ONE, TWO]
    pool.clock.now += 30
    assert warmup.tick() is None
    assert pool.computed == [ONE, TWO, ONE]
    assert warmup.report().is_warm


def test_others_losses_are_none_of_its_business(make: Maker, pool: FakePool) -> None:
    warmup = make(ONE)
    warmup.tick()
    warmup.pool_lost(pool.chain(TWO).block_hashes)
    pool.clock.now += 1000
    assert warmup.tick() is None
    assert pool.computed == [ONE]


def test_after_a_clear_all_is_warmed_again(make: Maker, pool: FakePool) -> None:
    warmup = make(ONE, TWO, rewarm_seconds=30.0)
    warmup.tick()
    pool.cached.clear()
    warmup.pool_lost(None)
    assert warmup.report().warm_prompts == 0
    pool.clock.now += 30
    warmup.tick()
    assert pool.computed == [ONE, TWO, ONE, TWO]
    assert warmup.report().is_warm


def test_the_thread_wakes_when_something_was_lost(make: Maker, pool: FakePool) -> None:
    warmup = make.run(ONE, rewarm_seconds=0.0)
    warmup.pool_lost(pool.lose(ONE, 2))
    eventually(lambda: pool.computed == [ONE, ONE])
    eventually(lambda: warmup.report().is_warm)


def test_closing_does_not_wait_for_a_prompt(make: Maker, pool: FakePool) -> None:
    pool.stuck = True
    warmup = make(ONE, TWO)
    warmup.start()
    assert pool.began.wait(DEADLINE)
    warmup.close()
    assert len(pool.aborted) == 1
    assert pool.computed == [ONE]


def learned(folder: Path, pool: FakePool) -> LearnedPrompts:
    return LearnedPrompts(folder, ROOT, pool.chain)


def teach(folder: Path, pool: FakePool, *prompts: WarmPrompt) -> None:
    """The first prompt most."""
    earlier = learned(folder, pool)
    for number, prompt in enumerate(reversed(prompts), 1):
        for _ in range(number):
            earlier.used(pool.chain(prompt), len(prompt.tokens))
    earlier.save()


def test_learned_prompts_come_after_the_pinned_the_best_first(make: Maker, pool: FakePool, tmp_path: Path) -> None:
    teach(tmp_path, pool, THREE, WarmPrompt(TWO.tokens, "a"))
    warmup = make.run(ONE, learned=learned(tmp_path, pool))
    assert pool.computed == [ONE, THREE, WarmPrompt(TWO.tokens, "a")]
    report = warmup.report()
    assert (report.phase, report.prompts, report.learned, report.restored) == (WarmupPhase.DONE, 1, 2, 2)
    assert str(report).endswith("; 2 of 2 learned prompts restored")
    warmup.pool_lost(None)
    assert pool.kept == pool.chain(ONE).block_hashes
    assert warmup.pins() == [ONE]  # learned ones are restored but once


def test_learned_prompts_within_the_deadline(make: Maker, pool: FakePool, tmp_path: Path) -> None:
    teach(tmp_path, pool, TWO, THREE)
    pool.seconds = 6.0
    report = make.run(ONE, learned=learned(tmp_path, pool), timeout=10.0).report()
    assert pool.computed == [ONE, TWO]
    assert (report.phase, report.learned, report.restored) == (WarmupPhase.TIMED_OUT, 2, 1)
    assert report.is_warm


def test_learned_prompts_evict_nothing(make: Maker, pool: FakePool, tmp_path: Path) -> None:
    longer = WarmPrompt((9,) * 12)
    teach(tmp_path, pool, longer, TWO, THREE)
    pool.size = 9
    report = make.run(ONE, learned=learned(tmp_path, pool)).report()
    assert pool.computed == [ONE, TWO]
    assert (report.phase, report.learned, report.restored) == (WarmupPhase.DONE, 3, 1)


def test_what_was_learned_is_written_down_at_the_end(make: Maker, pool: FakePool, tmp_path: Path) -> None:
    lessons = learned(tmp_path, pool)
    warmup = make.run(learned=lessons)
    lessons.used(pool.chain(TWO), 8)
    warmup.close()
    assert learned(tmp_path, pool).restore() == [TWO]
