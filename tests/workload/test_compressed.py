"""Traces as they come: compressed, with a byte-order mark, with lines or numbers that are too large."""

import gzip
import lzma
from pathlib import Path

import pytest
from benchmarks.measured_elsewhere import AZURE, MOONCAKE

from emberkv.errors import WorkloadError
from emberkv.workload import bounds
from emberkv.workload.description import describe
from emberkv.workload.lines import MOST_LINE_BYTES
from emberkv.workload.trace import read_trace

LINE = b'{"timestamp": 0, "input_length": 3, "output_length": 2, "hash_ids": [7]}\n'


@pytest.mark.parametrize(("suffix", "compress"), [(".xz", lzma.compress), (".gz", gzip.compress), ("", bytes)])
def test_a_trace_is_read_however_it_is_compressed_and_named_alike(tmp_path: Path, suffix: str, compress) -> None:
    path = tmp_path / f"t.jsonl{suffix}"
    path.write_bytes(compress(LINE))
    (request,) = read_trace(path)
    assert (request.request_id, request.prompt_tokens, request.output_tokens) == ("t-0", 3, 2)


@pytest.mark.parametrize("name", ["t.jsonl.xz", "t.jsonl.gz"])
def test_what_is_not_compressed_as_named_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LINE)
    with pytest.raises(WorkloadError, match=f"cannot read .*{name}"):
        list(read_trace(tmp_path / name))


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl.xz").write_bytes(lzma.compress(LINE * 50)[:-20])
    with pytest.raises(WorkloadError, match=r"cannot read .*t\.jsonl\.xz: it is damaged"):
        list(read_trace(tmp_path / "t.jsonl.xz"))


@pytest.mark.parametrize(
    ("name", "text"),
    [("t.jsonl", LINE.decode()), ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,3,2\n"),
     ("e.jsonl", '{"emberkv_trace":1}\n{"request":"a","arrival":0.0,"prompt_tokens":3,"output_tokens":2}\n')],
)  # fmt: skip
def test_a_byte_order_mark_is_passed_over(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert [each.prompt_tokens for each in read_trace(tmp_path / name)] == [3]


def test_a_line_without_an_end_is_an_error_before_memory_is_full(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(LINE + b" " * (MOST_LINE_BYTES + 1))
    with pytest.raises(WorkloadError, match=r"t\.jsonl:2: the line is longer than 64 MiB"):
        list(read_trace(tmp_path / "t.jsonl"))


@pytest.mark.parametrize("tokens", [bounds.MOST_TOKENS + 1, 4 * 10**9, 2**63, 10**30])
def test_counts_beyond_the_bound_are_one_sentence(tmp_path: Path, tokens: int) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-01-01 00:00:00,{tokens},1\n")
    with pytest.raises(WorkloadError, match=r"t\.csv:2: ContextTokens '[0-9]+': use at most 16777216") as caught:
        list(read_trace(path))
    assert "\n" not in str(caught.value)


def test_years_apart_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0001-01-01 00:00:00,1,1\n9999-12-31 00:00:00,1,1\n")
    with pytest.raises(WorkloadError, match=r"t\.csv:3: it arrives 3\.15538e\+11 s after the first"):
        list(read_trace(path))


def test_the_traces_kept_here_are_those_published() -> None:
    azure, mooncake = describe(read_trace(AZURE)), describe(read_trace(MOONCAKE))
    assert azure is not None
    assert mooncake is not None
    assert (azure.requests, azure.cache.content_known) == (19_366, False)
    assert (mooncake.requests, mooncake.cache.references, mooncake.cache.hits) == (12_031, 288_500, 105_710)
