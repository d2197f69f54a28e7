"""The standard system prompt: an operator's file, or one that is built in."""

import logging
import os
from pathlib import Path

from emberkv.errors import ConfigError
from emberkv.warmup_variables import warmup_variables

MAX_PROMPT_BYTES = 2**20

BUILT_IN_PROMPT = """\
You are a helpful, careful assistant. Answer the question that was asked, in the language in which it was asked, and \
begin with the answer itself. Keep it as short as the subject allows; when steps are needed, give them in order and \
say what each one is for. If something is unclear, say how you understand it and go on; ask back only when the \
possible meanings lead to different answers. Separate what you know from what you suppose, and say so when you do not \
know. Never invent quotations, figures, names or sources. Show code in fenced blocks, complete enough to run, and \
mention the versions it needs. Check calculations before you give them. When a request could harm somebody, explain \
what you cannot help with and offer what you can. Treat whatever people share with you as confidential."""

_log = logging.getLogger(__name__)


def get_standard_system_prompt(warmup_file: str | Path | None = None) -> str:
    """What ``warmup_file`` holds, to the letter, else the built-in assistant prompt.

    Without an argument, the variable ``WARMUP_SYSTEM_FILE`` names the file. The built-in prompt is also the answer,
    with a warning, when the file is missing, cannot be read, is empty, larger than 1 MiB, or not UTF-8.
    """
    return prompt_or_built_in(Path(warmup_file) if warmup_file else warmup_variables(os.environ).system_file)


def prompt_or_built_in(path: Path | None) -> str:
    """As `get_standard_system_prompt`; None is the built-in prompt, whatever the environment holds."""
    if path is None:
        return BUILT_IN_PROMPT
    try:
        return read_system_prompt(path)
    except ConfigError as error:
        _log.warning("the system prompt file %s; the built-in prompt takes its place", error)
        return BUILT_IN_PROMPT


def read_system_prompt(path: Path) -> str:
    """What a file holds, to the letter but for a byte-order mark.

    Raises ConfigError, beginning with the file's name, where it cannot be read, is larger than 1 MiB, is not UTF-8 or
    is empty.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PROMPT_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}") from error
    if len(content) > MAX_PROMPT_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_PROMPT_BYTES:,} bytes")
    if not text.strip():
        raise ConfigError(f"{path} is empty")
    return text
