"""Canonical rules: what they match, drop, move and sort; applied twice they do what they do once."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emberkv.errors import ConfigError
from emberkv.serving.api.anthropic_schema import MessagesRequest
from emberkv.serving.api.openai_schema import ChatCompletionRequest
from emberkv.serving.api.rendering import canonical_chat, canonical_messages
from emberkv.serving.canonical import CanonicalRules, Wildcard, load_rules, rules_in_force
from tests.serving.api.test_cache_explain import Server
from tests.serving.harness import MODEL

EXAMPLE = Path(__file__).parents[2] / "examples" / "canonical.yaml"


def rules(*lines: dict[str, Any], **tools: bool) -> CanonicalRules:
    return CanonicalRules.model_validate({"lines": list(lines), "tools": tools})


DATE = {"name": "date", "match": "Today's date is *", "action": "move"}
HEADER = {"name": "header", "match": "x-billing: *", "action": "drop"}


def chat(messages: list[Any], **fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "tiny", "messages": messages, **fields})


def messages(content: Any = "Hi", **fields: Any) -> MessagesRequest:
    body = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": content}], **fields}
    return MessagesRequest.model_validate(body)


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("exact", ["exact", "  exact\r"], ["exactly", "inexact", ""]),
        ("date: *", ["date: 1", " date: 1 2"], ["a date: 1", "date", "date: "]),
        ("*id=*;*", ["id=;", "cc id=7; x"], ["id=7", "id;="]),
        ("ab*ba", ["abba", "abxba"], ["aba", "ab"]),
        (r"\*\*Date\*\*: *", ["**Date**: x"], ["xxDatexx: x"]),
        ("back\\\\slash", ["back\\slash"], ["backslash"]),
    ],
)
def test_patterns(pattern: str, matching: list[str], others: list[str]) -> None:
    wildcard = Wildcard.parse(pattern)
    assert [line for line in matching if not wildcard.matches(line)] == []
    assert [line for line in others if wildcard.matches(line)] == []


@given(st.text("ab*", min_size=1, max_size=8), st.text("ab", max_size=12))
def test_patterns_mean_what_the_regular_expression_means(pattern: str, line: str) -> None:
    expression = ".*".join(map(re.escape, pattern.split("*")))
    assert Wildcard.parse(pattern).matches(line) == bool(re.fullmatch(expression, line))


def test_no_line_makes_a_pattern_backtrack() -> None:
    wildcard = Wildcard.parse("*a" * 200 + "*b")
    assert not wildcard.matches("a" * 1_000_000)  # a backtracking matcher does not return


def test_lines_are_dropped_and_moved_behind_what_stays() -> None:
    request = messages(system="x-billing: 1.2\nYou are helpful.\nToday's date is Monday.\nBe brief.")
    canonical, applied = canonical_messages(request, rules(HEADER, DATE))
    assert canonical.system == "You are helpful.\nBe brief.\nToday's date is Monday."
    assert applied == {"header": 1, "date": 1}


def test_lines_move_to_the_last_block_of_the_system_prompt() -> None:
    blocks = [
        {"type": "text", "text": "Today's date is Monday.\nfirst", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "last"},
    ]
    canonical, _ = canonical_messages(messages(system=blocks), rules(DATE))
    assert canonical.system == [
        {"type": "text", "text": "first", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "last\nToday's date is Monday."},
    ]


def test_a_section_ends_before_its_until_line_or_with_the_text() -> None:
    status = {"name": "status", "match": "gitStatus: *", "until": "# *", "action": "drop"}
    text = "a\ngitStatus: dirty\nM x\n# Rules\nb\ngitStatus: clean\nc"
    canonical, applied = canonical_messages(messages(system=text), rules(status))
    assert canonical.system == "a\n# Rules\nb"
    assert applied == {"status": 4}


def test_openai_system_messages_are_those_it_begins_with() -> None:
    line = "Today's date is Monday."
    given = [
        {"role": "developer", "content": f"{line}\na"},
        {"role": "system", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": f"{line}\nHi"},
        {"role": "system", "content": f"{line}\nc"},
    ]
    canonical, applied = canonical_chat(chat(given), rules(DATE))
    assert canonical.messages == [
        {"role": "developer", "content": "a"},
        {"role": "system", "content": [{"type": "text", "text": f"b\n{line}"}]},
        *given[2:],
    ]
    assert applied == {"date": 1}


def test_rules_for_the_users_messages_leave_answers_alone() -> None:
    reminder = {"name": "reminder", "match": "<reminder>*", "action": "drop", "where": "both"}
    given = [
        {"role": "user", "content": [{"type": "text", "text": "<reminder> 1\nHi"}]},
        {"role": "assistant", "content": "<reminder> 2"},
        {"role": "user", "content": "<reminder> 3\nYes"},
    ]
    canonical, applied = canonical_chat(chat(given), rules(reminder))
    assert [message["content"] for message in canonical.messages] == [
        [{"type": "text", "text": "Hi"}],
        "<reminder> 2",
        "Yes",
    ]
    assert applied == {"reminder": 2}


def test_tools_are_put_in_order() -> None:
    write = {"type": "function", "function": {"name": "write", "parameters": {"type": "object", "properties": {}}}}
    edit = {"type": "function", "function": {"name": "edit", "parameters": {}}}
    canonical, applied = canonical_chat(
        chat([{"role": "user", "content": "Hi"}], tools=[write, edit]), rules(sort=True, sort_keys=True)
    )
    assert canonical.tools == [edit, write]
    assert json.dumps(canonical.tools[1]) == (
        '{"function": {"name": "write", "parameters": {"properties": {}, "type": "object"}}, "type": "function"}'
    )
    assert applied == {"tool-order": 2, "tool-keys": 2}
    plain = [{"name": "b", "input_schema": {}}, {"name": "a", "input_schema": {}}]
    assert canonical_messages(messages(tools=plain), rules(sort=True))[0].tools == plain[::-1]


PATTERNS = ["a*", "b*", "*c", "a", "d*d", "*b*"]
line_rules = st.lists(
    st.fixed_dictionaries(
        {"match": st.sampled_from(PATTERNS), "action": st.sampled_from(["drop", "move"])},
        optional={"until": st.sampled_from(PATTERNS)},
    ),
    max_size=4,
)
texts = st.lists(st.sampled_from(["", "a", "ab", "b", "bc", "c", "dd", "e"]), max_size=8).map("\n".join)
tools = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from("xyz"), "input_schema": st.just({"b": {"d": 1, "c": [{"z": 1, "y": 2}]}})}
    ),
    max_size=3,
)


@example(
    [{"match": "b*", "action": "move", "until": "a*"}, {"match": "d*d", "action": "move", "until": "b*"}],
    ["dd\na\nb"], "", [],
)  # fmt: skip
@given(line_rules, st.lists(texts, min_size=1, max_size=3), texts, tools)
def test_applied_twice_is_applied_once(
    lines: list[dict[str, str]], system: list[str], user: str, given_tools: list[Any]
) -> None:
    named = [{"name": f"rule-{index}", **line} for index, line in enumerate(lines)]
    drops = [{**line, "where": "both"} if line["action"] == "drop" else line for line in named]
    both = rules(*drops, sort=True, sort_keys=True)
    blocks = [{"type": "text", "text": text} for text in system]
    once, _ = canonical_messages(messages(user, system=blocks, tools=given_tools), both)
    twice, _ = canonical_messages(once, both)
    assert twice.model_dump_json() == once.model_dump_json()


@given(st.lists(st.text(), min_size=1, max_size=3), st.text())
def test_without_rules_or_matches_not_a_byte_changes(system: list[str], user: str) -> None:
    blocks = [{"type": "text", "text": text} for text in system]
    request = messages(user, system=blocks, tools=[{"name": "b"}, {"name": "a"}])
    absent = rules({**DATE, "match": "\ue000 nobody writes this *"})
    for given_rules in (None, rules(), absent):
        canonical, applied = canonical_messages(request, given_rules)
        assert canonical.model_dump_json() == request.model_dump_json()
        assert applied == {}


def test_the_example_is_for_coding_agents() -> None:
    system = (
        "Request: 7\nYou are an agent.\nRequest: what the user asks.\n<env>\n"
        "Working directory: /home/a\nToday's date: 2026-01-05\n</env>\ngitStatus: snapshot\nM file.py"
    )
    canonical, applied = canonical_messages(messages(system=system), load_rules(EXAMPLE))
    assert canonical.system == (
        "You are an agent.\nRequest: what the user asks.\n<env>\n</env>\n"
        "Today's date: 2026-01-05\nWorking directory: /home/a\n"
        "gitStatus: snapshot\nM file.py"
    )
    assert applied == {"request-id": 1, "date": 1, "working-directory": 1, "git-status": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lines: [{name: a, match: '*', action: drop}]", "lines.0.match '\\*': it must be a line's text"),
        ("lines: [{name: a, match: x, action: keep}]", "lines.0.action 'keep': use drop or move"),
        ("lines: [{name: A b, match: x, action: drop}]", "lines.0.name 'A b': string should match"),
        ("lines: [{name: a, match: x, action: move, where: user}]", "where must be 'system'"),
        ("lines: [{name: a, match: x, action: drop}, {name: a, match: y, action: drop}]", "the name 'a' is taken"),
        ("lines: [{name: a, match: x, action: drop, until: y, first_line: true}]", "first_line takes one line"),
        ("line: []", "unknown: line; accepted: lines, tools"),
        ("lines: [", "is not YAML"),
    ],
)
def test_a_file_at_fault_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        load_rules(path)
    assert str(path) in str(raised.value)


def test_a_missing_or_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_rules(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").touch()
    assert load_rules(tmp_path / "empty.yaml") == CanonicalRules()


BILLING = "x-anthropic-billing-header: cc_version=2.1.197.{}; cc_entrypoint=sdk-cli;"


def test_claude_codes_billing_line_is_dropped_by_default() -> None:
    given_rules = rules_in_force(None, for_agents=True)
    blocks = [{"type": "text", "text": BILLING.format("f03")}, {"type": "text", "text": "You are an agent."}]
    canonical, applied = canonical_messages(messages(system=blocks), given_rules)
    assert canonical.system == [{"type": "text", "text": ""}, {"type": "text", "text": "You are an agent."}]
    assert applied == {"claude-code-billing": 1}
    same_text, _ = canonical_messages(messages(system=BILLING.format("123") + "\nYou are an agent."), given_rules)
    assert same_text.system == "You are an agent."


def test_sessions_that_differ_in_the_billing_line_share_their_prefix() -> None:
    rest = "You are an agent. " * 20
    hits = []
    for given_rules in (None, rules_in_force(None, for_agents=True)):
        server = Server(bound_to_loopback=True, canonical=given_rules)
        for checksum in ("f03", "123"):
            blocks = [{"type": "text", "text": BILLING.format(checksum)}, {"type": "text", "text": rest}]
            body = {**messages(system=blocks).model_dump(exclude_none=True), "model": MODEL}
            usage = server.client.post("/v1/messages", body).json()["usage"]
        hits.append(usage["cache_read_input_tokens"])
    assert hits[0] < len(BILLING)
    assert hits[1] >= len(rest)


@pytest.mark.parametrize(
    "system", ["You quote headers.\n" + BILLING, "see x-anthropic-billing-header: x", "x-anthropic-billing-header"]
)
def test_a_billing_line_elsewhere_is_for_the_model(system: str) -> None:
    request = messages(BILLING, system=system)
    canonical, applied = canonical_messages(request, rules_in_force(None, for_agents=True))
    assert canonical.model_dump_json() == request.model_dump_json()
    assert applied == {}


def test_a_file_of_rules_adds_to_the_rules_for_agents(tmp_path: Path) -> None:
    own = tmp_path / "rules.yaml"
    own.write_text("lines: [{name: date, match: 'Date: *', action: move}]")
    both = rules_in_force(own, for_agents=True)
    assert both is not None
    assert both.names == ["date", "claude-code-billing"]
    own.write_text("lines: [{name: claude-code-billing, match: 'other: *', action: drop}]\ntools: {sort: true}")
    instead = rules_in_force(own, for_agents=True)
    assert instead is not None
    assert (instead.names, instead.of_system([BILLING]).counts) == (["claude-code-billing", "tool-order"], {})
    assert rules_in_force(None, for_agents=False) is None
