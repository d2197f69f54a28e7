"""Constrained answers are valid, and the same to the last bit however the engine comes to compute them.

The executor is of NumPy with logits that depend on every byte of KV state, and the tokenizer is the tiny models'.
"""

import json
import random
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from emberkv.core.hashing import root_hash
from emberkv.core.sequence import FinishReason
from emberkv.engine.assembly import AssembledEngine, EngineConfig, assemble_around
from emberkv.engine.constraints import MAX_COMPILED, ConstraintCompiler, GrammarTokenizer
from emberkv.engine.request import Constraint, GenerationRequest, ModelLimits, SamplingParams
from emberkv.engine.tokenization.hf_tokenizer import HFTokenizer
from emberkv.errors import EngineStoppedError, RequestError
from emberkv.serving.cache.service import text_of as text_of_tokens
from tests.engine.loop_harness import Inbox
from tests.engine.tiny_executor import TinyExecutor
from tests.models import VOCAB_SIZE, tiny_tokenizer
from tests.waiting import DEADLINE

BLOCK, CHUNK, CONTEXT, EOS = 4, 8, 200, 2
TOKENIZER = HFTokenizer(tiny_tokenizer())

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["river", "lake", "reader"]},
        "deep": {"type": "boolean"},
        "lamps": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["kind", "deep", "lamps"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
OBJECT = Constraint("json_schema", json.dumps(SCHEMA))
DIGITS = Constraint("regex", "[0-9]{8}")


def compiler(tokenizer: GrammarTokenizer = TOKENIZER) -> ConstraintCompiler:
    return ConstraintCompiler(tokenizer, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({EOS}))


@contextmanager
def serving(
    *, num_blocks: int = 64, constraints: ConstraintCompiler | None = None, starts: bool = True, tokenizer: bool = True
) -> Iterator[AssembledEngine]:
    executor = TinyExecutor(num_blocks=num_blocks, block_size=BLOCK, vocab=VOCAB_SIZE)
    made = assemble_around(
        executor,
        EngineConfig(cache_bytes=0, block_size=BLOCK, prefill_chunk=CHUNK, max_step_tokens=2 * CHUNK),
        limits=ModelLimits(CONTEXT, VOCAB_SIZE, frozenset({EOS})),
        root=root_hash("model", BLOCK),
        namespace=bytes(32),
        constraints=constraints or (compiler() if tokenizer else None),
    )
    if starts:
        made.loop.start()
    try:
        yield made
    finally:
        made.close(60.0)
        made.scheduler.cache.pool.check_integrity(holders=[])


def submit(
    engine: AssembledEngine,
    name: str,
    prompt: Sequence[int],
    constraint: Constraint | None,
    *,
    new: int = 80,
    answered: int = 0,
    **params: object,
) -> Inbox:
    inbox = Inbox()
    chosen = {"temperature": 1.0, "seed": 5, "logprobs": 2, **params}
    sampling = SamplingParams(max_tokens=new, constraint=constraint, **chosen)  # type: ignore[arg-type]  # fields by name
    engine.loop.submit(GenerationRequest(name, list(prompt), sampling, answered=answered), inbox)
    return inbox


def prompt_of(seed: str, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


PROMPT = prompt_of("constrained", 26)


def answer_alone(constraint: Constraint = OBJECT, **params: object) -> Inbox:
    with serving() as engine:
        inbox = submit(engine, "alone", PROMPT, constraint, **params)  # type: ignore[arg-type]  # fields by name
        inbox.wait()
    return inbox


def text_of(inbox: Inbox) -> str:
    return text_of_tokens(TOKENIZER, inbox.tokens)


def assert_same(ours: Inbox, theirs: Inbox) -> None:
    assert ours.tokens == theirs.tokens
    scores = [[each for output in inbox.outputs for each in output.logprobs] for inbox in (ours, theirs)]
    assert scores[0] == scores[1]
    assert ours.reason is theirs.reason


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"seed": 1}, {"seed": 2, "top_k": 5}, {"seed": 3, "min_p": 0.2}]
)
def test_an_answer_follows_its_schema_and_ends(params: dict[str, object]) -> None:
    inbox = answer_alone(**params)
    assert inbox.reason is FinishReason.STOP
    found = json.loads(text_of(inbox))
    assert found["kind"] in SCHEMA["properties"]["kind"]["enum"]  # type: ignore[index]  # a nested literal
    assert isinstance(found["deep"], bool)
    assert all(type(lamp) is int and 0 <= lamp <= 99 for lamp in found["lamps"])


def test_a_regular_expression_and_a_grammar_hold() -> None:
    assert re.fullmatch("[0-9]{8}", text_of(answer_alone(DIGITS)))
    assert text_of(answer_alone(Constraint("lark", 'start: "yes" | "no"'))) in ("yes", "no")


def test_a_complete_answer_ends_even_with_ignore_eos() -> None:
    inbox = answer_alone(DIGITS, ignore_eos=True)
    assert (inbox.reason, len(text_of(inbox))) == (FinishReason.STOP, 8)


def test_special_tokens_are_excluded_but_for_markers() -> None:
    free, likely = 'start: "<" /(.|\\n){30}/', {1: 100.0}
    assert 1 not in answer_alone(Constraint("lark", free), logit_bias=likely).tokens
    assert 1 not in answer_alone(Constraint("lark", 'start: "<|im_start|>" /[a-z]/'), logit_bias=likely).tokens
    quoted = Constraint("lark", 'start: "<|im_start|>" /[a-z]/', markers=("<|im_start|>",))
    answer = answer_alone(quoted, logit_bias=likely)
    assert (answer.tokens[0], answer.reason) == (1, FinishReason.STOP)


