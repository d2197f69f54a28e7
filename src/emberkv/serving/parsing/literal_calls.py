"""Parsers of tool calls with arguments in Python's or Gemma's syntax, which are converted to JSON."""

import ast
import re
from collections.abc import Collection, Sequence

from emberkv.serving.parsing.events import CallArguments, CallBegin, CallEnd
from emberkv.serving.parsing.json_calls import read_json_string
from emberkv.serving.parsing.reader import CallSections, Markers, Steps, TextReader
from emberkv.serving.parsing.schema_values import as_json, json_value, within_string

_NAME = re.compile(r"[\w.\-]*")
_WORD = re.compile(r"\w*")
_BARE = re.compile(r"[^:,<>\"{}\[\]]*")
_PLAIN = re.compile(r"[^'\"()\[\]{},]*")
_QUOTED = {"'": re.compile(r"[^'\\]*"), '"': re.compile(r'[^"\\]*')}
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPES = frozenset("\\'\"abfnrtvxuUN01234567\n")


class PythonCalls(CallSections):
    """``[f(a=1, b="x"), g()]`` (Llama 3.2 and 4), or the calls alone in a fenced block (Gemma 3)."""

    separators = " \t\r\n,;["
    leftovers = " \t\r\n]"

    def __init__(
        self, opens: Sequence[str], closes: Sequence[str], *, names: Collection[str], at_start: str = ""
    ) -> None:
        super().__init__(opens, closes, names=names, at_start=at_start)

    def call(self, reader: TextReader, marker: str) -> Steps[bool]:
        name = yield from reader.matching(_NAME)
        if not self.may_call(name) or not (yield from reader.literal("(")):
            return False
        yield from reader.skip()
        key = yield from reader.matching(_WORD)
        if not key and not (yield from reader.comes(")")):
            return False
        yield from reader.skip()
        if key and not (yield from reader.comes("=")):
            return False
        index = self.next_index()
        yield CallBegin(index, name, None)
        yield from self._arguments(reader, index, key)
        return True

    def _arguments(self, reader: TextReader, index: int, key: str) -> Steps[None]:
        separator = "{"
        reader.record()
        while key and (yield from reader.literal("=")):
            value, is_whole = yield from _python_value(reader)
            reader.record()
            yield CallArguments(index, f"{separator}{as_json(key)}: {python_as_json(value) if is_whole else value}")
            separator = ", "
            if not (yield from reader.literal(",")):
                break
            yield from reader.skip()
            key = yield from reader.matching(_WORD)
            yield from reader.skip()
        is_complete = yield from reader.literal(")")
        if is_complete:
            reader.record()
            yield CallArguments(index, "{}" if separator == "{" else "}")
        yield CallEnd(index, is_complete)


def _python_value(reader: TextReader) -> Steps[tuple[str, bool]]:
    """Read a literal up to the following comma or bracket. Returns its text, and whether that delimiter was found."""
    pieces: list[str] = []
    brackets: list[str] = []
    while True:
        pieces.append((yield from reader.matching(_PLAIN)))
        char = yield from reader.next_char()
        if not char:
            return "".join(pieces), False
        if char in _QUOTED:
            pieces.append((yield from _python_string(reader, char)))
            continue
        if not brackets and char in ",)]}":
            return "".join(pieces).strip(), True
        if char in _BRACKETS:
            brackets.append(_BRACKETS[char])
        elif brackets and char == brackets[-1]:
            brackets.pop()
        pieces.append(reader.read(1))


def _python_string(reader: TextReader, quote: str) -> Steps[str]:
    pieces = [reader.read(1)]
    while True:
        pieces.append((yield from reader.matching(_QUOTED[quote])))
        char = yield from reader.next_char()
        pieces.append(reader.read(len(char)))
        if char in ("", quote):
            return "".join(pieces)
        escaped = yield from reader.next_char()
        pieces.append(reader.read(len(escaped)))


def python_as_json(text: str) -> str:
    """The JSON text of a Python literal. Any other text, and a literal without JSON form, becomes a JSON string."""
    escaped = _ESCAPE.sub(lambda match: match[0] if match[1] in _ESCAPES else "\\" + match[0], text)
    try:
        return as_json(ast.literal_eval(escaped))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return json_value(text, frozenset())


class GemmaCalls(CallSections):
    """Parses ``call:name{key:value}``: keys have no quotes, and strings are between ``quote``, a special token."""

    def __init__(self, opens: Sequence[str], closes: Sequence[str], quote: str) -> None:
        super().__init__(opens, closes)
        self._quote = quote
        self._quotes = Markers((quote,))

    def call(self, reader: TextReader, marker: str) -> Steps[bool]:
        if not (yield from reader.literal("call:")):
            return False
        name = yield from reader.matching(_NAME)
        if not name or not (yield from reader.comes("{")):
            return False
        index = self.next_index()
        yield CallBegin(index, name, None)
        is_complete = yield from self._object(reader, index)
        yield CallEnd(index, is_complete)
        return True

    def _object(self, reader: TextReader, index: int) -> Steps[bool]:
        """Emit the object as JSON. Returns False if it is cut off or invalid."""
        closing: list[str] = []
        part = "value"
        while True:
            reader.record()
            yield from reader.skip()
            if part == "key":
                key = yield from self._key(reader)
                if not (yield from reader.literal(":")):
                    return False
                yield CallArguments(index, f"{as_json(key)}: ")
                part = "value"
            elif part == "value":
                opening = yield from reader.one_of(("{", "["))
                if opening:
                    yield CallArguments(index, opening)
                    closing.append(_BRACKETS[opening])
                    yield from reader.skip()
                    is_empty = yield from reader.comes(closing[-1])
                    part = "end" if is_empty else "key" if opening == "{" else "value"
                elif (yield from self._scalar(reader, index)):
                    part = "end"
                else:
                    return False
            elif (yield from reader.literal(closing[-1])):
                yield CallArguments(index, closing.pop())
                if not closing:
                    reader.record()
                    return True
            elif (yield from reader.literal(",")):
                yield CallArguments(index, ", ")
                part = "key" if closing[-1] == "}" else "value"
            else:
                return False

    def _key(self, reader: TextReader) -> Steps[str]:
        if (yield from reader.literal(self._quote)):
            pieces = yield from reader.text_before(self._quotes)
            yield from reader.literal(self._quote)
            return pieces
        if (yield from reader.comes('"')):
            return (yield from read_json_string(reader)) or ""
        return (yield from reader.matching(_BARE)).strip()

    def _scalar(self, reader: TextReader, index: int) -> Steps[bool]:
        """Emit a string, a number or a word such as true. Returns False if it is cut off or invalid."""
        if (yield from reader.literal(self._quote)):
            yield CallArguments(index, '"')
            yield from reader.before(self._quotes, lambda piece: CallArguments(index, within_string(piece)))
            if not (yield from reader.literal(self._quote)):
                return False
            yield CallArguments(index, '"')
            return True
        if (yield from reader.comes('"')):
            text = yield from read_json_string(reader)
            if text is not None:
                yield CallArguments(index, as_json(text))
            return text is not None
        text = (yield from reader.matching(_BARE)).strip()
        if text:
            yield CallArguments(index, json_value(text, frozenset()))
        return bool(text)
