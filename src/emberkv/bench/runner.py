"""Plays a workload's conversations against a server, after a look at what it serves, and records every request."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import httpx
from pydantic import BaseModel, ValidationError

from emberkv.bench.client import Answer, Clock, Target, ask
from emberkv.bench.workload import Message, Workload
from emberkv.errors import ConfigError

SHORT_WORDS, LONG_WORDS = 32, 288


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


async def first_model(client: httpx.AsyncClient) -> str:
    """The first name of ``/v1/models``. Raises ConfigError when the server cannot be reached or names none."""
    accepted = "the URL of a running OpenAI-compatible server, and its key where it needs one"
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        models = _Models.model_validate_json(response.content).data
    except (httpx.HTTPError, ValidationError) as error:
        raise ConfigError(f"{client.base_url}/v1/models gives {error!r}; url must be {accepted}") from error
    if not models:
        raise ConfigError(f"{client.base_url}/v1/models lists no model; give one by name")
    return models[0].id


async def tokens_per_word(client: httpx.AsyncClient, target: Target, nonce: str, clock: Clock) -> float | None:
    """How many tokens the model makes of one generated word, from two prompts of different length.

    Their difference leaves out the chat template. None when the server reports no prompt tokens. Raises ConfigError
    when it does not answer. Costs two one-token answers, which also wake a server that loads on first use.
    """
    lengths = []
    for words in (SHORT_WORDS, LONG_WORDS):
        probe = Workload(user_tokens=words, nonce=f"probe {nonce} {words}")
        answer = await ask(client, target, [probe.question(0, 0)], max_tokens=1, clock=clock)
        if answer.error:
            raise ConfigError(f"{client.base_url} does not answer a plain request: {answer.error}")
        lengths.append(answer.usage.prompt_tokens if answer.usage else None)
    short, long = lengths
    if short is None or long is None or long <= short:
        return None
    return (long - short) / (LONG_WORDS - SHORT_WORDS)


class Phase(Enum):
    """What the server could have had in its cache when the request was sent."""

    COLD = "cold"  # nothing: no request with this system prompt had begun to be answered
    FIRST_TURN = "first turn"  # the shared system prompt
    FOLLOW_UP = "follow-up turn"  # the whole conversation so far


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request of the workload. ``answer`` is None for one never sent, because an earlier turn failed."""

    session: int
    turn: int
    phase: Phase
    messages: tuple[Message, ...]
    answer: Answer | None

    @property
    def error(self) -> str | None:
        return self.answer.error if self.answer else "not sent: an earlier turn of the conversation failed"


class _Conversations:
    """The state that a run's conversations share."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        target: Target,
        workload: Workload,
        clock: Clock,
        on_record: Callable[[RequestRecord], None],
    ) -> None:
        self._client, self._target, self._clock = client, target, clock
        self._workload = workload
        self._on_record = on_record
        self._prompt_is_warm = False
        self._seats = asyncio.Semaphore(workload.concurrency)

    async def converse(self, session: int) -> list[RequestRecord]:
        async with self._seats:
            records: list[RequestRecord] = []
            history = self._workload.opening()
            for turn in range(self._workload.turns):
                history.append(self._workload.question(session, turn))
                broken = bool(records) and records[-1].error is not None
                phase = self._phase(turn)
                answer = None if broken else await self._ask(history)
                record = RequestRecord(session, turn, phase, tuple(history), answer)
                records.append(record)
                self._on_record(record)
                if answer is not None:
                    history.append({"role": "assistant", "content": answer.text})
            return records

    def _phase(self, turn: int) -> Phase:
        if turn > 0:
            return Phase.FOLLOW_UP
        return Phase.FIRST_TURN if self._prompt_is_warm else Phase.COLD

    async def _ask(self, history: list[Message]) -> Answer:
        return await ask(
            self._client, self._target, history,
            max_tokens=self._workload.answer_tokens, clock=self._clock, on_text=self._warmed,
        )  # fmt: skip

    def _warmed(self) -> None:
        self._prompt_is_warm = self._workload.system_tokens > 0


async def run_workload(
    client: httpx.AsyncClient,
    target: Target,
    workload: Workload,
    clock: Clock,
    *,
    on_record: Callable[[RequestRecord], None] = lambda record: None,
) -> list[RequestRecord]:
    """Plays all conversations, at most ``workload.concurrency`` at a time, each turn after its predecessor's answer.

    Returns one record for every request of the workload, by session and turn, failed ones included; never raises
    for a failed request. ``on_record`` is called as each is done.
    """
    run = _Conversations(client, target, workload, clock, on_record)
    async with asyncio.TaskGroup() as group:
        sessions = [group.create_task(run.converse(session)) for session in range(workload.sessions)]
    return [record for session in sessions for record in session.result()]
