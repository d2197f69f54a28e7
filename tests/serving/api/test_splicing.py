"""The next prompt has an answer as it was sampled, whatever form a client sends it back in, if it means the same."""

import json
import random
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.engine.tokenization.tokenizer import KnownTokens
from emberkv.serving.answers.answer_memory import AnswerMemory, RememberedAnswer, template_message
from emberkv.serving.api.conversation import Conversation
from emberkv.serving.api.splicing import SplicedPrompt, difference, splice_answers
from emberkv.serving.parsing.events import ParsedCall, ParsedMessage
from tests.serving.family_tokenizer import FamilyTokenizer
from tests.serving.parsing.families import FAMILIES, TOOLS, Family, as_template_message

MERGED = {"th": 1, "ee": 2, "an": 3, "10": 4}
"""Pairs of characters that encoding makes one token of. A model may sample the characters one by one."""


class MergingTokenizer(FamilyTokenizer):
    """A token for each character, or for a pair of `MERGED`."""

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self._token = re.compile("|".join([*map(re.escape, sorted(self.marks)), *MERGED, "(?s:.)"]))

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        max_tokens: int | None = None,
        known: Sequence[KnownTokens] = (),
    ) -> "array[int]":
        ids = array("i")
        done = 0
        for each in known:
            ids.extend(map(_token_id, self._token.findall(text[done : each.start])))
            ids.extend(each.token_ids)
            done = each.end
        ids.extend(map(_token_id, self._token.findall(text[done:])))
        return ids


def _token_id(text: str) -> int:
    return MERGED.get(text) or (ord(text) if len(text) == 1 else 0x110000 + hash(text) % 1000)


