"""What a call grammar lets a model write is read back as calls that are valid by their tools' schemas.

The "model" draws its logits at random, the sampler is the real one, and the tokenizer is the demo model's with each
format's markup as special tokens.
"""

import json
import random
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from emberkv.engine.constraints import ConstraintCompiler, check_constraint, grammar_of
from emberkv.engine.executor import SampledToken, SamplingState
from emberkv.engine.request import Constraint, SamplingParams
from emberkv.engine.tokenization.hf_tokenizer import HFTokenizer
from emberkv.engine.torch.sampling import Sampler
from emberkv.errors import RequestError
from emberkv.serving.api.conversation import ToolChoice
from emberkv.serving.parsing.call_grammar import behind_reasoning, call_constraint, either
from emberkv.serving.parsing.events import ParsedMessage
from emberkv.serving.parsing.formats import REASONING_FORMATS, TOOL_FORMATS, OutputFormat, parse_output

EOS = 2  # <|pad|>, which no format has as its markup
MOST_TOKENS = 400
SHORT = {"type": "string", "maxLength": 12}


def tool(name: str, parameters: dict[str, Any] | None, **more: object) -> dict[str, Any]:
    function = {"name": name, **({} if parameters is None else {"parameters": parameters}), **more}
    return {"type": "function", "function": function}


TOOLS = [
    tool(
        "read_file",
        {
            "type": "object",
            "properties": {
                "path": SHORT,
                "encoding": {"type": "string", "enum": ["utf-8", "latin-1"]},
                "limit": {"type": "integer", "minimum": 1, "maximum": 2000},
                "follow": {"type": "boolean"},
            },
            "required": ["path", "follow"],
        },
    ),
    tool(
        "search",
        {
            "type": "object",
            "properties": {
                "words": {"type": "array", "items": {"$ref": "#/$defs/word"}, "minItems": 1, "maxItems": 2},
                "area": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"],
                         "additionalProperties": False},
            },
            "required": ["area"],
            "$defs": {"word": {"type": "string", "maxLength": 5}},
        },
    ),
    tool("stop", None),
]  # fmt: skip
SCHEMAS = {each["function"]["name"]: each["function"].get("parameters", {"type": "object"}) for each in TOOLS}
"""The last one takes no arguments, and leaves open which objects are valid."""
VALIDATORS = {name: jsonschema.Draft202012Validator(schema) for name, schema in SCHEMAS.items()}


