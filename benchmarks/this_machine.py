"""This machine predicted: calibrated, then serving conversations for real, and the same requests simulated.

    python -m benchmarks.this_machine [--emberkv "COMMAND"] [--sessions 24] [--rounds 3] [--out PREFIX]

`emberkv calibrate` measures; `emberkv serve --record-trace` then answers multi-turn conversations of the bundled demo
model and writes down what came; the trace is replayed under the profile. Times are the client's, so that HTTP is in
them. Exits with 1 when the mean time to first token is more than 15% off, or when any request's cached tokens differ.
"""

import asyncio
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from benchmarks import arguments, lib, report
from benchmarks.figures import Figure, Row

from emberkv.bench.client import Message, Target, TimedAnswer, ask
from emberkv.bench.runner import BenchWorkload
from emberkv.sim import config as sim_config
from emberkv.sim.config import Workload
from emberkv.sim.model_spec import DEMO_NAME, load_spec
from emberkv.sim.run import run_simulation
from emberkv.workload.ember_trace import read

BLOCK_SIZE = 16
HIT_UNIT = 1
"""With the C++ kernels, and so in the simulation, a hit goes on into the partial block that a conversation left."""

CACHE_BYTES = 64 * 2**20
FLAGS = (
    "--no-warmup", "--block-size", str(BLOCK_SIZE), "--cache-ram", f"{CACHE_BYTES // 2**20}MiB",
    "--prefill-chunk", "128", "--max-step-tokens", "256", "--max-running", "64", "--trace-unit", str(HIT_UNIT),
)  # fmt: skip
TURNS = 4
WARM_UP_SEED = 1000
TTFT_TARGET = 0.15


@dataclass(frozen=True, slots=True)
class Timed:
    """One request as the client or the simulation has it; times in milliseconds.

    beside: whether another request was in flight when it was sent; the client alone knows.
    """

    prompt_tokens: int
    cached_tokens: int
    ttft: float
    end_to_end: float
    beside: bool = False

    @property
    def decoding(self) -> float:
        """From the first token to the end."""
        return self.end_to_end - self.ttft


def calibrate(command: Sequence[str], profile: Path) -> None:
    subprocess.run([*command, "calibrate", "--output", str(profile), "--block-size", str(BLOCK_SIZE)], check=True)


async def converse(url: str, sessions: int, seed: int) -> list[list[TimedAnswer]]:
    """Each session's answers. Sessions begin at random, 0.7 s apart on average, and think for a second or so."""
    rng = random.Random(seed)
    script = BenchWorkload(
        sessions=sessions, turns=TURNS, system_tokens=400, user_tokens=60, answer_tokens=40, nonce=f"here {seed}"
    )
    begins, at = [], 0.0
    for _ in range(sessions):
        begins.append((at, [0.5 + rng.expovariate(1.0) for _ in range(TURNS)]))
        at += 0.2 + rng.expovariate(2.0)

    async def session(number: int) -> list[TimedAnswer]:
        begin, thinking = begins[number]
        await asyncio.sleep(begin)
        messages: list[Message] = script.opening()
        answers = []
        async with httpx.AsyncClient(base_url=url, timeout=120, headers={"X-Session-Id": f"{seed}-{number}"}) as client:
            for turn in range(TURNS):
                messages.append(script.question(number, turn))
                limit = rng.randrange(20, 60)
                answer = await ask(client, Target("emberkv-demo"), messages, max_tokens=limit, clock=time.perf_counter)
                if answer.error:
                    raise RuntimeError(f"session {number}: {answer.error}")
                answers.append(answer)
                messages.append({"role": "assistant", "content": answer.text})
                await asyncio.sleep(thinking[turn])
        return answers

    return await asyncio.gather(*(session(number) for number in range(sessions)))


def served(answers: Sequence[Sequence[TimedAnswer]]) -> list[list[Timed]]:
    def timed(answer: TimedAnswer) -> Timed:
        usage = answer.usage
        assert usage is not None
        assert answer.ttft is not None
        end = answer.finished if answer.finished is not None else answer.ended
        beside = any(other.sent < answer.sent < other.ended for session in answers for other in session)
        tokens = usage.prompt_tokens or 0, usage.cached_tokens or 0
        return Timed(*tokens, 1e3 * answer.ttft, 1e3 * (end - answer.sent), beside)

    return [[timed(answer) for answer in session] for session in answers]


