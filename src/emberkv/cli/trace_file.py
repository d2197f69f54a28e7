"""A recording in emberkv's own trace format, written as it goes."""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emberkv.errors import ConfigError
from emberkv.serving.trace_recorder import RecordedRequest, TraceRecorder
from emberkv.serving.trace_sessions import KEY_BYTES
from emberkv.workload.ember_trace import Header, TraceLine

NOTE = "recorded by emberkv serve; block ids are keyed, and tell nothing of any text"


@contextmanager
def recording(path: Path | None, block_size: int, model: str = "") -> Iterator[TraceRecorder | None]:
    """A recorder that writes to ``path`` until the context ends; None without a path.

    model: what serves: a folder, a hub id or the bundled model's name.
    Raises ConfigError where there is a file already, or none can be written.
    """
    if path is None:
        yield None
        return
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise ConfigError(f"record_trace is {str(path)!r}, which exists; name a file that does not") from error
    except OSError as error:
        raise ConfigError(f"record_trace is {str(path)!r}, which cannot be written: {error.strerror}") from error
    with file:
        file.write(Header(emberkv_trace=1, note=NOTE, model=model).model_dump_json() + "\n")
        file.flush()

        def write(recorded: RecordedRequest) -> None:
            file.write(line_of(recorded).model_dump_json(exclude_defaults=True) + "\n")
            file.flush()

        recorder = TraceRecorder(write, block_size=block_size, key=secrets.token_bytes(KEY_BYTES), clock=time.monotonic)
        try:
            yield recorder
        finally:
            recorder.close()


def line_of(recorded: RecordedRequest) -> TraceLine:
    after = recorded.after and {"request": recorded.after.request, "think_time": round(recorded.after.think_time, 6)}
    return TraceLine.model_validate(
        {
            "request": recorded.request,
            "arrival": round(recorded.arrival, 6),
            "client": recorded.client,
            "session": recorded.session,
            "turn": recorded.turn,
            "prompt_tokens": recorded.prompt_tokens,
            "output_tokens": recorded.output_tokens,
            "max_output_tokens": recorded.max_output_tokens,
            "block_size": recorded.block_size,
            "blocks": list(recorded.blocks),
            "known_tokens": recorded.known_tokens,
            "after": after,
        }
    )
