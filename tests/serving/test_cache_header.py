"""The header: its grammar, both ways, and that every response has it, with the reason that is true."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.explaining.explanation import Divergence, Explanation, Miss, MissReason
from emberkv.engine.request import CacheUsage
from emberkv.errors import RequestError
from emberkv.serving.app import create_app
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.serving.request_context import CACHE_HEADER, CacheSummary, parse_summary, summary_of
from emberkv.serving.tenancy import DEFAULT_TENANT
from tests.core.lower import FakeTiers
from tests.serving.core_engine import CoreEngine
from tests.serving.fakes import ByteTokenizer, FakeEngine, Script
from tests.serving.harness import MODEL, Client, sse_comments

places = st.dictionaries(st.sampled_from(["pool", "ram", "disk", "tier-2"]), st.integers(1, 10**9), max_size=4)


@given(
    st.integers(0, 10**9), places, st.integers(0, 10**9), st.sampled_from(MissReason) | st.none(), st.integers(0, 10**9)
)
def test_what_is_written_is_read_back(
    hit: int, by_tier: dict[str, int], miss: int, why: MissReason | None, at: int
) -> None:
    summary = CacheSummary(hit, by_tier, miss, why, at if why else 0)
    assert parse_summary(str(summary)) == summary


@pytest.mark.parametrize(
    "header", ["", "hit=1", "hit=1;miss=2;why=boredom@3", "hit=1;miss=2;why=new", "hit=-1;miss=2", "hit=1;miss=2;x=3"]
)
def test_what_is_no_such_header(header: str) -> None:
    with pytest.raises(RequestError, match="x-emberkv-cache is"):
        parse_summary(header)


def test_the_reason_is_the_one_with_most_tokens_and_a_divergence_is_placed_at_its_token() -> None:
    misses = (Miss(MissReason.EVICTED, 16, 8), Miss(MissReason.DIVERGED, 24, 12), Miss(MissReason.PARTIAL, 36, 4))
    explanation = Explanation(40, {"pool": 16}, misses, Divergence(27, (), (1,), (2,), cached=True))
    assert str(summary_of(CacheUsage(40, 16), explanation)) == "hit=16;pool=16;miss=24;why=diverged@27"
    assert str(summary_of(CacheUsage(40, 24, tokens_by_tier={"disk": 8}), None)) == "hit=24;pool=16;disk=8;miss=16"
    assert str(summary_of(CacheUsage(40, 0), None)) == "hit=0;miss=40"


@pytest.fixture
def core() -> CoreEngine:
    return CoreEngine()


def client_of(core: CoreEngine) -> Client:
    lifecycle = Lifecycle()
    lifecycle.loaded(ServedModel((MODEL,), 0, core, ByteTokenizer(), cache=core.service))
    return Client(create_app(lifecycle, wall_clock=lambda: core.now))


def header(client: Client, path: str, text: str, **fields: Any) -> str:
    body = {"model": MODEL, "max_tokens": 2, **fields}
    body |= {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    response = client.post(path, body)
    assert response.status_code == 200, response.text
    assert (CACHE_HEADER in response.headers) is not fields.get("stream", False)
    return response.headers.get(CACHE_HEADER) or sse_comments(response)[CACHE_HEADER]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_every_response_has_it(core: CoreEngine, path: str, stream: bool) -> None:
    client = client_of(core)
    text = "abcdefghijklmnopqrstuvwxyz" * 2
    cold, warm = (parse_summary(header(client, path, text, stream=stream)) for _ in range(2))
    assert (cold.hit, cold.why, cold.at) == (0, MissReason.NEW, 0)
    assert warm.hit == warm.by_tier["pool"] >= 48
    assert warm.hit + warm.miss == cold.miss
    assert warm.why in (MissReason.PARTIAL, MissReason.ALIGNMENT)


def test_the_reason_is_the_one_at_the_time_of_the_request(core: CoreEngine) -> None:
    client = client_of(core)
    header(client, "/v1/completions", "0123456789abcdefghijklmnopqrstuvwxyz")
    summary = header(client, "/v1/completions", "0123456789abcdefgh!jklmnopqrstuvwxyz")
    assert summary == "hit=16;pool=16;miss=21;why=diverged@19"  # the prompt's first token begins the text


def test_tokens_of_a_lower_tier_are_told_apart() -> None:
    lower = FakeTiers()
    core = CoreEngine(lower=lower)
    client = client_of(core)
    tokens = ByteTokenizer().encode("0123456789abcdefghijklmnopqrstuvwxyz", add_special_tokens=True)
    chain = core.chain(tokens, DEFAULT_TENANT)
    lower.put(chain.block_hashes[:4], "disk")
    summary = header(client, "/v1/completions", "0123456789abcdefghijklmnopqrstuvwxyz")
    assert summary == "hit=16;disk=16;miss=21;why=new@16"


def test_without_books_the_tokens_are_told_all_the_same(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("Hello", cached=8)
    assert header(client, "/v1/chat/completions", "Hi") == "hit=8;pool=8;miss=11"


def test_a_failed_request_has_none(client: Client) -> None:
    assert CACHE_HEADER not in client.post("/v1/completions", {"model": MODEL}).headers
