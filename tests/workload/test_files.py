"""Files in and out: transformations, formats written and read again, and the examples as they are."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from emberkv.errors import WorkloadError
from emberkv.workload.description import describe
from emberkv.workload.request import Request
from emberkv.workload.source import (
    ClosedLoopTraceSource,
    GeneratedSource,
    ServiceTime,
    TraceSource,
    open_requests,
    open_source,
    unroll,
)
from emberkv.workload.trace import TraceFormat, clip, merge, read_trace, scale_rate, scopes, write_trace
from tests.workload.build import jsonl, mooncake_line, request, span, workload

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.yaml") if "workload:" in path.read_text())


def trace() -> list[Request]:
    return [request(str(at), 20, 1, at=float(at)) for at in range(5)]


def times(requests: Iterable[Request]) -> list[float]:
    return [each.arrival_time for each in requests]


def test_rates_scale_and_times_clip() -> None:
    assert times(scale_rate(trace(), 4)) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert times(clip(trace(), 1, 4)) == [0.0, 1.0, 2.0]
    assert times(clip(trace(), 3)) == [0.0, 1.0]


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(factor: float) -> None:
    with pytest.raises(WorkloadError, match="must be above 0"):
        scale_rate(trace(), factor)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2)])
def test_a_clip_of_nothing_is_refused(start: float, stop: float) -> None:
    with pytest.raises(WorkloadError, match="must start at 0 or later and end after its start"):
        clip(trace(), start, stop)


def test_merging_keeps_the_order_of_arrival() -> None:
    later = [request("x", 1, 1, at=1.0), request("y", 1, 1, at=3.5)]
    assert [each.request_id for each in merge(trace(), later)] == ["0", "1", "x", "2", "3", "y", "4"]


def test_scopes_differ() -> None:
    assert scopes([Path("a/t.jsonl"), Path("b/t.jsonl"), Path("u.csv"), Path("t.csv")]) == ["t", "t#2", "u", "t#3"]


def test_mooncake_survives_our_own_format(tmp_path: Path) -> None:
    lines = [mooncake_line(0, 1100, [0, 1, 2]), mooncake_line(1500.5, 1030, [0, 1, 3]), mooncake_line(1501, 0, [])]
    first = jsonl(tmp_path / "a.jsonl", *({**line, "block_size": 512} for line in lines))
    assert write_trace(tmp_path / "b.jsonl", read_trace(first)) == 3
    assert write_trace(tmp_path / "c.jsonl", read_trace(tmp_path / "b.jsonl"), format=TraceFormat.MOONCAKE) == 3
    before, after = (list(read_trace(path, scope="s")) for path in (first, tmp_path / "c.jsonl"))
    assert [each.content for each in before] == [each.content for each in after]
    assert times(read_trace(tmp_path / "c.jsonl")) == [0.0, 1.5005, 1.501]


def test_a_generated_workload_written_and_read_shares_the_same(tmp_path: Path) -> None:
    def generated() -> list[Request]:
        return list(unroll(GeneratedSource(workload(client={"message": 33})), first_token=1, per_token=0))

    write_trace(tmp_path / "t.jsonl", generated(), note="why")
    read = list(read_trace(tmp_path / "t.jsonl"))
    assert [(each.request_id, each.session_id, each.turn, each.after) for each in read] == [
        (each.request_id, each.session_id, each.turn, each.after) for each in generated()
    ]
    original, copied = describe(generated(), 16), describe(read)
    assert original is not None
    assert copied is not None
    assert (copied.cache.hits, copied.cache.unique) == (original.cache.hits, original.cache.unique)
    assert copied.cache.hits > 0


def test_token_ids_are_written_as_they_are(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", {"timestamp": 1, "input_length": 2, "output_length": 1, "token_ids": [4, 5]})
    write_trace(tmp_path / "own.jsonl", read_trace(path))
    assert '"token_ids":[4,5]' in (tmp_path / "own.jsonl").read_text()
    assert [each.content for each in read_trace(tmp_path / "own.jsonl")] == [each.content for each in read_trace(path)]


def test_azure_keeps_lengths_and_gaps(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.csv", trace(), format=TraceFormat.AZURE)
    assert (tmp_path / "t.csv").read_text().splitlines()[:2] == [
        "TIMESTAMP,ContextTokens,GeneratedTokens", "1970-01-01 00:00:00.000000,20,1",
    ]  # fmt: skip
    assert times(read_trace(tmp_path / "t.csv")) == times(trace())


def test_a_trace_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    broken = jsonl(tmp_path / "t.jsonl", mooncake_line(0, 1, [0]), "broken")
    with pytest.raises(WorkloadError, match=r"t\.jsonl:2"):
        write_trace(tmp_path / "out.jsonl", read_trace(broken))
    assert [each.name for each in tmp_path.iterdir()] == ["t.jsonl"]
    with pytest.raises(WorkloadError, match=r"cannot write .*out\.jsonl: No such file"):
        write_trace(tmp_path / "none" / "out.jsonl", trace())


def test_sources_by_file(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.jsonl", [request("a", 16, 1, span("a", 16))])
    assert isinstance(open_source(tmp_path / "t.jsonl"), TraceSource)
    assert isinstance(open_source(tmp_path / "t.jsonl", closed_loop=True), ClosedLoopTraceSource)
    assert isinstance(open_source(EXAMPLES[0]), GeneratedSource)


def test_there_are_examples() -> None:
    assert [path.stem for path in EXAMPLES] == ["agents", "chat", "cluster", "mixed", "side-calls"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_as_they_are(path: Path) -> None:
    requests = list(open_requests(path, service=ServiceTime(first_token=0.5, per_token=0.02)))
    assert len(requests) > 1000
    assert times(requests) == sorted(times(requests))
    assert max(each.turn for each in requests) > 5
