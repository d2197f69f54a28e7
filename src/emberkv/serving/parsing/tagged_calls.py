"""Parsers of tool calls in tags, with one tag for the call and one for each argument, whose value is plain text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from emberkv.serving.parsing.events import CallArguments, CallBegin, CallEnd
from emberkv.serving.parsing.reader import CallSections, Markers, Steps, TextReader
from emberkv.serving.parsing.schema_values import ParameterTypes, as_json, json_value, within_string

_ANY = frozenset[str]()
_TEXT = frozenset({"string"})


@dataclass(frozen=True, slots=True)
class TagSyntax:
    """The syntax ``opens call NAME call_head (key KEY key_end value VALUE value_end)* call_end closes``.

    name: a regular expression for the call's name. call_end: empty if only ``closes`` ends a call. value: alternative
    texts before a value, each with the types that it declares (none: those of the schema). trims: whether one line
    break at each end of a value is not part of it. bare: whether a call may come without ``opens``.
    """

    opens: tuple[str, ...]
    closes: tuple[str, ...]
    call: str
    call_head: str
    call_end: str
    key: str
    key_end: str
    value: tuple[tuple[str, frozenset[str]], ...]
    value_end: str
    name: str = r'[^<>"\s]*'
    trims: bool = False
    bare: bool = False


QWEN = TagSyntax(
    ("\n<tool_call>", "<tool_call>", "<seed:tool_call>"), ("</tool_call>", "</seed:tool_call>"),
    "<function=", ">", "</function>", "<parameter=", ">", (("", _ANY),), "</parameter>", trims=True, bare=True,
)  # fmt: skip
GLM = TagSyntax(
    ("\n<tool_call>", "<tool_call>"), ("</tool_call>",), "", "", "",
    "<arg_key>", "</arg_key>", (("\n<arg_value>", _ANY), ("<arg_value>", _ANY)), "</arg_value>",
)  # fmt: skip
MINIMAX = TagSyntax(
    ("\n<minimax:tool_call>", "<minimax:tool_call>"), ("</minimax:tool_call>",), '<invoke name="', '">', "</invoke>",
    '<parameter name="', '">', (("", _ANY),), "</parameter>",
)  # fmt: skip
DEEPSEEK = TagSyntax(
    tuple(space + tag for tag in ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>") for space in ("\n\n", "")),
    ("</｜DSML｜function_calls>", "</｜DSML｜tool_calls>"), '<｜DSML｜invoke name="', '">', "</｜DSML｜invoke>",
    '<｜DSML｜parameter name="', '"', ((' string="true">', _TEXT), (' string="false">', _ANY), (">", _ANY)),
    "</｜DSML｜parameter>",
)  # fmt: skip


class TaggedCalls(CallSections):
    """Parses calls of one `TagSyntax`."""

    def __init__(self, syntax: TagSyntax, types: ParameterTypes) -> None:
        bare = ("\n" + syntax.call, syntax.call) if syntax.bare else ()
        super().__init__((*syntax.opens, *bare), syntax.closes)
        self._syntax = syntax
        self._types = types
        self._name = re.compile(syntax.name)
        self._key = re.compile(r'[^<>"\n]*')
        self._value_ends = Markers(("\n" + syntax.value_end, syntax.value_end) if syntax.trims else (syntax.value_end,))
        ends = (syntax.call_end, *syntax.closes) if syntax.call_end else syntax.closes
        self._behind_value = (syntax.key, *ends)
        self._call_ends = ends

    def call(self, reader: TextReader, marker: str) -> Steps[bool]:
        syntax = self._syntax
        if not (syntax.call or marker):
            return False
        is_bare = syntax.bare and marker.endswith(syntax.call)
        if not is_bare and not (yield from reader.literal(syntax.call)):
            return False
        name = yield from reader.matching(self._name)
        if not name or not (yield from reader.literal(syntax.call_head)):
            return False
        yield from reader.skip()
        if (is_bare and name not in self._types.names) or not (yield from self._comes(reader, self._behind_value)):
            return False
        index = self.next_index()
        yield CallBegin(index, name, None)
        yield from self._arguments(reader, index, name)
        return True

    def _arguments(self, reader: TextReader, index: int, name: str) -> Steps[None]:
        separator = "{"
        while True:
            reader.record()
            yield from reader.skip()
            key = yield from self._parameter(reader)
            if key is None:
                break
            reader.record()
            yield CallArguments(index, f"{separator}{as_json(key)}: ")
            separator = ", "
            types = yield from self._value_types(reader)
            yield from self._value(reader, index, types or self._types.of(name, key))
        is_complete = bool((yield from self._comes(reader, self._call_ends)))
        if is_complete:
            yield CallArguments(index, "{}" if separator == "{" else "}")
            if self._syntax.call_end and (yield from reader.literal(self._syntax.call_end)):
                reader.record()
        yield CallEnd(index, is_complete)

    def _parameter(self, reader: TextReader) -> Steps[str | None]:
        """Read a parameter's name up to its value's tag; None if no parameter follows."""
        if not (yield from reader.literal(self._syntax.key)):
            return None
        key = yield from reader.matching(self._key)
        return key if (yield from reader.literal(self._syntax.key_end)) else None

    def _value_types(self, reader: TextReader) -> Steps[frozenset[str]]:
        for text, types in self._syntax.value:
            if (yield from reader.literal(text)):
                return types
        return _ANY

    def _value(self, reader: TextReader, index: int, types: frozenset[str]) -> Steps[None]:
        """Emit a string as it arrives, and any other value when it is whole.

        A closing tag ends the value only if a parameter or the call's end follows; otherwise it is part of the value.
        """
        if self._syntax.trims:
            yield from reader.literal("\n")
        is_text = types == _TEXT
        pieces: list[str] = []
        if is_text:
            yield CallArguments(index, '"')
        is_whole = False
        while not is_whole:
            reader.record()
            length = yield from reader.before(
                self._value_ends, (lambda piece: CallArguments(index, within_string(piece))) if is_text else None
            )
            pieces.append(reader.recorded())
            if not length:
                break
            tag = reader.read(length)
            is_whole = yield from reader.comes_behind_space(self._behind_value)
            if not is_whole:
                pieces.append(tag)
                if is_text:
                    yield CallArguments(index, within_string(tag))
        if is_text:
            yield from ((CallArguments(index, '"'),) if is_whole else ())
        elif text := "".join(pieces):
            yield CallArguments(index, json_value(text, types) if is_whole else text)
        elif is_whole:
            yield CallArguments(index, json_value("", types))

    def _comes(self, reader: TextReader, texts: Sequence[str]) -> Steps[bool]:
        for text in texts:
            if (yield from reader.comes(text)):
                return True
        return False
