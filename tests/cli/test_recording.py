"""A recorded trace replays with the very hits that were served."""

from collections import defaultdict
from pathlib import Path

import pytest

from emberkv.cli.serve import recording
from emberkv.core.block_pool import BlockPool
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.scheduler import Scheduler, SchedulerConfig
from emberkv.core.sequence import Sequence
from emberkv.engine.request import GenerationRequest, SamplingParams
from emberkv.errors import ConfigError
from emberkv.serving.background import Background
from emberkv.workload.ember_trace import read
from emberkv.workload.request import Request
from tests.engine.loop_harness import BLOCK, CHUNK, Harness, Inbox, running

SYSTEM = list(range(2, 15))


def replayed(requests: list[Request], *, batch_invariant: bool) -> list[int]:
    """Cached tokens of each request, served one after the other by a fresh scheduler like the harness's."""
    cache = PrefixCache(BlockPool(24, BLOCK), alignment=BLOCK, batch_invariant=batch_invariant)
    scheduler = Scheduler(cache, SchedulerConfig(CHUNK, 16))
    found = []
    for request in requests:
        sequence = Sequence(request.request_id, request.chain(bytes(32), BLOCK), request.max_output_tokens)
        scheduler.add(sequence)
        while sequence.finish_reason is None:
            scheduler.complete(scheduler.schedule(), defaultdict(int))  # a chain knows its own tokens
        found.append(sequence.cached_tokens)
    return found


@pytest.mark.parametrize(("unit", "batch_invariant"), [(BLOCK, False), (1, False), (1, True)])
def test_a_replay_hits_what_was_hit(tmp_path: Path, unit: int, batch_invariant: bool) -> None:
    """To the token where the trace knows every token and hits go on into partial blocks."""
    path = tmp_path / "served.jsonl"
    served = []
    with recording(path, unit, Background()) as recorder, running(Harness(batch_invariant=batch_invariant)) as harness:
        assert recorder is not None
        engine = recorder.over(harness.loop)
        for session in range(4):
            prompt = [*SYSTEM, 20 + session]
            for turn in range(3):
                inbox = Inbox()
                params = SamplingParams(max_tokens=3 + turn, temperature=0.0)
                engine.submit(GenerationRequest(f"{session}-{turn}", list(prompt), params), inbox)
                usage = inbox.wait().usage
                assert usage is not None
                served.append(usage.cached_tokens)
                prompt += [*inbox.tokens, 30 + turn, 31]
    requests = list(read(path))
    assert replayed(requests, batch_invariant=batch_invariant) == served
    assert any(cached % BLOCK for cached in served) is batch_invariant
    assert len(set(served)) > 3
    assert len({request.session_id for request in requests}) == 4
    assert [request.turn for request in requests] == [0, 1, 2] * 4
    assert all(request.after for request in requests if request.turn)


def test_without_a_path_nothing_is_recorded() -> None:
    with recording(None, 16, Background()) as recorder:
        assert recorder is None


def test_an_earlier_recording_is_kept_beside(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    for _ in range(3):
        with recording(path, 16, Background()):
            pass
        path.write_text(f"{path.read_text()}{len(list(tmp_path.iterdir()))}")
    kept = {each.name: each.read_text()[-1] for each in tmp_path.iterdir()}
    assert kept == {"trace.jsonl.1": "1", "trace.jsonl.2": "2", "trace.jsonl": "3"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_cannot_be_written_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for path, message in (
        (tmp_path, "is no plain file"),
        (tmp_path / "link", "is no plain file"),
        (tmp_path / "no" / "x.jsonl", "cannot be written: No such"),
    ):
        with pytest.raises(ConfigError, match=message), recording(path, 16, Background()):
            pass
    assert [each.name for each in tmp_path.iterdir()] == ["link"]