class Speaker:
    """Says what a grammar allows, at random; the longer an answer is, the likelier is what may end it or a part."""

    def __init__(self, output_format: OutputFormat) -> None:
        self.tokenizer = Tokenizer.from_str((files("emberkv") / "demo_model" / "tokenizer.json").read_text())
        markup = sorted({*(text for text in output_format.special_tokens if len(text) > 2), "```tool_code\n"})
        self.tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in markup])
        encoder = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=self.tokenizer))
        self.vocab = self.tokenizer.get_vocab_size()
        self._compiler = ConstraintCompiler(encoder, vocab_size=self.vocab, eos_token_ids=frozenset({EOS}))
        self._sampler = Sampler()
        ends = [
            text for text in ('"', "}", "]", '"}', '"]', ")", "false") if self.tokenizer.token_to_id(text) is not None
        ]
        self._favoured = torch.zeros(self.vocab)  # more and more: what may end an answer or a part
        self._favoured[[EOS, *map(self.tokenizer.token_to_id, [*markup, *ends])]] = 1

    def says(self, constraint: Constraint, seed: int) -> str:
        """A whole answer."""
        masks = self._compiler.begin(constraint)
        generator = torch.Generator().manual_seed(seed)
        params = SamplingParams(temperature=1.0, seed=seed)
        state = SamplingState(params, [0], random.Random(), masks=masks, end_token_ids=frozenset({EOS}))
        for number in range(MOST_TOKENS):
            logits = 3 * torch.randn(1, self.vocab, generator=generator) + min(number / 3, 15) * self._favoured
            logits[0, EOS] += max(0, number - MOST_TOKENS // 2)
            (sampled,) = self._sampler.sample(logits, [state])
            assert isinstance(sampled, SampledToken), sampled
            if state.ends_with(sampled.token_id):
                return str(self.tokenizer.decode(state.answer, skip_special_tokens=False))
            state.append(sampled.token_id)
        raise AssertionError(f"no end: {self.tokenizer.decode(state.answer, skip_special_tokens=False)!r}")


@cache
def speaker(output_format: OutputFormat) -> Speaker:
    return Speaker(output_format)


def format_of(tools: str) -> OutputFormat:
    """With thoughts, where the format has its own or takes any."""
    reasoning = tools if tools in REASONING_FORMATS else None if tools in ("llama3-json", "pythonic") else "think"
    return OutputFormat(tools, reasoning)


def said(
    output_format: OutputFormat,
    seed: int,
    *,
    tools: list[dict[str, Any]] = TOOLS,
    in_reasoning: bool = False,
    **choice: Any,
) -> tuple[str, ParsedMessage]:
    constraint = call_constraint(output_format, tools, ToolChoice(**choice), in_reasoning=in_reasoning)
    assert constraint is not None
    text = speaker(output_format).says(constraint, seed)
    return text, parse_output(output_format, text, tools=tools, in_reasoning=in_reasoning)


def check_calls(text: str, message: ParsedMessage) -> None:
    for call in message.calls:
        assert call.is_complete, text
        VALIDATORS[call.name].validate(json.loads(call.arguments))


@pytest.mark.parametrize("tools", TOOL_FORMATS)
@settings(max_examples=3)
@given(seed=st.integers(0, 2**32), parallel=st.booleans(), in_reasoning=st.booleans())
def test_required_calls_are_valid(tools: str, seed: int, parallel: bool, in_reasoning: bool) -> None:
    output_format = format_of(tools)
    inside = in_reasoning and output_format.reasoning is not None and tools != "harmony"
    text, message = said(output_format, seed, mode="required", parallel=parallel, in_reasoning=inside)
    assert len(message.calls) >= 1, text
    assert parallel or len(message.calls) == 1, text
    assert message.content == "", text
    check_calls(text, message)


@pytest.mark.parametrize("tools", TOOL_FORMATS)
@settings(max_examples=2)
@given(seed=st.integers(0, 2**32), names=st.sampled_from([("search",), ("stop", "read_file")]))
def test_only_named_tools_are_called(tools: str, seed: int, names: tuple[str, ...]) -> None:
    text, message = said(format_of(tools), seed, mode="required", names=names)
    assert message.calls, text
    assert {call.name for call in message.calls} <= set(names), text
    check_calls(text, message)


@pytest.mark.parametrize("tools", TOOL_FORMATS)
@settings(max_examples=3)
@given(seed=st.integers(0, 2**32), parallel=st.booleans())
def test_calls_in_free_text_are_valid(tools: str, seed: int, parallel: bool) -> None:
    strict = [tool(name, schema, strict=True) for name, schema in SCHEMAS.items()]
    text, message = said(format_of(tools), seed, tools=strict, mode="auto", parallel=parallel)
    assert parallel or len(message.calls) <= 1, text
    check_calls(text, message)


@pytest.mark.parametrize(
    ("mode", "names", "parallel", "strict"),
    [("none", (), True, True), ("none", ("stop",), False, True), ("auto", (), True, False)],
)
def test_what_needs_no_constraint_has_none(
    mode: Literal["none", "auto"], names: tuple[str, ...], parallel: bool, strict: bool
) -> None:
    tools = [tool("stop", None, strict=strict)]
    assert call_constraint(OutputFormat("hermes"), tools, ToolChoice(mode, names, parallel)) is None
    assert call_constraint(OutputFormat("hermes"), [], ToolChoice("required")) is None


def test_what_cannot_be_constrained_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="tool_choice names 'fly', which is not among the tools"):
        call_constraint(OutputFormat("hermes"), TOOLS, ToolChoice("required", ("fly",)))
    with pytest.raises(RequestError, match="--tool-parser"):
        call_constraint(OutputFormat(None), TOOLS, ToolChoice("required"))
    bad = tool("bad", {"type": "object", "properties": {"a": {"type": "thing"}}})
    with pytest.raises(RequestError, match="Invalid type: thing") as refused:
        call_constraint(OutputFormat("hermes"), [*TOOLS, bad], ToolChoice("required"))
    assert refused.value.param == "tools[3].function.parameters"


