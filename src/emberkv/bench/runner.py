"""The stage: plays a workload's conversations against a server and records every request."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import httpx

from emberkv.bench.client import Answer, Clock, Target, ask
from emberkv.bench.workload import Message, Workload


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


class _Run:
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
    run = _Run(client, target, workload, clock, on_record)
    async with asyncio.TaskGroup() as group:
        sessions = [group.create_task(run.converse(session)) for session in range(workload.sessions)]
    return [record for session in sessions for record in session.result()]