def simulated(trace: Path, profile: Path) -> list[list[Timed]]:
    """The sessions in the order of their first arrival."""
    blocks = CACHE_BYTES // (load_spec(DEMO_NAME).kv_bytes_per_token * BLOCK_SIZE)
    set_up = sim_config.SimulationConfig(
        model=DEMO_NAME, hardware=str(profile), kv_blocks=blocks, block_size=BLOCK_SIZE, hit_unit=HIT_UNIT,
        prefill_chunk=128, max_step_tokens=256, max_running=64,
    )  # fmt: skip
    workload = Workload(None, sim_config.TraceConfig(path=trace.name), trace.parent)
    results = run_simulation(set_up, workload, keep_ids=True)
    rows = dict(zip(results.rows.ids, results.rows, strict=True))
    sessions: dict[str, list[Timed]] = {}
    for request in read(trace):
        row = rows[request.request_id]
        timed = Timed(row.prompt_tokens, row.cached_tokens, row.ttft_ms or 0.0, row.e2e_ms or 0.0)
        sessions.setdefault(request.session_id, []).append(timed)
    return list(sessions.values())


def matched(real: Sequence[Sequence[Timed]], model: Sequence[Sequence[Timed]]) -> list[tuple[Timed, Timed]]:
    """The same requests side by side. A session is known by the lengths of its prompts."""
    by_lengths = {tuple(each.prompt_tokens for each in session): session for session in model}
    pairs: list[tuple[Timed, Timed]] = []
    for session in real:
        found = by_lengths.pop(tuple(each.prompt_tokens for each in session))
        pairs += zip(session, found, strict=True)
    assert not by_lengths
    return pairs


Round = Sequence[tuple[Timed, Timed]]
"""Served and simulated, request by request."""


def play(command: Sequence[str], folder: Path, profile: Path, sessions: int, seed: int) -> Round:
    """Serve conversations with a server of their own, and simulate them.

    Some come before those that count: a server takes longer for the first steps of each shape.
    """
    trace = folder / f"served-{seed}.jsonl"
    server = lib.Server(
        "emberkv",
        lambda port: [*command, "serve", "--port", str(port), "--record-trace", str(trace), *FLAGS],
        "/ready",
    )
    with lib.serving(server, folder / f"server-{seed}.log") as url:
        before = asyncio.run(converse(url, max(2, sessions // 2), WARM_UP_SEED + seed))
        answers = asyncio.run(converse(url, sessions, seed))
    return matched(served([*before, *answers]), simulated(trace, profile))[len(before) * TURNS :]


def rows_of(rounds: Sequence[Round]) -> list[Row]:
    rows: list[Row] = []
    alone = [[pair for pair in pairs if not pair[0].beside] for pairs in rounds]
    beside = [[pair for pair in pairs if pair[0].beside] for pairs in rounds]
    for name, chosen, field, target in (
        ("TTFT", rounds, "ttft", TTFT_TARGET),
        ("TTFT of requests sent while no other was in flight", alone, "ttft", None),
        ("TTFT of requests sent beside others", beside, "ttft", None),
        ("from the first token to the end", rounds, "decoding", None),
        ("end to end", rounds, "end_to_end", None),
    ):
        rows += _compared(name, [pairs for pairs in chosen if pairs], field, target)
    different = [sum(real.cached_tokens != model.cached_tokens for real, model in pairs) for pairs in rounds]
    rows.append(Figure(f"requests with other cached tokens, of {len(rounds[0])}", "", different, 0))
    shares = [
        sum(real.cached_tokens for real, _ in pairs) / sum(real.prompt_tokens for real, _ in pairs) for pairs in rounds
    ]
    rows.append(Figure("prompt tokens cached", "", shares))
    return rows


def _compared(name: str, rounds: Sequence[Round], field: str, target: float | None) -> list[Row]:
    """One time of all requests, measured beside simulated; none where no round has a request."""
    if not rounds:
        return []
    real = [[getattr(timed, field) for timed, _ in pairs] for pairs in rounds]
    model = [[getattr(timed, field) for _, timed in pairs] for pairs in rounds]
    means = [(statistics.fmean(a), statistics.fmean(b)) for a, b in zip(real, model, strict=True)]
    medians = [statistics.median(b) / statistics.median(a) - 1 for a, b in zip(real, model, strict=True)]
    return [
        Figure(f"{name}, mean, measured", "ms", [a for a, _ in means]),
        Figure(f"{name}, mean, simulated", "ms", [b for _, b in means]),
        Figure(f"{name}, mean: error", "", [abs(b / a - 1) for a, b in means], target),
        Figure(f"{name}, median: error", "", medians),
    ]


def main() -> int:
    parser = arguments.server_parser(__doc__, rounds=3)
    parser.add_argument("--sessions", type=int, default=24)
    parser.add_argument("--profile", type=Path, help="a calibrated profile, in place of calibrating")
    given = parser.parse_args()
    about = report.about(
        "benchmarks.this_machine", __doc__, sessions=given.sessions, turns=TURNS, rounds=given.rounds
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="emberkv-here-") as folder:
        profile = given.profile or Path(folder, "here.yaml")
        if given.profile is None:
            calibrate(given.emberkv, profile)
        rounds = [play(given.emberkv, Path(folder), profile, given.sessions, seed) for seed in range(given.rounds)]
    return report.publish(rows_of(rounds), about, given.out)


if __name__ == "__main__":
    sys.exit(main())
