"""What the next prompts of conversations begin with is computed while the server is idle."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.core.sequence import BACKGROUND_PRIORITY
from emberkv.engine.request import Engine, EngineStats, GenerationRequest, OutputListener
from emberkv.serving.api.conversation import Conversation
from emberkv.serving.api.rendering import NextPrompt, next_prompt
from emberkv.serving.app import ServingSettings
from emberkv.serving.lifecycle import AnsweringWorkers, Lifecycle, ServedModel
from emberkv.serving.next_turns import MOST_WAITING, _Budget
from emberkv.serving.parsing.events import ParsedMessage
from emberkv.serving.template_study import rewrites_turns
from tests.serving.core_engine import UNIT, CoreEngine
from tests.serving.fakes import FakeEngine, Script
from tests.serving.family_tokenizer import FamilyTokenizer
from tests.serving.harness import MODEL, serving
from tests.serving.parsing.families import FAMILIES, TOOLS
from tests.waiting import DEADLINE, eventually

CALL = '<think>\nThe file says it.\n</think>\n\n<tool_call>\n{"name": "read", "arguments": {"path": "a"}}\n</tool_call>'
SAID = "<think>\nNow I know it.\n</think>\n\nThose of Mill Lane."


class LargeEngine(CoreEngine):
    context_length = 20_000
    max_prompt_tokens = 19_000

    def __init__(self) -> None:
        super().__init__(blocks=5000)


class PausingEngine(FakeEngine):
    """Says ``Done.``; while ``pauses``, it does not end what is computed in the background."""

    context_length = 20_000
    max_prompt_tokens = 19_000

    def __init__(self) -> None:
        super().__init__()
        self.engine_stats = EngineStats(block_size=4, free_blocks=10_000)
        self.pauses = True

    @property
    def background(self) -> list[GenerationRequest]:
        return [each for each in self.submitted if each.priority >= BACKGROUND_PRIORITY]

    def submit(self, request: GenerationRequest, listener: OutputListener) -> None:
        pauses = self.pauses and request.priority >= BACKGROUND_PRIORITY
        self.script = Script("Done.", pause_after=0 if pauses else None)
        super().submit(request, listener)


@dataclass
class Agent:
    """A client that sends the tools of `families`."""

    http: httpx.Client

    def ask(self, *messages: dict[str, Any], session: str = "s", tools: bool = True) -> tuple[dict[str, Any], int]:
        """The answer's message, and the prompt tokens that were cached."""
        body = {"model": MODEL, "messages": messages, "max_tokens": 500, **({"tools": TOOLS} if tools else {})}
        answer = self.http.post("/v1/chat/completions", json=body, headers={"x-session-id": session})
        answer.raise_for_status()
        found = answer.json()
        return found["choices"][0]["message"], found["usage"]["prompt_tokens_details"]["cached_tokens"]

    def counted(self, metric: str) -> float:
        lines = [line for line in self.http.get("/metrics").text.splitlines() if line.startswith(f"{metric} ")]
        (line,) = lines
        return float(line.split()[-1])

    def outcomes(self, outcome: str) -> float:
        return self.counted(f'emberkv_next_turn_prompts_total{{outcome="{outcome}"}}')


@contextmanager
def agent(
    engine: Engine, tokens: int = 100_000, *, family: str = "Qwen3", workers: AnsweringWorkers | None = None
) -> Iterator[Agent]:
    tokenizer, output_format = FamilyTokenizer(FAMILIES[family]), FAMILIES[family].format
    rewrites = rewrites_turns(tokenizer, reasons=True)
    lifecycle = Lifecycle()
    model = ServedModel((MODEL,), 0, engine, tokenizer, output_format=output_format, rewrites_turns=rewrites)
    lifecycle.loaded(replace(model, answering_workers=workers))
    with (
        serving(lifecycle, ServingSettings(next_turn_tokens=tokens)) as server,
        httpx.Client(base_url=server.url, timeout=DEADLINE, trust_env=False) as http,
    ):
        yield Agent(http)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


SYSTEM = {"role": "system", "content": "You help with files. " * 8}


def replay(engine: LargeEngine, client: Agent, wait: bool) -> tuple[list[dict[str, Any]], int]:
    """A session of a tool loop and a second question: its messages, and the cached tokens of the last prompt."""
    messages = [SYSTEM, user("Which lamps are lit?")]
    engine.answer = list(CALL.encode())
    called, _ = client.ask(*messages)
    messages += [called, {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "All lamps. " * 9}]
    engine.answer = list(SAID.encode())
    said, _ = client.ask(*messages)
    messages += [said, user("And which are broken?")]
    if wait:
        eventually(lambda: client.outcomes("computed"))
    _, cached = client.ask(*messages)
    return messages, cached


