"""Sessions: grouped by tenant and id, and bounded."""

from emberkv.engine.request import CacheUsage
from emberkv.serving.request_context import RecentRequests, RequestContext, Sessions
from emberkv.serving.tenancy import Tenant


def asked(session: str, tenant: str = "ann") -> RequestContext:
    return RequestContext(f"{tenant}-{session}", "messages", Tenant(tenant, b""), 0.0, session)


def test_the_longest_silent_session_is_forgotten() -> None:
    sessions = Sessions(limit=2)
    for session in ("one", "two", "one", "three"):
        sessions.count(asked(session), [CacheUsage(10, 8), CacheUsage(5, 0)], now=1.0)
    assert [(each["session"], each["requests"], each["prompt_tokens"]) for each in sessions.listing()] == [
        ("three", 1, 15),
        ("one", 2, 30),
    ]


def test_tenants_may_choose_the_same_id() -> None:
    sessions = Sessions()
    for tenant in ("ann", "bob"):
        sessions.count(asked("one", tenant), [CacheUsage(10, 8)], now=1.0)
    assert [(each["tenant"], each["hit_tokens"]) for each in sessions.listing()] == [("bob", 8), ("ann", 8)]


def test_requests_without_a_session_are_not_counted() -> None:
    sessions = Sessions()
    sessions.count(asked(""), [CacheUsage(10, 8)], now=1.0)
    assert len(sessions) == 0


def test_only_the_last_requests_are_remembered() -> None:
    recent = RecentRequests(limit=1)
    recent.add(asked("one"))
    recent.add(asked("two"))
    assert recent.get("ann-one") is None
    assert recent.get("ann-two") == asked("two")
