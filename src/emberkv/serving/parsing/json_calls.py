"""Parsers of tool calls with JSON arguments, which are emitted as the model writes them: objects with a name, and
markers or tags with the name before the arguments (Mistral, DeepSeek, Kimi, function tags).
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from pydantic_core import from_json

from emberkv.serving.parsing.events import CallArguments, CallBegin, CallEnd
from emberkv.serving.parsing.reader import CallSections, Markers, Steps, TextReader
from emberkv.serving.parsing.schema_values import is_json_object

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_OUTSIDE = re.compile(r"[ \t\r\n:,0-9A-Za-z+.\-]*")
_SCALAR = re.compile(r"[0-9A-Za-z+.\-]*")
_CLOSING = {"{": "}", "[": "]"}


class JsonState(Enum):
    """The state of a JSON value that is being read. BROKEN: the next character is not valid JSON."""

    OPEN = "open"
    WHOLE = "whole"
    BROKEN = "broken"


class JsonScanner:
    """Finds the end of a JSON object, array or string in text that arrives in pieces."""

    def __init__(self) -> None:
        self.state = JsonState.OPEN
        self._brackets: list[str] = []
        self._in_string = False
        self._is_escaped = False

    def scan(self, text: str, at: int) -> int:
        """Scan ``text`` from ``at`` on. Returns the position up to which it belongs to the value."""
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


def read_json(reader: TextReader) -> Steps[tuple[str, bool]]:
    """Read one JSON value, or as much of it as the answer has. Returns its text, and whether it is whole."""
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
    """Read a JSON string and return its value; None for other text, and for half of a surrogate pair."""
    if (yield from reader.next_char()) != '"':
        return None
    text, _ = yield from read_json(reader)
    try:
        return str(from_json(text))
    except ValueError:
        return None


def stream_arguments(reader: TextReader, index: int, ends: Markers) -> Steps[None]:
    """Emit the arguments of call ``index`` as they arrive, and then its end.

    If they stop being valid JSON, the text up to the first of ``ends`` (which is not read) is emitted as it is, and the
    call is incomplete.
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
    """Emit the arguments of call ``index`` and its end. Some models write the object as a JSON string."""
    if text.startswith('"'):
        try:
            said = str(from_json(text))
        except ValueError:
            said = ""
        text = said if is_json_object(said) else text
    if text:
        yield CallArguments(index, text)
    yield CallEnd(index, is_json_object(text))


_NAME_KEYS = ("name", "tool_name")
_ARGUMENT_KEYS = ("arguments", "parameters")
_ID_KEYS = ("id", "call_id")
_OTHER_KEYS = ("type", "index", "tool_call_id")  # tool_call_id: Cohere's, which counts within one turn
_SPACE = " \t\r\n"


class ObjectCalls(CallSections):
    """Parses calls as objects, ``{"name": "f", "arguments": {...}}``, after a marker: one, several, or a list of them.

    ids_follow: whether a call's id comes after its arguments, which are then emitted when the id is known.
    """

    separators = _SPACE + ",;["
    leftovers = _SPACE + "]}"

    def __init__(
        self,
        opens: Sequence[str],
        closes: Sequence[str] = (),
        *,
        names: Collection[str] | None = None,
        at_start: str = "",
        ids_follow: bool = False,
    ) -> None:
        super().__init__(opens, closes, names=names, at_start=at_start)
        self._ids_follow = ids_follow

    def call(self, reader: TextReader, marker: str) -> Steps[bool]:
        head = yield from self._head(reader)
        if head is None:
            return False
        index = self.next_index()
        yield CallBegin(index, head.name, head.call_id)
        if head.arguments is not None:
            yield from whole_arguments(index, head.arguments)
        else:
            yield from stream_arguments(reader, index, self.ends)
        reader.record()
        if (yield from _skip_members(reader, head.depth)):
            reader.record()
        return True

    def _head(self, reader: TextReader) -> Steps["_Head | None"]:
        """Read an object up to the arguments, or all of it if they precede the name. None if it is no call."""
        head = _Head()
        if not (yield from reader.literal("{")):
            return None
        while not head.is_ready:
            key = yield from _key(reader)
            if key == "function" and (yield from reader.literal("{")):
                head.depth += 1
                continue
            if not (yield from self._member(reader, head, key)):
                return None
            if not head.is_ready and not (yield from _behind_member(reader, head)):
                return None
        return head if head.name else None

    def _member(self, reader: TextReader, head: "_Head", key: str | None) -> Steps[bool]:
        """Read the value of ``key``. Returns False if the object is not a call."""
        if key in _NAME_KEYS:
            head.name = (yield from read_json_string(reader)) or ""
            return self.may_call(head.name)
        if key in _ARGUMENT_KEYS:
            head.is_ready = bool(head.name) and not self._ids_follow
            if not head.is_ready:
                head.arguments, is_whole = yield from read_json(reader)
                head.is_ready = not is_whole
            return True
        if key in _ID_KEYS:
            head.call_id = yield from read_json_string(reader)
            return head.call_id is not None
        return key in _OTHER_KEYS and (yield from read_json(reader))[1]


