"""Tool calls whose arguments are JSON: passed on as the model writes them, character by character."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from emberkv.serving.parsing.events import CallArguments, CallBegin, CallEnd, ContentText
from emberkv.serving.parsing.reader import Markers, Steps, TextReader

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_OUTSIDE = re.compile(r"[ \t\r\n:,0-9A-Za-z+.\-]*")
_SCALAR = re.compile(r"[0-9A-Za-z+.\-]*")
_CLOSING = {"{": "}", "[": "]"}


class JsonState(Enum):
    """How far a JSON value has been read. BROKEN: what follows cannot belong to JSON."""

    OPEN = "open"
    WHOLE = "whole"
    BROKEN = "broken"


class JsonScanner:
    """Finds where a JSON object, list or string ends, in text that comes in pieces."""

    def __init__(self) -> None:
        self.state = JsonState.OPEN
        self._brackets: list[str] = []
        self._in_string = False
        self._is_escaped = False

    def scan(self, text: str, at: int) -> int:
        """Up to where ``text`` belongs to the value, from ``at`` on, which is behind what was scanned before."""
        while at < len(text) and self.state is JsonState.OPEN:
            at = self._in_a_string(text, at) if self._in_string else self._outside(text, at)
        return at

    def _in_a_string(self, text: str, at: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return self._breaks(at) if text[at] < " " else at + 1
        match = _PLAIN.match(text, at)
        at = match.end() if match else at
        if at == len(text):
            return at
        if text[at] < " ":
            return self._breaks(at)
        if text[at] == "\\":
            self._is_escaped = True
        else:
            self._in_string = False
            self._ends_if_outermost()
        return at + 1

    def _outside(self, text: str, at: int) -> int:
        if self._brackets:
            match = _OUTSIDE.match(text, at)
            at = match.end() if match else at
            if at == len(text):
                return at
        char = text[at]
        if char == '"':
            self._in_string = True
        elif char in _CLOSING:
            self._brackets.append(_CLOSING[char])
        elif self._brackets and char == self._brackets[-1]:
            self._brackets.pop()
            self._ends_if_outermost()
        else:
            return self._breaks(at)
        return at + 1

    def _ends_if_outermost(self) -> None:
        if not self._brackets:
            self.state = JsonState.WHOLE

    def _breaks(self, at: int) -> int:
        self.state = JsonState.BROKEN
        return at


def is_json_object(text: str) -> bool:
    """Whether ``text`` is valid JSON, of an object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def read_json(reader: TextReader) -> Steps[tuple[str, bool]]:
    """Read one JSON value, or as much of one as there is: its text, and whether it is whole."""
    if (yield from reader.next_char()) not in ("{", "[", '"'):
        scalar = yield from reader.matching(_SCALAR)
        return scalar, bool(scalar)
    scanner, pieces = JsonScanner(), list[str]()
    while scanner.state is JsonState.OPEN:
        text, at = yield from reader.at_hand()
        if at == len(text):
            break
        pieces.append(reader.take(scanner.scan(text, at)))
    return "".join(pieces), scanner.state is JsonState.WHOLE


def read_json_string(reader: TextReader) -> Steps[str | None]:
    """Read a JSON string and return what it says; None where something else comes."""
    if (yield from reader.next_char()) != '"':
        return None
    text, _ = yield from read_json(reader)
    try:
        return str(json.loads(text))
    except ValueError:
        return None


def stream_arguments(reader: TextReader, index: int, ends: Markers) -> Steps[None]:
    """Pass on the arguments of call ``index`` as they come, and end the call.

    Where they stop being JSON, all up to the first of ``ends`` (which is not read) is passed on as it is, so that
    nothing is lost, and the call is not complete.
    """
    if (yield from reader.next_char()) != "{":
        text, _ = yield from read_json(reader)
        yield from whole_arguments(index, text)
        return
    scanner, pieces = JsonScanner(), list[str]()
    while scanner.state is JsonState.OPEN:
        text, at = yield from reader.at_hand()
        if at == len(text):
            break
        if piece := reader.take(scanner.scan(text, at)):
            pieces.append(piece)
            yield CallArguments(index, piece)
    if scanner.state is JsonState.BROKEN:
        yield from reader.before(ends, lambda piece: CallArguments(index, piece))
    yield CallEnd(index, scanner.state is JsonState.WHOLE and is_json_object("".join(pieces)))


def whole_arguments(index: int, text: str) -> Steps[None]:
    """The arguments of call ``index`` at once, and its end. Some models write the object's text as a JSON string."""
    if text.startswith('"'):
        try:
            said = str(json.loads(text))
        except ValueError:
            said = ""
        text = said if is_json_object(said) else text
    if text:
        yield CallArguments(index, text)
    yield CallEnd(index, is_json_object(text))


