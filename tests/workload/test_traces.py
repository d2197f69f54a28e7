"""Recorded traces: what is read, and what is said of a line that cannot be."""

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emberkv.errors import WorkloadError
from emberkv.workload.content import Content, Tokens
from emberkv.workload.request import After
from emberkv.workload.trace import TraceFormat, detect_format, read_trace
from tests.workload.build import jsonl, mooncake_line

ROOT = bytes(32)
ID = "00112233445566ff"
HEADER = {"emberkv_trace": 1}
EMBER = {"request": "a", "arrival": 1.5, "prompt_tokens": 20, "output_tokens": 4}


def test_mooncake_requests_share_what_their_ids_share(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", mooncake_line(0, 1100, [0, 1, 2]), mooncake_line(1500, 1030, [0, 1, 3], 7))
    first, second = read_trace(path)
    assert (second.arrival_time, second.prompt_tokens, second.output_tokens) == (1.5, 1030, 7)
    assert (first.request_id, second.request_id) == ("t-0", "t-1")
    assert first.block_size == 512
    same = [a == b for a, b in zip(first.block_references(ROOT, 512), second.block_references(ROOT, 512), strict=True)]
    assert same == [True, True, False]


def test_a_trace_of_large_blocks_serves_a_pool_of_small_ones(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", mooncake_line(0, 90, [0, 1]), mooncake_line(0, 128, [0, 5]))
    first, second = read_trace(path, block_size=64)
    same = [
        a == b for a, b in zip(first.chain(ROOT, 16).block_hashes, second.chain(ROOT, 16).block_hashes, strict=False)
    ]
    assert same == [True] * 4 + [False]


def test_variants_of_mooncake_lines(tmp_path: Path) -> None:
    nanoseconds = {"arrival_time_ns": 2_500_000_000, "input_length": 35, "output_length": 1, "block_size": 16}
    path = jsonl(
        tmp_path / "t.jsonl",
        {"timestamp": 0.5, "input_length": 3, "output_length": 1, "token_ids": [5, 6, 7], "other": "tool"},
        {**nanoseconds, "hash_ids": [0, 1]},
    )
    tokens, full_blocks = read_trace(path)
    assert (tokens.arrival_time, tokens.block_size) == (0.0005, None)
    assert tokens.content == Content([Tokens(array("i", [5, 6, 7]))])
    assert (full_blocks.arrival_time, len(full_blocks.content), full_blocks.block_size) == (2.5, 32, 16)
    assert len(full_blocks.full_content()) == 36


def test_equal_ids_of_different_files_are_different_blocks(tmp_path: Path) -> None:
    left = jsonl(tmp_path / "left.jsonl", mooncake_line(0, 16, [0]))
    right = jsonl(tmp_path / "right.jsonl", mooncake_line(0, 16, [0]))
    contents = [next(read_trace(path, block_size=16)).content for path in (left, right)]
    assert contents[0] != contents[1]


def test_azure_rows_have_lengths_only(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.6805900,3,4\n"
    )
    first, second = read_trace(path)
    assert (first.arrival_time, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert (second.arrival_time, second.content) == (1.0, Content())
    assert not set(first.block_references(ROOT, 1)) & set(second.block_references(ROOT, 1))


def test_a_line_of_our_own_with_everything(tmp_path: Path) -> None:
    line = {**EMBER, "client": "c", "session": "s", "turn": 2, "max_output_tokens": 9, "block_size": 16,
            "blocks": [ID, ID[::-1]], "known_tokens": 20, "after": {"request": "z", "think_time": 2.5}}  # fmt: skip
    path = jsonl(tmp_path / "t.jsonl", {**HEADER, "note": "why"}, line)
    (read,) = read_trace(path)
    assert (read.request_id, read.arrival_time, read.client_id, read.session_id, read.turn) == ("a", 1.5, "c", "s", 2)
    assert (read.max_output_tokens, read.block_size, len(read.content)) == (9, 16, 20)
    assert read.after == After("z", 2.5)
    (scoped,) = read_trace(path, scope="x")
    assert (scoped.request_id, scoped.session_id, scoped.after) == ("x/a", "x/s", After("x/z", 2.5))
    assert scoped.content == read.content


def test_formats_are_told_from_the_file(tmp_path: Path) -> None:
    assert detect_format(jsonl(tmp_path / "a.jsonl", HEADER)) is TraceFormat.EMBERKV
    assert detect_format(jsonl(tmp_path / "b.jsonl", mooncake_line(0, 1, [0]))) is TraceFormat.MOONCAKE
    assert detect_format(tmp_path / "c.csv") is TraceFormat.AZURE
    with pytest.raises(WorkloadError, match=r"must end with \.jsonl or \.csv"):
        detect_format(tmp_path / "d.txt")


GOOD = mooncake_line(5, 600, [0, 1])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "invalid JSON"),
        ("[1]", "use keys with values"),
        ({**GOOD, "timestamp": -1}, "timestamp -1: use at least 0"),
        ({**GOOD, "timestamp": 4}, "arrives at 0.004 s, before the line above at 0.005 s; expected lines sorted"),
        ({**GOOD, "timestamp": None}, "has none of timestamp and arrival_time_ns; exactly one"),
        ({**GOOD, "arrival_time_ns": 1}, "has timestamp and arrival_time_ns"),
        ({**GOOD, "input_length": "600"}, "input_length '600': use a whole number"),
        ({**GOOD, "input_length": True}, "input_length True: use a whole number"),
        ({**GOOD, "output_length": 1.5}, "output_length 1.5: use a whole number"),
        ({**GOOD, "hash_ids": [0]}, None),
        ({**GOOD, "hash_ids": [0, 1, 2]}, "takes 2 blocks of 512 tokens, but there are 3 hash_ids"),
        ({**GOOD, "hash_ids": [0, -1]}, "hash_ids.1 -1: use at least 0"),
        ({**GOOD, "hash_ids": None}, "has none of hash_ids and token_ids"),
        ({**GOOD, "hash_ids": None, "token_ids": [1]}, "input_length is 600, but there are 1 token_ids"),
        ({**GOOD, "block_size": 0}, "block_size 0: use at least 1"),
        ({"timestamp": 9}, "input_length: it is required"),
        (b"\xff".decode("latin-1"), "invalid JSON"),
    ],
)
def test_a_malformed_mooncake_line_is_told_by_number(tmp_path: Path, line: Any, said: str | None) -> None:
    path = jsonl(tmp_path / "t.jsonl", GOOD, "", line)
    if said is None:
        assert len(list(read_trace(path))) == 2
        return
    with pytest.raises(WorkloadError, match=rf"t\.jsonl:3: .*{said}.*") as caught:
        list(read_trace(path))
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({**EMBER, "text": "hello"}, "text 'hello': it is unknown"),
        ({**EMBER, "block_size": 16}, "block_size, blocks and known_tokens come together"),
        ({**EMBER, "block_size": 16, "blocks": [ID], "known_tokens": 17}, "17 known_tokens are not 1 blocks of 16"),
        ({**EMBER, "block_size": 16, "blocks": [ID, ID], "known_tokens": 25}, r"describes 25 tokens of 20 \+ 4"),
        ({**EMBER, "block_size": 16, "blocks": ["xyz"], "known_tokens": 16}, "should match pattern"),
        ({**EMBER, "token_ids": list(range(25))}, r"describes 25 tokens of 20 \+ 4"),
        ({**EMBER, "token_ids": [1], "block_size": 1, "blocks": [ID], "known_tokens": 1}, "both blocks and token_ids"),
        ({**EMBER, "after": {"request": "z"}}, "after.think_time: it is required"),
    ],
)
def test_a_malformed_line_of_our_own_is_told_by_number(tmp_path: Path, line: dict[str, Any], said: str) -> None:
    path = jsonl(tmp_path / "t.jsonl", HEADER, EMBER, line)
    with pytest.raises(WorkloadError, match=rf"t\.jsonl:3: .*{said}.*; expected a JSON object such as"):
        list(read_trace(path))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("2023-11-16 18:15:46,1", "there are 2 fields"),
        ("yesterday,1,2", "TIMESTAMP 'yesterday': use a date and a time"),
        ("2023-11-16 18:15:46,-1,2", "ContextTokens -?.*: use at least 0"),
        ("2023-11-16 18:15:46,1,x", "GeneratedTokens 'x': use a whole number"),
        ("2023-11-16 18:15:44,1,2", "arrives at -1 s, before the line above at 0 s"),
    ],
)
def test_a_malformed_azure_row_is_told_by_number(tmp_path: Path, row: str, said: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:45,1,2\n{row}\n")
    with pytest.raises(WorkloadError, match=rf"t\.csv:3: {said}.*expected"):
        list(read_trace(path))


def test_headers_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("time,in,out\n")
    with pytest.raises(WorkloadError, match=r"t\.csv:1: the header is 'time,in,out'; expected 'TIMESTAMP,"):
        list(read_trace(path))
    newer = jsonl(tmp_path / "t.jsonl", {"emberkv_trace": 2})
    with pytest.raises(WorkloadError, match=r"t\.jsonl:1: emberkv_trace 2: use 1"):
        list(read_trace(newer))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"cannot read .*gone\.csv: No such file"):
        list(read_trace(tmp_path / "gone.csv"))


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", GOOD, "broken")
    requests = read_trace(path)
    assert next(requests).prompt_tokens == 600
    broken: Callable[[], object] = requests.__next__
    with pytest.raises(WorkloadError, match=r":2: "):
        broken()
