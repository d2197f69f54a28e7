"""The standard system prompt: an operator's file, or one that is built in."""

import logging
from pathlib import Path

from emberkv.errors import ConfigError

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

    The built-in prompt is also the answer, with a warning, when the file is missing, cannot be read, is larger than
    1 MiB, or is not UTF-8; and when it is empty.
    """
    if warmup_file is None:
        return BUILT_IN_PROMPT
    try:
        return _read(Path(warmup_file))
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 at byte {error.start}"
    except ConfigError as error:
        problem = str(error)
    _log.warning("the system prompt file %s %s; the built-in prompt takes its place", warmup_file, problem)
    return BUILT_IN_PROMPT


def _read(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MAX_PROMPT_BYTES + 1)
    if len(content) > MAX_PROMPT_BYTES:
        raise ConfigError(f"is larger than {MAX_PROMPT_BYTES:,} bytes")
    text = content.decode("utf-8-sig")
    if not text.strip():
        raise ConfigError("is empty")
    return text
