"""What ``emberkv top`` makes of a server's metrics and lists."""

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from emberkv.cli.connection import ServerError
from emberkv.cli.main import app
from emberkv.cli.top import Interval, Scrape, read, view

NOBODY = "http://127.0.0.1:1"

METRICS = """\
# TYPE emberkv_build info
emberkv_build_info{{model="tiny"}} 1.0
# TYPE emberkv_requests_running gauge
emberkv_requests_running 3.0
# TYPE emberkv_requests_waiting gauge
emberkv_requests_waiting 2.0
# TYPE emberkv_prefix_cache_query_tokens counter
emberkv_prefix_cache_query_tokens_total {query}
# TYPE emberkv_tier_reused_tokens counter
emberkv_tier_reused_tokens_total{{tier="pool"}} {pool}
emberkv_tier_reused_tokens_total{{tier="disk"}} 100.0
# TYPE emberkv_pool_bytes gauge
emberkv_pool_bytes{{state="in_use"}} 1048576.0
emberkv_pool_bytes{{state="cached"}} 1048576.0
emberkv_pool_bytes{{state="empty"}} 2097152.0
# TYPE emberkv_time_to_first_token_seconds histogram
emberkv_time_to_first_token_seconds_bucket{{le="0.1"}} {fast}
emberkv_time_to_first_token_seconds_bucket{{le="2.5"}} {all}
emberkv_time_to_first_token_seconds_bucket{{le="+Inf"}} {all}
emberkv_time_to_first_token_seconds_count {all}
emberkv_time_to_first_token_seconds_sum 1.0
"""
WORKERS = """\
# TYPE emberkv_worker_status gauge
emberkv_worker_status{worker="a",status="up"} 1.0
emberkv_worker_status{worker="a",status="silent"} 0.0
emberkv_worker_status{worker="b",status="silent"} 1.0
# TYPE emberkv_worker_index_exact gauge
emberkv_worker_index_exact{worker="a"} 1.0
# TYPE emberkv_worker_silent_seconds gauge
emberkv_worker_silent_seconds{worker="b"} 7.25
# TYPE emberkv_worker_requests counter
emberkv_worker_requests_total{worker="a"} 1200.0
"""
SESSION = {"tenant": "", "session": "s\x1b[31m", "requests": 4, "prompt_tokens": 1000, "hit_tokens": 750}
PREFIX = {"begins": "You are a helpful\nassistant " * 9, "tokens": 4096, "hits": 12}


def reading(at: float, *, query: float, pool: float, fast: float, all: float, status: int = 200) -> Scrape:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(status, text=METRICS.format(query=query, pool=pool, fast=fast, all=all))
        if status != 200:
            return httpx.Response(status)
        return httpx.Response(200, json={"data": [SESSION if request.url.path.endswith("sessions") else PREFIX]})

    with httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer)) as client:
        return read(client, at)


def shown(interval: Interval) -> list[str]:
    console = Console(width=80, record=True, color_system=None, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(view(interval, "http://server"))
    return capture.get().splitlines()


BEFORE = reading(10.0, query=1000.0, pool=400.0, fast=10.0, all=10.0)
NOW = reading(12.0, query=3000.0, pool=1400.0, fast=11.0, all=20.0)


def test_the_load_is_in_the_first_line() -> None:
    assert shown(Interval(NOW))[0] == "tiny at http://server: 3 running, 2 waiting"


def test_rates_and_quantiles_are_of_the_time_between_two_readings() -> None:
    interval = Interval(NOW, BEFORE)
    assert interval.rate("emberkv_prefix_cache_query_tokens_total") == 1000.0
    assert interval.quantile("emberkv_time_to_first_token_seconds", 0.5) == 2.5  # 1 of 10 new ones was fast
    assert Interval(NOW).quantile("emberkv_time_to_first_token_seconds", 0.5) == 0.1  # 11 of all 20


def test_a_server_that_started_anew_counts_from_nothing() -> None:
    assert Interval(BEFORE, NOW).gained("emberkv_prefix_cache_query_tokens_total") == 1000.0


def test_where_tokens_came_from_now_and_since_the_start() -> None:
    rows = {line.split()[0]: line.split() for line in shown(Interval(NOW, BEFORE)) if line}
    assert rows["computed"] == ["computed", "50%", "█" * 10, "50%", "1,500"]
    assert rows["disk"] == ["disk", "0%", "3%", "100"]
    assert [line.split() for line in shown(Interval(NOW)) if line.startswith("pool")] == [
        ["pool", "47%", "█" * 9, "47%", "1,400"],
        ["pool", "2.0MiB", "4.0MiB", "█" * 10],
    ]


def test_it_fits_80_columns_and_prints_no_control_characters() -> None:
    lines = shown(Interval(NOW, BEFORE))
    assert max(len(line) for line in lines) <= 80
    assert not any("\x1b" in line for line in lines)
    assert next(line.split() for line in lines if "x1b" in line) == ["s\\x1b[31m", "-", "4", "1,000", "75%"]
    assert next(line for line in lines if "You are" in line).split()[-2:] == ["4,096", "12"]


def test_a_server_that_refuses_is_reported_with_what_to_give() -> None:
    with pytest.raises(ServerError, match="status 401; give --key"):
        reading(0.0, query=0, pool=0, fast=0, all=0, status=401)


def test_a_gateways_workers_are_listed() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=WORKERS) if request.url.path == "/metrics" else httpx.Response(404)

    with httpx.Client(base_url="http://gateway", transport=httpx.MockTransport(answer)) as client:
        lines = [line.split() for line in shown(Interval(read(client, 0.0)))]
    assert ["a", "up", "exact", "-", "0", "1,200", "-"] in lines
    assert ["b", "silent", "degraded", "7.2", "s", "ago", "0", "0", "-"] in lines


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [(["--url", NOBODY], {}), ([NOBODY], {}), ([], {"EMBERKV_URL": NOBODY}), ([NOBODY], {"EMBERKV_URL": "http://b:1"})],
)
def test_the_ways_to_name_the_server(arguments: list[str], variables: dict[str, str]) -> None:
    result = CliRunner().invoke(app, ["top", "--once", *arguments], env=variables)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: http://127.0.0.1:1 does not answer (")
    assert "or name another with --url or EMBERKV_URL" in result.stderr
