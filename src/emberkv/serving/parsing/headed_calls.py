"""Parsers of tool calls with a name, markers and then JSON arguments: Mistral, DeepSeek, Kimi and function tags."""

import re

from emberkv.serving.parsing.call_sections import CallSections
from emberkv.serving.parsing.events import CallBegin
from emberkv.serving.parsing.json_calls import ObjectCalls, stream_arguments
from emberkv.serving.parsing.reader import Markers, Steps, TextReader

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
