"""Write a trace of many users of coding agents, from the sessions that the tests keep, for the simulator.

    PYTHONPATH=src:. python scripts/agent_trace.py tests/data/agent_sessions.jsonl.xz

Each recorded session is sent to a server of the tests again, and the prompts that its model gets are kept. Then users
run these sessions, side calls included, in the order in which the agent sent its requests. A user has one agent and
one project, whose folder is in the prompts; each session has a task and reads a file of its own. What stands before
the folder and the task (system prompt and tools) is the same for all users of an agent. Answers take the time that the
simulator assumes; the times between requests are drawn. The same arguments give the same trace.
"""

import argparse
import lzma
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from random import Random

from tests.agents.replay import Replay
from tests.agents.scenario import FILE, FOLLOW_UP, PROJECT, TASK
from tests.agents.server import END, FAMILY, agent_settings, scripted_lifecycle, scripted_model
from tests.agents.session_file import FOLDER, read_session
from tests.serving.harness import Client

from emberkv.serving.app import create_app
from emberkv.workload import ember_trace
from emberkv.workload.content import Content, Tokens
from emberkv.workload.request import After, Request, content_hashes
from emberkv.workload.source import ASSUMED
from emberkv.workload.spec import LogNormal

BLOCK_SIZE = 32
TEMPLATE = replace(FAMILY, keeps="all")
"""Renders earlier turns as they were, as the templates do that let a turn hit all of the turn before."""

WORDS = [
    "add", "check", "move", "remove", "rename", "sort", "split", "test", "the", "a", "this", "each",
    "when", "with", "from", "into", "file", "line", "name", "page", "row",
]  # fmt: skip
LINE = FILE.splitlines()[-1]
TASK_WORDS = LogNormal(kind="lognormal", median=40, p90=200)
FILE_WORDS = LogNormal(kind="lognormal", median=250, p90=1500)
"""The recorded file has two lines; files of projects are longer. Lengths and times are assumptions."""

TOOL_TIME = LogNormal(kind="lognormal", median=3, p90=20)
ASKED_AGAIN = LogNormal(kind="lognormal", median=60, p90=400)
NEXT_SESSION = LogNormal(kind="lognormal", median=300, p90=1800)
SIDE_CALL_TIME = 0.1
FIRST_SESSION_BY = 600.0
"""Seconds, as all times here."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A request of a recorded session: the prompt that the model got, and what it wrote.

    is_side_call: whether it goes on with no earlier request; aider's second question does not, either.
    """

    prompt: str
    answer: str
    is_side_call: bool


Encode = Callable[[str], Sequence[int]]


def recorded_sessions() -> tuple[list[list[Turn]], Encode]:
    """The sessions by agent, and the demonstration model's tokenizer."""
    prompts: list[str] = []
    answers: list[str] = []

    def script(prompt: str) -> str:
        prompts.append(prompt)
        return answers[-1]

    sessions: list[list[Turn]] = []
    with tempfile.TemporaryDirectory() as folder, scripted_model(script, Path(folder), TEMPLATE) as model:
        client = Client(create_app(scripted_lifecycle(model), agent_settings()))
        for path in sorted(FOLDER.glob("*.xz")):
            replay, turns = Replay(client, answers.append), []
            for exchange in read_session(path).exchanges:
                replay.send(exchange)
                if exchange.answer is not None:
                    turns.append(Turn(prompts[-1], exchange.answer + END, not exchange.follows))
            sessions.append(turns)
        tokenizer = model.tokenizer
    return sessions, lambda text: tokenizer.encode(text, add_special_tokens=False)


def words(rng: Random, count: float) -> str:
    return " ".join(rng.choices(WORDS, k=max(1, round(count))))


def session(turns: Sequence[Turn], project: str, rng: Random) -> list[Turn]:
    """The turns with another project, task and file."""
    task, text = words(rng, TASK_WORDS.sample(rng)), words(rng, FILE_WORDS.sample(rng))
    others = {str(PROJECT): project, TASK: f"{task}. {TASK}", LINE: f"{text}. {LINE}"}

    def changed(old: str) -> str:
        for recorded, own in others.items():
            old = old.replace(recorded, own)
        return old

    return [replace(turn, prompt=changed(turn.prompt), answer=changed(turn.answer)) for turn in turns]


def think_time(turn: Turn, rng: Random) -> float:
    """From the end of the answer before to this request."""
    if turn.is_side_call:
        return SIDE_CALL_TIME
    return (ASKED_AGAIN if FOLLOW_UP in turn.prompt else TOOL_TIME).sample(rng)


def user_requests(name: str, turns: Sequence[Turn], count: int, encode: Encode, rng: Random) -> Iterator[Request]:
    """``count`` sessions, one after the other."""
    now = rng.uniform(0, FIRST_SESSION_BY)
    for number in range(count):
        before: str | None = None
        for index, turn in enumerate(session(turns, f"/home/{name}/project", rng)):
            pause = think_time(turn, rng) if index else 0.0
            now += pause
            prompt, answer = encode(turn.prompt), encode(turn.answer)
            request_id = f"{name}.{number}.{index}"
            yield Request(
                request_id=request_id, arrival_time=now, prompt_tokens=len(prompt), output_tokens=len(answer),
                max_output_tokens=len(answer), content=in_blocks([*prompt, *answer]), block_size=BLOCK_SIZE,
                client_id=name, session_id=f"{name}.{number}", turn=index,
                after=After(before, pause) if before else None,
            )  # fmt: skip
            now += ASSUMED.first_token + ASSUMED.per_token * (len(answer) - 1)
            before = request_id
        now += NEXT_SESSION.sample(rng)


def in_blocks(tokens: Sequence[int]) -> Content:
    """Blocks by their ids, as traces name them, instead of tokens."""
    content = Content([Tokens(array("i", tokens))])
    hashes = content_hashes(ember_trace.ROOT, content, 0, len(content), BLOCK_SIZE)
    keys = [ember_trace.OWNER + each[: ember_trace.ID_BYTES] for each in hashes]
    return Content.of_blocks(keys, BLOCK_SIZE, len(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="the file to write, compressed with xz")
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--sessions", type=int, default=4, help="of each user")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    agents, encode = recorded_sessions()
    requests: list[Request] = []
    for user in range(given.users):
        rng = Random(f"{given.seed}/{user}")
        requests += user_requests(f"user{user:02}", agents[user % len(agents)], given.sessions, encode, rng)
    requests.sort(key=lambda request: request.arrival_time)
    with lzma.open(given.trace, "wb", preset=9) as compressed, TextIOWrapper(compressed, encoding="utf-8") as file:
        count = ember_trace.write(file, requests)
    print(f"{count} requests in {given.trace}, {given.trace.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