@pytest.mark.parametrize("tools", TOOL_FORMATS)
@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"properties": ["a"]}, r"properties is \['a'\]; it must be an object"),
        ({"properties": {"a": {}}, "required": None}, "required as None; it must be a list"),
        ({"properties": {"a": {"enum": 5}}}, "enum as 5; it must be a list"),
    ],
)
def test_schemas_of_the_wrong_shape_are_refused(tools: str, parameters: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as refused:
        call_constraint(OutputFormat(tools), [tool("bad", parameters)], ToolChoice("required"))
    assert refused.value.param == "tools[0].function.parameters"


def test_a_schema_that_is_true_allows_any_json_behind_thoughts() -> None:
    output_format = OutputFormat(None, "think")
    whole = behind_reasoning(Constraint("json_schema", "true"), output_format)
    json.loads(parse_output(output_format, speaker(output_format).says(whole, 0)).content)


def test_a_keyword_that_is_not_implemented_is_passed_over() -> None:
    odd = tool("odd", {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}})
    assert call_constraint(OutputFormat("hermes"), [odd], ToolChoice("required")) is not None


@pytest.mark.parametrize("reasoning", REASONING_FORMATS)
@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("json_schema", '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}'),
        Constraint("regex", "a/[b-d]{2}"),
        Constraint("lark", 'start: "yes" | word\nword: "no"'),
    ],
    ids=lambda constraint: constraint.kind,
)
def test_thoughts_come_before_a_constrained_answer(reasoning: str, constraint: Constraint) -> None:
    output_format = OutputFormat(None, reasoning)
    whole = behind_reasoning(constraint, output_format)
    for seed in range(2):
        content = parse_output(output_format, speaker(output_format).says(whole, seed)).content
        assert speaker(output_format).says(check_constraint(constraint), seed)
        match constraint.kind:
            case "json_schema":
                assert isinstance(json.loads(content)["a"], bool)
            case "regex":
                assert content in {f"a/{x}{y}" for x in "bcd" for y in "bcd"}
            case _:
                assert content in ("yes", "no")


def test_a_format_without_thoughts_leaves_a_constraint_as_it_is() -> None:
    constraint = Constraint("json_object")
    assert behind_reasoning(constraint, OutputFormat("hermes", None)) is constraint


@pytest.mark.parametrize("reasoning", ["think", None])
def test_either_calls_or_a_form_of_the_text(reasoning: str | None) -> None:
    output_format = OutputFormat("hermes", reasoning)
    calls = call_constraint(output_format, TOOLS, ToolChoice("required"))
    assert calls is not None
    allowed = either(calls, behind_reasoning(Constraint("json_object"), output_format))
    speaker, seen = Speaker(output_format), set()
    for seed in range(12):
        message = parse_output(output_format, speaker.says(allowed, seed), tools=TOOLS)
        seen.add(bool(message.calls))
        for call in message.calls:
            VALIDATORS[call.name].validate(json.loads(call.arguments))
        assert message.calls or isinstance(json.loads(message.content), dict)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("before", "is_allowed"),
    [("", True), ("Let me look.\n", True), ("\n", False), ('{"a" ', False), ("[1] ", False), ("7 ", False)],
)
def test_text_that_does_not_begin_like_json_may_precede_the_calls_beside_a_form(before: str, is_allowed: bool) -> None:
    output_format = OutputFormat("hermes")
    calls = call_constraint(output_format, TOOLS, ToolChoice("required"), prose_first=True)
    assert calls is not None
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar_of(either(calls, Constraint("json_object"))))
    tokens = tokenizer.tokenize_str(before + '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>')
    assert (matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()) is is_allowed


@pytest.mark.parametrize(
    ("pattern", "value", "is_allowed"),
    [
        ("^a|b$", "ax", True),
        ("^a|b$", "xb", True),
        ("^a|b$", "xa", False),
        ("^(a|b)$", "ax", False),
        ("^[|]$|c", "|", True),
        ("^[|]$|c", "||", False),
        (r"^\|$", "|", True),
        (r"^\|$", "x|", False),
    ],
)
def test_an_anchor_in_a_pattern_belongs_to_its_alternative_alone(pattern: str, value: str, is_allowed: bool) -> None:
    search = tool("search", {"properties": {"query": {"type": "string", "pattern": pattern}}, "required": ["query"]})
    constraint = call_constraint(OutputFormat("qwen-xml"), [search], ToolChoice("required"))
    assert constraint is not None
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar_of(constraint))
    call = f"<tool_call>\n<function=search>\n<parameter=query>\n{value}\n</parameter>\n</function>\n</tool_call>"
    tokens = tokenizer.tokenize_str(call)
    assert (matcher.try_consume_tokens(tokens) == len(tokens)) is is_allowed
