"""Calibration's requests, against a scripted server; and what the command refuses at once."""

import asyncio
import itertools
import json
from importlib.resources import files
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from pydantic import ByteSize
from typer.testing import CliRunner

from emberkv.cli.calibrate import (
    STREAM_TOKENS,
    STREAM_WORDS,
    STREAMS,
    SYSTEM_WORDS,
    decode_times,
    measured_spec,
    request_times,
    served,
    server_command,
)
from emberkv.cli.main import app
from emberkv.config import ServeConfig
from emberkv.errors import EmberError
from emberkv.sim.roofline import Roofline
from emberkv.sim.timing import ChunkWork, StepWork
from tests.bench.fake_server import Event, FakeServer, finish, piece, usage
from tests.sim.flat import TINY, with_overheads
from tests.waiting import DEADLINE

TOKEN = 0.5
PROMPT, CACHED = 30, 10


def answer(body: dict[str, Any]) -> list[Event]:
    """As many tokens as asked for, one each half second."""
    tokens = body["max_tokens"]
    end: list[Event] = [(0.0, finish()), (0.0, usage(PROMPT, tokens, CACHED)), (0.0, "[DONE]")]
    return [*[(TOKEN, piece("x")) for _ in range(tokens)], *end]


def test_decode_steps_are_told_by_streams_and_context() -> None:
    server = FakeServer(answer)

    async def measure() -> list[tuple[StepWork, float]]:
        async with server.client() as client:
            return await decode_times(client, clock=server.clock)

    found = asyncio.run(measure())
    assert [work for work, _ in found] == [StepWork(n, n * (PROMPT + STREAM_TOKENS // 2)) for n in STREAMS] * len(
        STREAM_WORDS
    )
    alone = [seconds for work, seconds in found if work.sequences == 1]
    assert alone == [pytest.approx(TOKEN)] * len(STREAM_WORDS)


def test_the_mean_of_the_rounds_after_the_first_is_a_step_s_time() -> None:
    paces = [10 * TOKEN, 0.6 * TOKEN, 0.8 * TOKEN, 1.6 * TOKEN]

    def uneven(body: dict[str, Any]) -> list[Event]:
        if body["max_tokens"] == 1 or not paces:
            return answer(body)
        pace = paces.pop(0)
        return [(pace / TOKEN * seconds, data) for seconds, data in answer(body)]

    server = FakeServer(uneven)

    async def measure() -> list[tuple[StepWork, float]]:
        async with server.client() as client:
            return await decode_times(client, clock=server.clock)

    (work, seconds), *_ = asyncio.run(measure())
    assert work.sequences == 1
    assert seconds == pytest.approx(TOKEN)


def test_a_request_s_time_is_what_its_steps_do_not_take() -> None:
    server, pauses = FakeServer(answer), list[float]()
    roofline = Roofline(TINY, with_overheads(step=100_000))

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    async def measure() -> list[tuple[int, float]]:
        async with server.client() as client:
            return await request_times(client, roofline, Random(0), clock=server.clock, sleep=pause)

    found = asyncio.run(measure())
    prefill = roofline.terms_of(StepWork(0, 0, (ChunkWork(CACHED, PROMPT, True),))).total
    assert {tokens for tokens, _ in found} == {PROMPT}
    assert found[0][1] == pytest.approx(TOKEN - prefill)
    assert len(found) % (2 * len(SYSTEM_WORDS)) == 0
    assert len(pauses) == len(found) / 2
    assert min(pauses) > 0


def test_a_request_that_fails_ends_the_measurement() -> None:
    server = FakeServer(lambda body: httpx.Response(500, text="out of order"))

    async def measure() -> None:
        async with server.client() as client:
            await decode_times(client, clock=server.clock)

    with pytest.raises(EmberError, match="out of order"):
        asyncio.run(measure())


def test_a_server_that_ends_instead_of_becoming_ready_is_not_waited_for(tmp_path: Path) -> None:
    config = ServeConfig(model=str(tmp_path / "nothing"))
    with pytest.raises(EmberError, match=r"did not become ready: [^{]*nothing"), served(config, tmp_path / "log"):
        pass


def test_the_server_has_the_number_types_and_kernels_that_are_measured() -> None:
    command = server_command(ServeConfig(quantize="int8", kv_dtype="int8", kernels="torch"))
    given = dict(itertools.pairwise(command))
    assert (given["--quantize"], given["--kv-dtype"], given["--kernels"]) == ("int8", "int8", "torch")


def test_the_server_is_found_while_its_output_would_be_coloured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with served(ServeConfig(cache_ram=ByteSize(2**22), device="cpu"), tmp_path / "log") as url:
        assert httpx.get(f"{url}/ready", timeout=DEADLINE).status_code == 200


def test_the_model_that_a_profile_is_fitted_to_has_the_types_it_was_measured_with() -> None:
    facts = json.loads((files("emberkv") / "demo_model/config.json").read_text())
    config = SimpleNamespace(to_dict=lambda: facts)
    dtypes = SimpleNamespace(activations=torch.float32, weights=torch.int8, kv=torch.int8)
    bench: Any = SimpleNamespace(loaded=SimpleNamespace(dtypes=dtypes, model=SimpleNamespace(config=config), name="x"))
    spec = measured_spec(ServeConfig(quantize="int8", kv_dtype="int8"), bench)
    assert (spec.weights_dtype, spec.kv_dtype, spec.rounded_on_load) == ("int8", "int8", True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "/no/such/folder/me.yaml"], "there is no folder"),
        (["-o", "me.yaml", "--dtype", "int3"], "--dtype 'int3': use auto"),
        (["-o", "me.yaml", "--prefill-chunk", "100"], "--prefill-chunk 100: use a multiple of --block-size"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(arguments: list[str], said: str) -> None:
    outcome = CliRunner().invoke(app, ["calibrate", *arguments])
    assert outcome.exit_code == 2
    assert said in outcome.output
    assert not Path("me.yaml").exists()
