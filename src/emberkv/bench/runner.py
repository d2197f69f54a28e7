"""Makes a workload's conversations, plays them against a server, and records every request."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import httpx
from pydantic import BaseModel, ValidationError

from emberkv.bench.client import Clock, Message, Target, TimedAnswer, ask
from emberkv.errors import ConfigError

_LIST = """
about above across act add after again age ago air all allow alone along also always among animal answer any
appear apple area arm around arrive art ask attack author away back bad ball bank base bear beat beautiful
because become bed before begin behind believe below best better between big bird black blood blow blue board
boat body bone book born both bottom box boy branch bread break bridge bright bring broad brother brown build
burn busy buy call came camp can capital captain car care carry case cat catch cause cell center century
certain chair chance change charge chart check chief child children choose church circle city claim class
clean clear climb clock close clothes cloud coast coat cold collect color column come common company compare
complete condition consider contain continue control cook cool copy corn corner correct cost cotton count
country couple course cover create crop cross crowd cry current cut dance danger dark date daughter day dead
deal dear death decide deep degree depend describe desert design determine develop difference dinner direct
discuss distance divide doctor dog dollar door double down draw dream dress drink drive drop dry during each
ear early earth ease east eat edge effect egg eight either electric element else end enemy energy engine
enough enter equal even evening event ever every exact example except excite exercise expect experience
experiment eye face fact fair fall family famous far farm fast father favor fear feed feel feet fell few field
fight figure fill final find fine finger finish fire first fish fit five flat floor flow flower fly follow
food foot force forest form forward four free fresh friend from front fruit full game garden gas gather gave
general gentle get girl give glad glass go gold good govern grand grass gray great green ground group grow
guess guide gun hair half hand happen happy hard hat have head hear heart heat heavy help here high hill
history hit hold hole home hope horse hot hour house how huge human hundred hunt hurry ice idea imagine inch
include indicate industry insect instant instrument interest invent iron island job join joy jump just keep
key kill kind king knew know lady lake land language large last late laugh law lay lead learn least leave left
leg length less let letter level lie life lift light like line liquid list listen little live locate log lone
long look lost loud love low machine magnet main major make man many map mark market mass master match
material matter mean measure meat meet melody member men metal method middle might mile milk million mind mine
minute miss mix modern molecule moment money month moon more morning most mother motion mount mountain mouth
move much multiply music must name nation natural nature near necessary neck need neighbor never new next
night nine noise noon north nose note nothing notice noun now number object observe occur ocean offer office
often oil old once one only open operate opposite order organ original other over own oxygen page paint pair
paper paragraph parent part party pass past path pattern pay people perhaps period person phrase picture piece
pitch place plain plan plane planet plant play please plural poem point poor populate port pose position
possible post pound power practice prepare present press pretty print probable problem process produce product
proper property protect prove provide pull push put quart question quick quiet quite race radio rail rain
raise ran range rather reach read ready real reason receive record red region remember repeat reply represent
require rest result rich ride right ring rise river road rock roll room root rope rose round row rub rule run
safe sail salt same sand save say scale school science score sea search season seat second section see seed
seem segment select self sell send sense sentence separate serve set settle seven several shape share sharp
sheet shell shine ship shoe shop shore short should shoulder shout show side sight sign silent silver similar
simple since sing single sister sit six size skill skin sky sleep slip slow small smell smile snow soft soil
soldier solution solve some son song soon sound south space speak special speech speed spell spend spoke spot
spread spring square stand star start state station stay steam steel step stick still stone stood stop store
story straight strange stream street stretch string strong student study subject substance success such sudden
sugar suggest suit summer sun supply support sure surface surprise swim syllable symbol system table tail take
talk tall teach team teeth tell ten term test than thank thick thin thing think third thought thousand three
through throw thus tie time tiny tire together told tone tool top total touch toward town track trade train
travel tree triangle trip trouble truck true try tube turn twenty two type under unit until usual valley value
vary verb very view village visit voice vowel wait walk wall want war warm wash watch water wave way wear
weather week weight well west wheel when where white whole wide wife wild will wind window wing winter wire
wish woman women wonder wood word work world would write wrong yard year yellow yes yet young
"""
WORDS = tuple(_LIST.split())


def text(rng: random.Random, words: int) -> str:
    """``words`` words drawn by ``rng`` and joined by single spaces; empty for 0."""
    return " ".join(rng.choices(WORDS, k=words))


@dataclass(frozen=True, slots=True)
class BenchWorkload:
    """Conversations of ``turns`` questions each, all over one system prompt, ``concurrency`` of them at a time.

    The texts are made from a seed: plain English of a known length that never repeats. system_tokens, user_tokens:
    approximate lengths, exact where ``tokens_per_word`` is right for the model. answer_tokens: the limit of an answer.
    nonce: goes into every text, so that runs with different nonces share no prefix beyond the chat template.

    Raises ConfigError naming the field when a value is out of range.

    >>> workload = BenchWorkload(sessions=4, turns=3, user_tokens=5)
    >>> workload.requests, len(workload.question(session=0, turn=1)["content"].split())
    (12, 5)
    """

    sessions: int = 8
    turns: int = 4
    concurrency: int = 4
    system_tokens: int = 1000
    user_tokens: int = 50
    answer_tokens: int = 32
    seed: int = 0
    nonce: str = ""
    tokens_per_word: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (
            ("sessions", 1), ("turns", 1), ("concurrency", 1),
            ("system_tokens", 0), ("user_tokens", 1), ("answer_tokens", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.tokens_per_word > 0:
            raise ConfigError(f"tokens_per_word is {self.tokens_per_word}; it must be above 0")

    @property
    def requests(self) -> int:
        return self.sessions * self.turns

    def system_prompt(self) -> str:
        """The text all conversations share; empty when ``system_tokens`` is 0."""
        return self._text("system", self.system_tokens) if self.system_tokens else ""

    def opening(self) -> list[Message]:
        """The messages that every conversation starts with."""
        prompt = self.system_prompt()
        return [{"role": "system", "content": prompt}] if prompt else []

    def question(self, session: int, turn: int) -> Message:
        return {"role": "user", "content": self._text(f"session {session} turn {turn}", self.user_tokens)}

    def _text(self, part: str, tokens: int) -> str:
        rng = random.Random(f"{self.seed}/{self.nonce}/{part}")
        return text(rng, max(1, round(tokens / self.tokens_per_word)))


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
        probe = BenchWorkload(user_tokens=words, nonce=f"probe {nonce} {words}")
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
    """One request of the workload. answer: None for one never sent, because an earlier turn failed.

    >>> RequestRecord(session=0, turn=1, phase=Phase.FOLLOW_UP, messages=(), answer=None).error
    'not sent: an earlier turn of the conversation failed'
    """

    session: int
    turn: int
    phase: Phase
    messages: tuple[Message, ...]
    answer: TimedAnswer | None

    @property
    def error(self) -> str | None:
        return self.answer.error if self.answer else "not sent: an earlier turn of the conversation failed"


class _Conversations:
    """The state that a run's conversations share."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        target: Target,
        workload: BenchWorkload,
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

    async def _ask(self, history: list[Message]) -> TimedAnswer:
        return await ask(
            self._client, self._target, history,
            max_tokens=self._workload.answer_tokens, clock=self._clock, on_text=self._warmed,
        )  # fmt: skip

    def _warmed(self) -> None:
        self._prompt_is_warm = self._workload.system_tokens > 0


async def run_workload(
    client: httpx.AsyncClient,
    target: Target,
    workload: BenchWorkload,
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