_ARGUMENT_KEYS = ("arguments", "parameters")
_ID_KEYS = ("id", "call_id")
_OTHER_KEYS = ("type", "index")
_SPACE = " \t\r\n"


class ObjectCalls:
    """Calls as objects, ``{"name": "f", "arguments": {...}}``, behind a marker: one, several, or a list of them.

    opens: markers that calls follow. closes: markers that may end them. names: of tools, where no other name makes an
    object a call; None: any name does. ids_follow: models write a call's id behind its arguments, so that these have
    to wait for it.
    """

    def __init__(
        self,
        opens: Sequence[str],
        closes: Sequence[str] = (),
        *,
        names: Collection[str] | None = None,
        ids_follow: bool = False,
    ) -> None:
        self._opens = Markers(opens)
        self._closes = Markers(closes)
        self._both = Markers((*opens, *closes))
        self._ends = Markers((*closes, *opens))
        self._names = names
        self._ids_follow = ids_follow
        self._calls = 0

    def steps(self, reader: TextReader) -> Steps[None]:
        is_unclosed = False
        while True:
            marker = yield from reader.until(self._both if is_unclosed else self._opens, ContentText)
            if not marker:
                return
            is_unclosed = False
            if marker not in self._closes.texts:
                is_unclosed = yield from self.section(reader, marker)

    def section(self, reader: TextReader, marker: str) -> Steps[bool]:
        """The calls behind ``marker``, which has been read. Returns whether the marker that closes them is to come."""
        before = self._calls
        reader.record()
        while True:
            yield from reader.skip(_SPACE + ",;[")
            if (yield from reader.next_char()) != "{" or not (yield from self._call(reader)):
                break
        has_calls = self._calls > before
        yield from reader.skip(_SPACE + "]}")
        closed = bool((yield from reader.one_of(self._closes.texts)))
        left = reader.recorded()
        if not has_calls:
            yield ContentText(marker + left)
            return False
        if not closed and left.strip(_SPACE + ",;[]}"):
            yield ContentText(left)
        return not closed

    def _call(self, reader: TextReader) -> Steps[bool]:
        """One object. Where it is no call, nothing is yielded, and the reader has a record of it."""
        head = yield from self._head(reader)
        if head is None:
            return False
        index = self._calls
        self._calls += 1
        yield CallBegin(index, head.name, head.call_id)
        if head.arguments is not None:
            yield from whole_arguments(index, head.arguments)
        else:
            yield from stream_arguments(reader, index, self._ends)
        reader.record()
        if (yield from _skip_members(reader, head.depth)):
            reader.record()
        return True

    def _head(self, reader: TextReader) -> Steps["_Head | None"]:
        """An object up to the arguments that can be streamed, or all of it where these came first."""
        head = _Head()
        yield from reader.literal("{")
        while True:
            key = yield from _key(reader)
            if key == "name":
                head.name = (yield from read_json_string(reader)) or ""
                if not head.name or (self._names is not None and head.name not in self._names):
                    return None
            elif key == "function" and (yield from reader.literal("{")):
                head.depth += 1
                continue
            elif key in _ARGUMENT_KEYS:
                if head.name and not self._ids_follow:
                    return head
                head.arguments, is_whole = yield from read_json(reader)
                if not is_whole:
                    return head if head.name else None
            elif key in _ID_KEYS:
                head.call_id = yield from read_json_string(reader)
            elif key not in _OTHER_KEYS or not (yield from read_json(reader))[1]:
                return None
            yield from reader.skip()
            while head.depth and (yield from reader.literal("}")):
                head.depth -= 1
                yield from reader.skip()
            if not head.depth:
                head.arguments = head.arguments or "{}"
                return head if head.name else None
            if not (yield from reader.literal(",")):
                return None


@dataclass(slots=True)
class _Head:
    """What is known of a call before its arguments are streamed. depth: brackets that are open around them."""

    name: str = ""
    call_id: str | None = None
    arguments: str | None = None
    depth: int = 1


def _key(reader: TextReader) -> Steps[str | None]:
    """Read a member's key and its colon; None where something else comes."""
    yield from reader.skip()
    key = yield from read_json_string(reader)
    yield from reader.skip()
    if key is None or not (yield from reader.literal(":")):
        return None
    yield from reader.skip()
    return key


def _skip_members(reader: TextReader, depth: int) -> Steps[bool]:
    """Read the rest of a call's object behind its arguments; False where something else comes."""
    while depth:
        yield from reader.skip()
        if (yield from reader.literal("}")):
            depth -= 1
            continue
        if not (yield from reader.literal(",")) or (yield from _key(reader)) is None:
            return False
        if not (yield from read_json(reader))[1]:
            return False
    return True