def test_a_hit_and_other_requests_change_no_bit() -> None:
    alone = answer_alone()
    with serving() as engine:
        beside = [submit(engine, f"other {n}", prompt_of(f"{n}", 20), DIGITS, seed=n) for n in range(3)]
        first = submit(engine, "first", PROMPT, OBJECT)
        first.wait()
        again = submit(engine, "again", PROMPT, OBJECT)
        again.wait()
        assert all(other.reason is FinishReason.STOP for other in beside)
        usage = again.outputs[0].usage
    assert_same(first, alone)
    assert_same(again, alone)
    assert usage is not None
    assert usage.cached_tokens == len(PROMPT) - 1


def test_a_preemption_changes_no_bit() -> None:
    alone = answer_alone()
    assert len(alone.tokens) > 20
    with serving(num_blocks=27, starts=False) as engine:
        older = submit(engine, "older", prompt_of("older", 24), None, new=70, ignore_eos=True)
        preempted = submit(engine, "preempted", PROMPT, OBJECT)
        engine.loop.start()
        older.wait()
        preempted.wait()
        assert_same(preempted, alone)
        assert engine.scheduler.stats.preemptions > 0


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"seed": 9, "top_p": 0.9}])
def test_an_answer_that_is_cut_anywhere_goes_on_elsewhere(params: dict[str, object]) -> None:
    whole = answer_alone(**params)
    with serving() as engine:
        for length in range(1, len(whole.tokens)):
            so_far = whole.tokens[:length]
            rest = submit(engine, f"{length}", [*PROMPT, *so_far], OBJECT, answered=length, **params)  # type: ignore[arg-type]
            rest.wait()
            assert so_far + rest.tokens == whole.tokens


def test_an_answer_that_does_not_follow_cannot_go_on() -> None:
    with serving() as engine:
        last = submit(engine, "a", [*PROMPT, 300, 300], OBJECT, answered=2).wait()
    assert last.finish_reason is FinishReason.ERROR
    assert isinstance(last.refusal, RequestError)


def test_what_cannot_be_compiled_is_refused_and_others_are_served() -> None:
    with serving() as engine:
        refused = submit(engine, "refused", PROMPT, Constraint("lark", "start: <|nothing|>")).wait()
        assert submit(engine, "served", PROMPT, DIGITS).reason is FinishReason.STOP
    assert isinstance(refused.refusal, RequestError)
    assert "unknown special token" in str(refused.refusal)


def test_constraints_are_compiled_once_and_masks_counted() -> None:
    with serving() as engine:
        answers = [submit(engine, f"{n}", PROMPT, DIGITS, seed=n) for n in range(3)]
        tokens = sum(len(answer.tokens) for answer in answers if answer.wait())
        engine.loop.stop()
        stats = engine.loop.stats()
    assert stats.compiled_constraints == 1
    assert stats.masks_ready + stats.masks_waited == tokens + len(answers)  # and one for the end of each


def test_no_more_constraints_are_kept_than_the_bound() -> None:
    constraints = compiler()
    for number in [*range(MAX_COMPILED + 1), MAX_COMPILED, 0]:
        constraints.begin(Constraint("regex", f"{number}")).allowed()
    assert constraints.counts.compiled == MAX_COMPILED + 2
    constraints.close()


class SlowTokenizer(HFTokenizer):
    """Answers once it may."""

    def __init__(self) -> None:
        super().__init__(tiny_tokenizer())
        self.asked = threading.Event()
        self.may_give = threading.Event()

    def backend_json(self) -> str:
        self.asked.set()
        assert self.may_give.wait(DEADLINE)
        return super().backend_json()


def test_others_are_served_while_a_constraint_is_compiled() -> None:
    slow = SlowTokenizer()
    with serving(constraints=compiler(slow)) as engine:
        waiting = submit(engine, "waiting", PROMPT, DIGITS)
        assert slow.asked.wait(DEADLINE)
        assert submit(engine, "other", PROMPT, None, new=5, ignore_eos=True).reason is FinishReason.LENGTH
        assert not waiting.outputs
        slow.may_give.set()
        assert waiting.reason is FinishReason.STOP


def test_what_is_being_compiled_can_be_aborted_and_its_id_used_again() -> None:
    slow = SlowTokenizer()
    with serving(constraints=compiler(slow)) as engine:
        aborted = submit(engine, "a", PROMPT, DIGITS)
        engine.loop.abort("a")
        assert aborted.reason is FinishReason.ABORT
        again = submit(engine, "a", PROMPT, DIGITS)
        slow.may_give.set()
        assert again.reason is FinishReason.STOP
    assert not aborted.tokens


def test_an_engine_that_stops_ends_what_is_being_compiled() -> None:
    slow = SlowTokenizer()
    with serving(constraints=compiler(slow)) as engine:
        waiting = submit(engine, "waiting", PROMPT, DIGITS)
        engine.loop.stop()
        assert waiting.reason is FinishReason.ABORT
        slow.may_give.set()
        with pytest.raises(EngineStoppedError):
            submit(engine, "late", PROMPT, DIGITS)


def test_an_engine_without_a_tokenizer_refuses_constraints() -> None:
    with serving(tokenizer=False) as engine, pytest.raises(RequestError, match="has no tokenizer"):
        submit(engine, "a", PROMPT, DIGITS)