@dataclass(slots=True)
class _Head:
    """The members of a call that precede its streamed arguments.

    depth: the number of open brackets around the arguments. is_ready: whether the arguments come next, were read, or
    are cut off.
    """

    name: str = ""
    call_id: str | None = None
    arguments: str | None = None
    depth: int = 1
    is_ready: bool = False


def _key(reader: TextReader) -> Steps[str | None]:
    """Read a member's key and its colon; None if something else follows."""
    yield from reader.skip()
    key = yield from read_json_string(reader)
    yield from reader.skip()
    if key is None or not (yield from reader.literal(":")):
        return None
    yield from reader.skip()
    return key


def _behind_member(reader: TextReader, head: _Head) -> Steps[bool]:
    """Read the comma or the brackets after a member. Returns False if something else follows."""
    yield from reader.skip()
    while head.depth and (yield from reader.literal("}")):
        head.depth -= 1
        yield from reader.skip()
    if head.depth:
        return (yield from reader.literal(","))
    head.arguments = head.arguments or "{}"
    head.is_ready = True
    return True


def _skip_members(reader: TextReader, depth: int) -> Steps[bool]:
    """Read the rest of a call's object after its arguments. Returns False for invalid text."""
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


_NAME = re.compile(r"[\w.\-/]*")
_WORD = re.compile(r"\w*")
_CALL_ID = re.compile(r"[\w.\-/:]*")


class MistralCalls(ObjectCalls):
    """``[TOOL_CALLS][{...}, {...}]``, and from tokenizer v11 on ``[TOOL_CALLS]name[ARGS]{...}`` for each call."""

    def __init__(self) -> None:
        super().__init__(("[TOOL_CALLS]",), ids_follow=True)

    def call(self, reader: TextReader, marker: str) -> Steps[bool]:
        if not marker or (yield from reader.next_char()) == "{":
            return (yield from super().call(reader, marker))
        name = yield from reader.matching(_NAME)
        call_id = None
        if name and (yield from reader.literal("[CALL_ID]")):
            call_id = yield from reader.matching(_WORD)
        has_marker = yield from reader.literal("[ARGS]")
        if not name or not (has_marker or (yield from reader.comes("{"))):
            return False
        index = self.next_index()
        yield CallBegin(index, name, call_id)
        yield from stream_arguments(reader, index, self.ends)
        reader.record()
        return True


class DeepSeekCalls(CallSections):
    """V3.1: ``name<sep>{...}`` between call markers; V3 and R1: ``function<sep>name``, and a fenced block of JSON."""

    begin, separator, end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"

    def __init__(self) -> None:
        super().__init__(("<｜tool▁calls▁begin｜>",), (self.end, "<｜tool▁calls▁end｜>"))

    def call(self, reader: TextReader, marker: str) -> Steps[bool]:
        if not (yield from reader.literal(self.begin)):
            return False
        name = yield from reader.matching(_NAME)
        if not (yield from reader.literal(self.separator)):
            return False
        if name == "function" and not (yield from reader.comes("{")):
            name = yield from reader.matching(_NAME)
            yield from reader.skip()
            yield from reader.literal("```json")
        if not name:
            return False
        yield from reader.skip()
        index = self.next_index()
        yield CallBegin(index, name, None)
        yield from stream_arguments(reader, index, self.ends)
        reader.record()
        yield from reader.skip()
        yield from reader.literal("```")
        if (yield from reader.literal(self.end)):
            reader.record()
        return True


class KimiCalls(CallSections):
    """A call's id is ``functions.NAME:INDEX``, which contains its name."""

    begin, separator, end = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"

    def __init__(self) -> None:
        super().__init__(("<|tool_calls_section_begin|>",), (self.end, "<|tool_calls_section_end|>"))

    def call(self, reader: TextReader, marker: str) -> Steps[bool]:
        if not (yield from reader.literal(self.begin)):
            return False
        yield from reader.skip()
        call_id = yield from reader.matching(_CALL_ID)
        yield from reader.skip()
        name = call_id.partition(":")[0].removeprefix("functions.")
        if not name or not (yield from reader.literal(self.separator)):
            return False
        yield from reader.skip()
        index = self.next_index()
        yield CallBegin(index, name, call_id)
        yield from _closed_arguments(reader, index, self.ends, self.end)
        return True


class FunctionTagCalls(CallSections):
    """``<function=NAME>{...}</function>`` (Llama 3.1's custom functions, Functionary v3.1)."""

    end = "</function>"

    def __init__(self) -> None:
        super().__init__(("<function=",), (self.end,))

    def call(self, reader: TextReader, marker: str) -> Steps[bool]:
        if not marker:
            return False
        name = yield from reader.matching(_NAME)
        if not name or not (yield from reader.literal(">")):
            return False
        yield from reader.skip()
        if not (yield from reader.comes("{")):
            return False
        index = self.next_index()
        yield CallBegin(index, name, None)
        yield from _closed_arguments(reader, index, self.ends, self.end)
        return True


def _closed_arguments(reader: TextReader, index: int, ends: Markers, end: str) -> Steps[None]:
    """Emit the arguments of call ``index``, and read the marker ``end`` behind them if it is there."""
    yield from stream_arguments(reader, index, ends)
    reader.record()
    yield from reader.skip()
    if (yield from reader.literal(end)):
        reader.record()