@dataclass
class Session:
    """A conversation of a client whose server remembers answers."""

    family: Family
    memory: AnswerMemory = field(default_factory=AnswerMemory)
    messages: list[dict[str, Any]] = field(default_factory=lambda: [{"role": "user", "content": "Hello there"}])

    def __post_init__(self) -> None:
        self.tokenizer: Any = MergingTokenizer(self.family)

    def prompt(self) -> tuple[SplicedPrompt, list[int]]:
        conversation = Conversation(self.messages, TOOLS)
        text = conversation.prompt_text(self.tokenizer)
        spliced = splice_answers(conversation, text, self.tokenizer, self.family.format, self.memory)
        ids = self.tokenizer.encode(spliced.text, add_special_tokens=False, known=spliced.known)
        return spliced, list(ids)

    def answered(self, message: ParsedMessage) -> tuple[dict[str, Any], list[int]]:
        """Have the model sample ``message``, one character a token. Returns it as a client gets it, and all ids of the
        turn.
        """
        spliced, ids = self.prompt()
        recorder = spliced.recorder(self.memory, Conversation(self.messages, TOOLS), self.family.format)
        assert recorder is not None
        text = self.family.turn_text(message)
        sampled = [ord(char) for char in text]
        parsed = self.family.parsed(text)
        calls = tuple(
            replace(mine, call_id=call.call_id) for mine, call in zip(parsed.calls, message.calls, strict=True)
        )
        parsed = replace(parsed, calls=calls)
        recorder.record(parsed, text, sampled)
        return as_template_message(parsed), ids + sampled

    def goes_on(self, sent: dict[str, Any]) -> None:
        """The client sends an answer back, with a result of each call, or asks something else."""
        self.messages.append(sent)
        calls = sent.get("tool_calls", ())
        self.messages += [
            {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": "then some"}
            for call in calls
        ]
        if not calls:
            self.messages.append({"role": "user", "content": "And the others?"})


def rewritten(message: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The message in other words, as clients send it back."""
    calls = []
    for call in message.get("tool_calls", ()):
        arguments = list(call["function"]["arguments"].items())
        rng.shuffle(arguments)
        if rng.random() < 0.5 and "force" not in dict(arguments):
            arguments.insert(0, ("force", False))
        given = {name: int(value) if isinstance(value, float) else value for name, value in arguments}
        calls.append({**call, "function": {**call["function"], "arguments": given}})
    trimmed = {**message, "content": message["content"].strip()}
    return {**trimmed, "tool_calls": calls} if calls else trimmed


TEXTS = st.sampled_from(["Let me see.", "  Then the panel.  \n", "One of ten.\n\n- 10", "é ee"])
ARGUMENTS = st.dictionaries(
    st.sampled_from(["path", "lines", "level"]),
    st.sampled_from(["a b", "", "10", "then", 10.0, 3.0, 7, True, None, [1, 20], ["ee"], {"k": 1.0}]),
)
STEPS = st.lists(
    st.tuples(TEXTS, st.lists(ARGUMENTS, min_size=1, max_size=2), st.booleans(), st.integers(0, 99)),
    min_size=1,
    max_size=4,
)
TYPED = {"qwen-xml", "glm", "minimax-m2", "deepseek-dsml", "pythonic", "gemma-python"}
"""Formats that do not show what type an argument has: theirs are strings here."""


def message_of(family: Family, step: tuple[str, list[dict[str, Any]], bool, int], turn: int) -> ParsedMessage:
    text, calls, has_text, _ = step
    if family.tools in TYPED:
        calls = [{"path": str(number)} for number, _ in enumerate(calls)]
    ids = [f"call{turn:04}{number}" for number, _ in enumerate(calls)]
    if family.tools == "kimi":
        ids = [f"functions.read:{2 * turn + number}" for number, _ in enumerate(calls)]
    return ParsedMessage(
        "First this then that." if family.reasoning else "",
        text if has_text and family.says_with_call else "",
        tuple(ParsedCall("read", json.dumps(each), call_id) for each, call_id in zip(calls, ids, strict=True)),
    )


@pytest.mark.parametrize("name", list(FAMILIES))
@given(steps=STEPS)
@settings(max_examples=8, deadline=None)
def test_each_step_of_a_tool_loop_begins_with_all_of_the_step_before(name: str, steps: Any) -> None:
    session = Session(FAMILIES[name])
    for turn, step in enumerate(steps):
        answer, computed = session.answered(message_of(session.family, step, turn))
        session.goes_on(rewritten(answer, random.Random(step[3])))
        spliced, ids = session.prompt()
        assert ids[: len(computed)] == computed
        assert set(spliced.outcomes) <= {"same_text", "rewritten"}


def test_what_was_sampled_is_put_in_where_the_text_differs() -> None:
    session = Session(FAMILIES["Qwen2.5"])
    calls = (ParsedCall("edit", '{"path": "then", "level": 10.0}', "call_1"),)
    answer, computed = session.answered(ParsedMessage("", " Let me see.  ", calls))
    answer["content"] = "Let me see."
    answer["tool_calls"][0]["function"]["arguments"] = {"force": False, "level": 10, "path": "then"}
    session.goes_on(answer)
    spliced, ids = session.prompt()
    assert spliced.outcomes == {"rewritten": 1}
    assert ids[: len(computed)] == computed
    session.memory = AnswerMemory()
    spliced, ids = session.prompt()
    assert spliced.outcomes == {"unknown": 1}
    assert ids[: len(computed)] != computed


def test_the_same_text_keeps_the_tokens_that_were_sampled() -> None:
    session = Session(FAMILIES["Qwen2.5"])
    answer, computed = session.answered(ParsedMessage("", "then 10"))
    session.goes_on(answer)
    spliced, ids = session.prompt()
    assert spliced.outcomes == {"same_text": 1}
    assert ids[: len(computed)] == computed
    assert ids != list(session.tokenizer.encode(spliced.text, add_special_tokens=False))


def change(message: dict[str, Any], kind: str) -> None:
    arguments = message["tool_calls"][0]["function"]["arguments"]
    match kind:
        case "text":
            message["content"] += " Not."
        case "value":
            arguments["path"] = "elsewhere"
        case "type":
            arguments["level"] = True
        case "removed":
            del arguments["level"]
        case "added":
            arguments["force"] = True
        case "name":
            message["tool_calls"][0]["function"]["name"] = "edit"
        case "thought":
            message["reasoning_content"] = "Something else."
        case "no thought":
            del message["reasoning_content"]
        case "calls":
            message["tool_calls"] *= 2


@pytest.mark.parametrize(
    "kind", ["text", "value", "type", "removed", "added", "name", "thought", "no thought", "calls"]
)
def test_a_changed_message_is_rendered_as_it_was_sent(kind: str) -> None:
    session = Session(FAMILIES["Qwen3"])
    calls = (ParsedCall("read", '{"path": "then", "level": 1}', "call_1"),)
    answer, _ = session.answered(ParsedMessage("First.", "Let me see.", calls))
    change(answer, kind)
    session.goes_on(answer)
    spliced, _ = session.prompt()
    assert spliced.text == Conversation(session.messages, TOOLS).prompt_text(session.tokenizer)
    assert not spliced.known
    expected = {"no thought": "no_thoughts", "calls": "unknown"}.get(kind, "changed")
    assert spliced.outcomes == {expected: 1}


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(-9, 9).map(lambda each: round(each, 1))
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


def called(arguments: Any, call_id: str | None = "call_1") -> dict[str, Any]:
    function = {"name": "read", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": call_id, "function": function}]}


def as_javascript(value: Any) -> Any:
    """A value as JSON of a client in JavaScript gives it back, with keys in another order."""
    if isinstance(value, dict):
        return {name: as_javascript(each) for name, each in reversed(value.items())}
    if isinstance(value, list):
        return [as_javascript(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=2), VALUES, max_size=3), VALUES, VALUES)
def test_arguments_mean_the_same_only_with_equal_values(arguments: Any, one: Any, other: Any) -> None:
    assert difference(called(as_javascript(arguments)), called(arguments), ()) == ""
    plain = [json.dumps(as_javascript(each), sort_keys=True) for each in (one, other)]
    is_same = difference(called({**arguments, "key": one}, None), called({**arguments, "key": other}, None), ()) == ""
    assert is_same == (plain[0] == plain[1])


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (False, ""),
        (None, ""),
        ("", ""),
        ([], ""),
        (5, ""),
        (5.0, ""),
        (True, "changed"),
        ("x", "changed"),
        (0, "changed"),
    ],
)
def test_only_defaults_may_be_added_and_only_to_a_call_with_its_id(added: Any, expected: str) -> None:
    properties = {"limit": {"default": 5}, "path": {"type": "string"}}
    tool = {"type": "function", "function": {"name": "read", "parameters": {"properties": properties}}}
    sent, sampled = {"path": "a", "limit": added}, {"path": "a"}
    assert difference(called(sent), called(sampled), [tool]) == expected
    assert difference(called(sent, None), called(sampled, None), [tool]) == "changed"


def test_an_answer_is_put_in_only_behind_the_prompt_that_it_was_sampled_for() -> None:
    session = Session(FAMILIES["Qwen2.5"])
    answer, _ = session.answered(ParsedMessage("", " then "))
    session.messages.insert(0, {"role": "system", "content": "Be kind."})
    session.goes_on(answer)
    spliced, _ = session.prompt()
    assert (spliced.outcomes, spliced.known) == ({"other_prompt": 1}, [])


def test_a_thought_that_the_template_leaves_out_is_not_put_in() -> None:
    session = Session(FAMILIES["MiniMax-M2"])
    answer, _ = session.answered(ParsedMessage("First.", "then"))
    session.goes_on(answer)
    spliced, _ = session.prompt()
    assert "First." not in spliced.text
    assert spliced.outcomes == {"template": 1}


def test_of_answers_alike_the_one_to_the_same_prompt_is_put_in() -> None:
    memory = AnswerMemory()
    sessions = [Session(FAMILIES["Qwen2.5"], memory) for _ in range(3)]
    turns = []
    for number, session in enumerate(sessions):
        session.messages.insert(0, {"role": "system", "content": f"Be kind {number}."})
        turns.append(session.answered(ParsedMessage("", "then" + " " * number)))
    assert memory.size()[0] == 3
    for session, (answer, computed) in zip(sessions, turns, strict=True):
        session.goes_on({**answer, "content": "then"})
        assert session.prompt()[1][: len(computed)] == computed


def test_owners_do_not_get_each_others_answers() -> None:
    memory = AnswerMemory()
    session = Session(FAMILIES["Qwen2.5"], memory.of("one"))
    answer, _ = session.answered(ParsedMessage("", " then "))
    session.goes_on(answer)
    for owner, outcome in (("other", "unknown"), ("one", "same_text")):
        session.memory = memory.of(owner)
        assert session.prompt()[0].outcomes == {outcome: 1}
    session.memory = memory.of("one").of("salt")
    assert session.prompt()[0].outcomes == {"unknown": 1}


def remembered(text: str) -> RememberedAnswer:
    message = template_message(ParsedMessage("", text))
    assert message is not None
    return RememberedAnswer(message, text, array("i", range(len(text))), 0, b"")


QUESTION = {"role": "user", "content": "Hello"}


def test_the_tenant_with_the_most_bytes_gives_up_its_oldest_answers() -> None:
    memory = AnswerMemory(max_answers=3)
    one, other = memory.of("one"), memory.of("other")
    other.add(remembered("kept"), QUESTION)
    for number in range(4):
        one.add(remembered(f"answer {number}"), QUESTION)
    assert memory.size()[0] == 3
    assert other.find({"content": "kept"}, QUESTION)
    found = [bool(one.find({"content": f" answer {number}"}, QUESTION)) for number in range(4)]
    assert found == [False, False, True, True]


def test_bytes_are_bounded() -> None:
    size = remembered("x" * 100).size
    memory = AnswerMemory(max_bytes=5 * size)
    for number in range(20):
        memory.add(remembered(f"{number:0100}"), QUESTION)
    assert memory.size() == (5, 5 * size)
    memory.add(remembered("x" * 10_000), QUESTION)
    assert memory.size() == (5, 5 * size)


def test_an_answer_cut_off_in_a_call_or_a_thought_is_not_remembered() -> None:
    session = Session(FAMILIES["Qwen3"])
    spliced, _ = session.prompt()
    recorder = spliced.recorder(session.memory, Conversation(session.messages, TOOLS), session.family.format)
    assert recorder is not None
    recorder.record(ParsedMessage("", "", (ParsedCall("read", '{"path', "call_1", is_complete=False),)), "text", [1])
    recorder.record(ParsedMessage("First"), "First", [1])
    recorder.record(ParsedMessage(), "", [])
    assert session.memory.size()[0] == 0


def test_an_answer_that_the_client_began_is_not_remembered() -> None:
    conversation = Conversation([QUESTION], begun="Well,")
    spliced = SplicedPrompt("Hello Well,", b"")
    assert spliced.recorder(AnswerMemory(), conversation, FAMILIES["Qwen3"].format) is None