def prompt_of(messages: Sequence[Mapping[str, Any]]) -> str:
    return Conversation(messages, TOOLS).prompt_text(FamilyTokenizer(FAMILIES["Qwen3"]))


def test_without_it_the_next_question_hits_up_to_the_first_answer_that_is_rewritten() -> None:
    engine = LargeEngine()
    with agent(engine, tokens=0) as client:
        messages, cached = replay(engine, client, wait=False)
    rewritten = prompt_of(messages).index("<|im_start|>assistant\n") + len("<|im_start|>assistant\n<")
    assert cached == rewritten // UNIT * UNIT


def test_the_next_question_hits_all_before_the_users_text() -> None:
    engine = LargeEngine()
    with agent(engine) as client:
        messages, cached = replay(engine, client, wait=True)
        assert client.counted("emberkv_next_turn_tokens_total") > 0
        assert client.outcomes("computed") >= 1
    text = prompt_of(messages).index("And which are broken?")
    assert cached == text // UNIT * UNIT
    assert [each.request_id[:10] for each in engine.submitted].count("next-turn-") >= 1


def test_nothing_is_computed_behind_a_call_or_for_a_title_or_where_nothing_is_rewritten() -> None:
    engine = LargeEngine()
    with agent(engine) as client:
        engine.answer = list(CALL.encode())
        client.ask(SYSTEM, user("Which lamps are lit?"))
        engine.answer = list(SAID.encode())
        client.ask(SYSTEM, user("Write a title"), tools=False)
        assert client.counted("emberkv_next_turn_waiting") == 0
    assert not rewrites_turns(FamilyTokenizer(FAMILIES["Qwen2.5"]), reasons=True)
    with agent(engine, family="Qwen2.5") as client:
        client.ask(SYSTEM, user("Which lamps are lit?"))
        assert client.counted("emberkv_next_turn_waiting") == 0
    assert not [each for each in engine.submitted if each.request_id.startswith("next-turn-")]


@pytest.fixture
def pausing() -> Iterator[PausingEngine]:
    engine = PausingEngine()
    yield engine
    engine.stop()


def test_a_request_interrupts_it_and_the_rest_follows(pausing: PausingEngine) -> None:
    with agent(pausing) as client:
        client.ask(SYSTEM, user("Which lamps are lit?"))
        eventually(lambda: pausing.background)
        client.ask(user("Write a title"), tools=False)
        (first,) = pausing.aborted
        assert first == pausing.background[0].request_id
        eventually(lambda: len(pausing.background) == 2)
        pausing.pauses = False
        pausing.resume()
        eventually(lambda: client.outcomes("computed"))
        assert client.counted("emberkv_next_turn_interruptions_total") == 1
    one, other = pausing.background
    assert list(one.prompt_token_ids) == list(other.prompt_token_ids)


def test_the_conversations_own_next_request_ends_it(pausing: PausingEngine) -> None:
    with agent(pausing) as client:
        question = [SYSTEM, user("Which lamps are lit?")]
        said, _ = client.ask(*question)
        eventually(lambda: pausing.background)
        client.ask(*question, said, user("And now?"))
        eventually(lambda: client.outcomes("replaced"))
        eventually(lambda: len(pausing.background) == 2)
        assert client.outcomes("replaced") == 1
    one, other = pausing.background
    assert len(other.prompt_token_ids) > len(one.prompt_token_ids)


class OneWorker:
    """The workers of a gateway with one worker."""

    def __init__(self) -> None:
        self.is_idle = False
        self.epoch: bytes | None = b"1"

    def worker_of(self, _request_id: str) -> str:
        return "a"

    def epoch_of(self, worker_id: str) -> bytes | None:
        assert worker_id == "a"
        return self.epoch

    def free_tokens(self, worker_id: str) -> int | None:
        assert worker_id == "a"
        return 100_000 if self.is_idle else None


def test_at_a_gateway_it_waits_for_the_worker_that_has_answered(pausing: PausingEngine) -> None:
    workers = OneWorker()
    pausing.engine_stats = EngineStats(block_size=4, free_blocks=0)  # which is asked of the worker instead
    with agent(pausing, workers=workers) as client:
        client.ask(SYSTEM, user("Which lamps are lit?"))
        client.ask(user("Write a title"), tools=False)
        assert client.counted("emberkv_next_turn_waiting") == 1
        assert not pausing.background
        workers.is_idle = True
        eventually(lambda: pausing.background)
        (background,) = pausing.background
        assert background.worker == "a"
        client.ask(user("Write a title"), tools=False)  # which goes elsewhere, for all that is known here
        assert not pausing.aborted
        pausing.resume()
        eventually(lambda: client.outcomes("computed"))


