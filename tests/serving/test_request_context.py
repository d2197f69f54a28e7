"""Sessions: how they are known, grouped by tenant and id, and bounded."""

import json

import pytest

from emberkv.engine.request import CacheUsage
from emberkv.errors import RequestError
from emberkv.serving.request_context import (
    ID_BYTES,
    IDS_AT_ONCE,
    RecentRequests,
    RecentSessions,
    RequestContext,
    random_id,
    session_id,
)
from emberkv.serving.tenancy import Tenant


def asked(session: str, tenant: str = "ann") -> RequestContext:
    return RequestContext(f"{tenant}-{session}", "messages", Tenant(tenant, b""), 0.0, session)


def test_the_longest_silent_session_is_forgotten() -> None:
    sessions = RecentSessions(limit=2)
    for session in ("one", "two", "one", "three"):
        sessions.count(asked(session), [CacheUsage(10, 8), CacheUsage(5, 0)], now=1.0)
    assert [(each["session"], each["requests"], each["prompt_tokens"]) for each in sessions.listing()] == [
        ("three", 1, 15),
        ("one", 2, 30),
    ]


def test_tenants_may_choose_the_same_id() -> None:
    sessions = RecentSessions()
    for tenant in ("ann", "bob"):
        sessions.count(asked("one", tenant), [CacheUsage(10, 8)], now=1.0)
    assert [(each["tenant"], each["hit_tokens"]) for each in sessions.listing()] == [("bob", 8), ("ann", 8)]


def test_requests_without_a_session_are_not_counted() -> None:
    sessions = RecentSessions()
    sessions.count(asked(""), [CacheUsage(10, 8)], now=1.0)
    assert len(sessions) == 0


def test_only_the_last_requests_are_remembered() -> None:
    recent = RecentRequests(limit=1)
    recent.add(asked("one"))
    recent.add(asked("two"))
    assert recent.get("ann-one") is None
    assert recent.get("ann-two") == asked("two")


UUID = "0f8fad5b-d9cb-469f-a165-70867728950e"


@pytest.mark.parametrize(
    ("headers", "user_id", "expected"),
    [
        ({}, "", ""),
        ({"x-session-id": "mine", "x-claude-code-session-id": "other"}, "user", "mine"),
        ({"x-claude-code-session-id": "s"}, f"user_1_account__session_{UUID}", "s"),
        ({"x-claude-code-session-id": "s", "x-claude-code-agent-id": "explore"}, "", "s/explore"),
        ({"x-claude-code-agent-id": "explore"}, "", ""),
        ({"session-id": "codex"}, "", "codex"),
        ({"session_id": "codex"}, "", "codex"),
        ({}, f"user_{'a' * 64}_account__session_{UUID}", UUID),
        ({}, json.dumps({"device_id": "d", "account_uuid": "", "session_id": UUID}), UUID),
        ({}, "ann", "ann"),
    ],
)
def test_a_session_is_known_from_what_agents_send(headers: dict[str, str], user_id: str, expected: str) -> None:
    assert session_id(headers, user_id) == expected


def test_a_long_id_of_an_agent_is_shortened_and_stays_distinct() -> None:
    one, other = (session_id({"session-id": "x" * 200 + end}) for end in "ab")
    assert (len(one), one != other) == (32, True)
    with pytest.raises(RequestError, match="x-session-id has 129 characters"):
        session_id({"x-session-id": "x" * 129})


def test_ids_differ_and_have_128_bits_beyond_those_drawn_at_once() -> None:
    ids = {random_id() for _ in range(2 * IDS_AT_ONCE + 1)}
    assert len(ids) == 2 * IDS_AT_ONCE + 1
    assert all(len(bytes.fromhex(each)) == ID_BYTES for each in ids)
