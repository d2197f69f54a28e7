"""A recording in emberkv's own trace format, written as it goes."""

import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from emberkv.errors import ConfigError
from emberkv.serving.background import Background
from emberkv.serving.trace_recorder import KEY_BYTES, RecordedRequest, TraceRecorder
from emberkv.workload.ember_trace import Header, TraceLine

_log = logging.getLogger(__name__)

NOTE = "recorded by emberkv serve; block ids are keyed, and tell nothing of any text"


@contextmanager
def recording(
    path: Path | None, block_size: int, background: Background, model: str = ""
) -> Iterator[TraceRecorder | None]:
    """A recorder that writes to ``path`` until the context ends; None without a path.

    model: what serves: a folder, a hub id or the bundled model's name. A file that is there already gets the first free
    of the names ``path.1``, ``path.2``, and so on. Raises ConfigError where no file can be written.
    """
    if path is None:
        yield None
        return
    try:
        _move_aside(path)
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"record_trace is {str(path)!r}, which cannot be written: {error.strerror}") from error
    with file:
        file.write(Header(emberkv_trace=1, note=NOTE, model=model).model_dump_json() + "\n")
        file.flush()

        def write(recorded: RecordedRequest) -> None:
            file.write(line_of(recorded).model_dump_json(exclude_defaults=True) + "\n")
            file.flush()

        key = secrets.token_bytes(KEY_BYTES)
        work = background.work("trace recorder")
        recorder = TraceRecorder(write, block_size=block_size, key=key, clock=time.monotonic, work=work)
        try:
            yield recorder
        finally:
            recorder.close()


def _move_aside(path: Path) -> None:
    """Raises ConfigError for what is no plain file, OSError for one that cannot be moved."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file():
        raise ConfigError(f"--record-trace {path} is no plain file; name a new file, or one of an earlier recording")
    for number in count(1):
        try:
            os.link(path, f"{path}.{number}")
        except FileExistsError:
            continue
        path.unlink()
        _log.info("the earlier recording is now %s.%d", path, number)
        return


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
