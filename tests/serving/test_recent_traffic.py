"""What a dashboard shows of recent prompts."""

from emberkv.engine.request import CacheUsage
from emberkv.serving.dashboard import (
    MINUTES,
    SHOWN_SESSIONS,
    SHOWN_TURNS,
    AnsweredTurn,
    RecentTraffic,
    tokens_by_source,
)
from emberkv.serving.request_context import RequestContext
from emberkv.serving.tenancy import DEFAULT_TENANT

NOW = 60.0 * 1_000_000


def request(session: str = "") -> RequestContext:
    return RequestContext("chatcmpl-1", "chat_completions", DEFAULT_TENANT, 0.0, session=session)


def turn(at: float = NOW, ttft: float | None = 0.5, **tokens: int) -> AnsweredTurn:
    return AnsweredTurn("chatcmpl-1", at, tokens, ttft)


def test_a_prompts_tokens_are_in_the_pool_in_a_tier_or_computed() -> None:
    usage = CacheUsage(100, 70, tokens_by_tier={"disk": 30, "ram": 0})
    assert tokens_by_source(usage) == {"pool": 40, "disk": 30, "computed": 30}
    assert tokens_by_source(CacheUsage(5, 0)) == {"computed": 5}


def test_rates_are_by_the_minute_and_end_with_the_current_one() -> None:
    traffic = RecentTraffic()
    traffic.count(request(), turn(NOW - 60, pool=120))
    traffic.count(request(), turn(NOW, pool=60, computed=30))
    traffic.count(request(), turn(NOW + 59, pool=60))
    history = traffic.history(NOW + 59)
    assert history["tokens"] == {"pool": [0.0] * 58 + [2.0, 2.0], "computed": [0.0] * 59 + [0.5]}
    assert history["points"] == MINUTES


def test_an_hour_is_kept_and_totals_are_since_the_start() -> None:
    traffic = RecentTraffic()
    for minute in range(3 * MINUTES):
        traffic.count(request(), turn(NOW + 60 * minute, pool=60))
    assert traffic.history(NOW + 60 * (3 * MINUTES - 1))["tokens"]["pool"] == [1.0] * MINUTES
    assert traffic.tokens == {"pool": 60 * 3 * MINUTES}


def test_quantiles_of_a_minute_and_of_the_last_ten() -> None:
    traffic = RecentTraffic()
    for tenths in range(11):
        traffic.count(request(), turn(NOW, ttft=tenths / 10, pool=1))
    traffic.count(request(), turn(NOW, ttft=None, pool=1))  # an answer without a token
    traffic.count(request(), turn(NOW - 11 * 60, ttft=90.0, pool=1))
    assert traffic.times(NOW) == {"p50": 0.5, "p90": 0.9}
    history = traffic.history(NOW)
    assert history["p50"][-1] == 0.5
    assert history["p90"][-12:-1] == [90.0, *[None] * 10]


def test_sessions_are_listed_from_the_latest_with_their_last_turns() -> None:
    traffic = RecentTraffic()
    for number in range(SHOWN_SESSIONS + 1):
        traffic.count(request(f"s{number}"), turn(pool=number))
    for number in range(SHOWN_TURNS + 1):
        traffic.count(request("s5"), turn(computed=number))
    listed = traffic.sessions()
    assert [each["session"] for each in listed] == ["s5", *(f"s{n}" for n in range(SHOWN_SESSIONS, 0, -1) if n != 5)]
    assert [each["tokens"]["computed"] for each in listed[0]["turns"]] == list(range(1, SHOWN_TURNS + 1))


def test_a_request_without_a_session_is_in_no_session() -> None:
    traffic = RecentTraffic()
    traffic.count(request(), turn(pool=1))
    assert traffic.sessions() == []
