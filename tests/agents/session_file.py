"""Recorded sessions of coding agents: what a file holds, and how requests lose what is not ours.

A file is JSON lines, compressed with xz: the agent and its version, then each exchange in the order of the requests.
"""

import json
import lzma
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "sessions"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request of an agent, and how it was answered.

    path: with its query. body: None for a request without one. answer: what the model wrote, markup included; None
    where it was not asked. follows: whether this request goes on with the session's last such exchange; others are side
    requests. ids: what the response called its calls, items and itself, in their order.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    status: int
    answer: str | None = None
    follows: bool = False
    ids: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Session:
    """What one agent sent while it was used once."""

    agent: str
    version: str
    exchanges: list[Exchange]

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.agent}.jsonl.xz"

    def write(self) -> None:
        """The same session gives the same bytes."""
        lines = [{"agent": self.agent, "version": self.version}, *map(asdict, self.exchanges)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        FOLDER.mkdir(exist_ok=True)
        self.file.write_bytes(lzma.compress(text.encode(), preset=9))


def read_session(path: Path) -> Session:
    head, *lines = map(json.loads, lzma.decompress(path.read_bytes()).decode().splitlines())
    return Session(head["agent"], head["version"], [Exchange(**line) for line in lines])


IDS = re.compile(r"\b(call|toolu|resp|fc|ctc|rs|msg)_[A-Za-z0-9]{8,}")
"""What a response calls its calls, items and itself, which an agent sends back."""


def ids_in(response: str) -> list[str]:
    """Those of a response, each once, in order."""
    return list(dict.fromkeys(match[0] for match in IDS.finditer(response)))


_WORDS = {
    1: "aeiou",
    2: ["of", "to", "in", "on", "at", "by"],
    3: ["sun", "elm", "oak", "map", "key", "jar"],
    4: ["lake", "moss", "fern", "reed", "wool", "salt"],
    5: ["river", "stone", "cedar", "amber", "birch", "cloud"],
    6: ["harbor", "willow", "copper", "garden", "ladder", "window"],
    7: ["lantern", "orchard", "granite", "feather", "morning", "village"],
    8: ["mountain", "windmill", "sandbank", "hedgerow", "notebook", "sunlight"],
    9: ["lamplight", "riverbank", "snowflake", "crossroad", "farmhouse"],
}  # fmt: skip
_LONGEST = 9
_IDENTIFIER = re.compile(r"[\w.:/$@#*+-]{1,40}")
_OURS_BY_KEY = frozenset({"arguments", "signature", "encrypted_content", "pattern"})
_PIECES = (
    r"x-anthropic-billing-header:[^\n]*",
    r"https?://json-schema\.org/[\w/.#-]*",
    r"</?[a-z][\w-]*>",
    r"\b(?:call|toolu|resp|fco?|ctco?|rs|msg)_",
    r"(?P<hex>[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{16,})",
    r"(?P<digits>\d{2,})",
    r"(?P<word>[^\W\d_]+)",
)


class Replacement:
    """Replaces texts that are not ours by words of ours, of the same lengths and letter cases.

    A word depends on all of the original text before it: texts with a common beginning keep one, and texts that differ
    do so at the same place. kept: texts and ids of ours, which stay as they are. Short identifiers stay, too, and tags,
    and lines of a header that servers know; long numbers and identifiers of machines and users do not.
    """

    def __init__(self, kept: Sequence[str]) -> None:
        longest_first = sorted(kept, key=len, reverse=True)
        self._pattern = re.compile("|".join([*map(re.escape, longest_first), *_PIECES]))

    def of(self, value: Any) -> Any:
        """A JSON value with its strings replaced, but for the arguments of calls, which the script gave."""
        if isinstance(value, dict):
            return {name: each if _is_given(value, name) else self.of(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self.of(each) for each in value]
        return self.text(value) if isinstance(value, str) else value

    def text(self, text: str) -> str:
        if _IDENTIFIER.fullmatch(text) and not re.search(_PIECES[4], text):
            return text
        seen = sha256()

        def replaced(match: re.Match[str]) -> str:
            seen.update(match[0].encode())
            if match["hex"]:
                return _like_hex(match[0])
            if match["digits"]:
                return "".join(str(byte % 10) for byte in seen.digest()[: len(match[0])]).ljust(len(match[0]), "0")
            return _word(match[0], seen.digest()) if match["word"] else match[0]

        return self._pattern.sub(replaced, text)


def _is_given(holder: dict[str, Any], name: str) -> bool:
    """Whether the value under a name is what the server or the script gave, or a pattern of a schema."""
    if name == "input":
        return holder.get("type") == "tool_use"
    return name in _OURS_BY_KEY and isinstance(holder[name], str)


def foreign_words(value: Any, kept: Sequence[str]) -> set[str]:
    """The words in a JSON value's texts, of four letters or more, that `Replacement` has not put there."""
    if isinstance(value, dict):
        return set().union(*(foreign_words(each, kept) for name, each in value.items() if not _is_given(value, name)))
    if isinstance(value, list):
        return set().union(*(foreign_words(each, kept) for each in value))
    if not isinstance(value, str) or _IDENTIFIER.fullmatch(value):
        return set()
    pattern = re.compile("|".join([*map(re.escape, sorted(kept, key=len, reverse=True)), *_PIECES]))
    words = {match["word"].lower() for match in pattern.finditer(value) if match["word"]}
    return {word for word in words if len(word) > 3 and word[:_LONGEST] not in _WORDS[min(len(word), _LONGEST)]}


def _like_hex(text: str) -> str:
    digits = iter(sha256(text.encode()).hexdigest() * (1 + len(text) // 64))
    return "".join(each if each == "-" else next(digits) for each in text)


def _word(original: str, choice: bytes) -> str:
    parts: list[str] = []
    left = len(original)
    while left:
        size = min(left, _LONGEST)
        words = _WORDS[size]
        parts.append(words[choice[len(parts) % 32] % len(words)])
        left -= size
    word = "".join(parts)
    if original.isupper():
        return word.upper()
    return word.capitalize() if original[0].isupper() else word