def test_at_a_gateway_the_conversations_own_next_request_ends_it(pausing: PausingEngine) -> None:
    workers = OneWorker()
    with agent(pausing, workers=workers) as client:
        question = [SYSTEM, user("Which lamps are lit?")]
        said, _ = client.ask(*question)
        workers.is_idle = True
        eventually(lambda: pausing.background)
        client.ask(*question, said, user("And now?"))
        eventually(lambda: client.outcomes("replaced"))
        assert pausing.aborted == [pausing.background[0].request_id]


@pytest.mark.parametrize("epoch", [None, b"2"], ids=["gone", "started anew"])
def test_at_a_gateway_nothing_waits_for_a_worker_that_has_lost_its_blocks(
    pausing: PausingEngine, epoch: bytes | None
) -> None:
    workers = OneWorker()
    with agent(pausing, workers=workers) as client:
        client.ask(SYSTEM, user("Which lamps are lit?"))
        assert client.counted("emberkv_next_turn_waiting") == 1
        workers.epoch = epoch
        eventually(lambda: client.outcomes("worker_lost"))
        assert client.counted("emberkv_next_turn_waiting") == 0
    assert not pausing.background


def test_at_a_gateway_none_waits_whose_worker_is_gone_by_the_end_of_the_answer(pausing: PausingEngine) -> None:
    workers = OneWorker()
    workers.epoch = None
    with agent(pausing, workers=workers) as client:
        client.ask(SYSTEM, user("Which lamps are lit?"))
        assert client.outcomes("worker_lost") == 1
        assert client.counted("emberkv_next_turn_waiting") == 0


@pytest.mark.parametrize(
    ("outcome", "tokens", "free_blocks"), [("over_budget", 20, 10_000), ("pool_too_small", 100_000, 10)]
)
def test_it_has_limits(pausing: PausingEngine, outcome: str, tokens: int, free_blocks: int) -> None:
    pausing.engine_stats = EngineStats(block_size=4, free_blocks=free_blocks)
    with agent(pausing, tokens) as client:
        client.ask(SYSTEM, user("Which lamps are lit?"))
        eventually(lambda: client.outcomes(outcome))
    assert not pausing.background


def test_the_queue_is_bounded(pausing: PausingEngine) -> None:
    with agent(pausing) as client:
        for number in range(MOST_WAITING + 3):
            client.ask(user(f"Question {number}"), session=f"s{number}")
        eventually(lambda: client.outcomes("queue_full") >= 1)
        assert client.counted("emberkv_next_turn_waiting") <= MOST_WAITING


def test_a_budget_fills_up_again() -> None:
    now = [0.0]
    budget = _Budget(60, lambda: now[0])
    assert [budget.take(50), budget.take(20)] == [True, False]
    now[0] = 9.0
    assert not budget.take(20)
    now[0] = 10.0
    assert budget.take(20)
    now[0] = 1000.0
    assert [budget.take(61), budget.take(60)] == [False, True]


@pytest.mark.parametrize("family", ["Qwen3", "Qwen3.5", "GLM-4.5", "Mistral-Nemo"])
@settings(max_examples=15, deadline=None)
@given(text=st.text(min_size=1), thought=st.sampled_from(["", "Now I know it."]))
def test_the_next_prompt_begins_so_whatever_the_user_writes(family: str, text: str, thought: str) -> None:
    tokenizer = FamilyTokenizer(FAMILIES[family])
    asked = [SYSTEM, user("Which lamps are lit?")]

    def encode(conversation: Conversation) -> "array[int]":
        return array("i", tokenizer.encode(conversation.prompt_text(tokenizer), add_special_tokens=False))

    begins = NextPrompt(Conversation(asked, TOOLS), encode).tokens(ParsedMessage(thought, "Those of Mill Lane."))
    said = {"role": "assistant", "content": "Those of Mill Lane.", "reasoning_content": thought}
    following = Conversation([*asked, said, user("\0" + text)], TOOLS).prompt_text(tokenizer)
    assert bytes(begins.tolist()).decode() == following[: following.index("\0")]


def test_a_conversation_that_hardly_goes_on_has_no_next_prompt() -> None:
    said = [user("Hi"), {"role": "assistant", "content": "Hello"}, user("Write on")]
    for goes_on in (Conversation(said), Conversation(said[:1], TOOLS)):
        assert next_prompt(goes_on, lambda _: array("i")) is not None
    for ends in (Conversation(said[:1]), Conversation(said, begun="I think")):
        assert next_prompt(ends, lambda _: array("i")) is None
