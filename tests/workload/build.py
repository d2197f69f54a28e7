"""The builder: small traces and descriptions that the tests write themselves."""

import json
from pathlib import Path
from typing import Any

from emberkv.workload.content import Content, Span, stream_key
from emberkv.workload.request import Request
from emberkv.workload.spec import GeneratedWorkload, parse_workload


def jsonl(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def mooncake_line(timestamp: float, length: int, ids: list[int], output: int = 5) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": length, "output_length": output, "hash_ids": ids}


def span(name: str, length: int) -> Span:
    return Span(stream_key(name), 0, length)


def request(name: str, prompt: int, output: int, *pieces: Span, at: float = 0.0, session: str = "") -> Request:
    """A request that knows the content given, and no more."""
    return Request(
        request_id=name, arrival_time=at, prompt_tokens=prompt, output_tokens=output, max_output_tokens=output,
        content=Content(pieces), session_id=session,
    )  # fmt: skip


CHAT = {
    "name": "chat", "weight": 1, "message": 20, "output": 10, "turns": 3, "think_time": 4,
}  # fmt: skip


def workload(folder: Path = Path(), *, client: dict[str, Any] | None = None, **changes: Any) -> GeneratedWorkload:
    """Two conversations a second of three turns, 20 tokens asked and 10 answered each; the changes go before."""
    data = {
        "seed": 1, "sessions": 4, "arrivals": {"kind": "constant", "rate": 2}, "clients": [{**CHAT, **(client or {})}],
    }  # fmt: skip
    return parse_workload({**data, **changes}, folder=folder)
