"""What /metrics says, to the value."""

import itertools

import pytest
from prometheus_client.parser import text_string_to_metric_families

from emberkv.engine.request import EngineStats
from emberkv.serving.app import create_app
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.metrics import MemoryCollector
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, Client

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


def samples(client: Client) -> dict[str, float]:
    """All samples, by name and label values."""
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }


def test_the_bytes_of_weights_and_of_remembered_encodings() -> None:
    found = {family.name: family.samples[0].value for family in MemoryCollector(lambda: 700, lambda: 30).collect()}
    assert found == {"emberkv_weights_bytes": 700, "emberkv_tokenizer_cache_bytes": 30}


def test_the_engines_figures(client: Client, engine: FakeEngine) -> None:
    engine.engine_stats = EngineStats(
        running=3,
        waiting=2,
        total_blocks=100,
        free_blocks=60,
        block_bytes=512,
        cached_blocks=45,
        prefix_query_tokens=1000,
        prefix_hit_tokens=750,
        evictions=7,
        preemptions=4,
        prefill_tokens=250,
        decode_tokens=33,
        masks_ready=20,
        masks_waited=2,
        checkpoints={"left_speculatively": 5, "hits": 6},
    )
    expected = {
        "emberkv_requests_running": 3,
        "emberkv_requests_waiting": 2,
        "emberkv_pool_blocks in_use": 40,
        "emberkv_pool_blocks cached": 45,
        "emberkv_pool_blocks empty": 15,
        "emberkv_pool_bytes in_use": 40 * 512,
        "emberkv_prefix_cache_query_tokens_total": 1000,
        "emberkv_prefix_cache_hit_tokens_total": 750,
        "emberkv_evicted_blocks_total": 7,
        "emberkv_preemptions_total": 4,
        "emberkv_prefill_tokens_total": 250,
        "emberkv_decode_tokens_total": 33,
        "emberkv_constraint_masks_total ready": 20,
        "emberkv_constraint_masks_total waited_for": 2,
        "emberkv_checkpoints_total left_speculatively": 5,
        "emberkv_checkpoints_total hits": 6,
    }
    found = samples(client)
    assert {name: found[name] for name in expected} == expected


def test_times_are_from_arrival_by_the_clock_given(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    engine.script = Script("abcd", queue_seconds=0.25)
    ticks = itertools.count(100)
    client = Client(create_app(lifecycle, clock=lambda: float(next(ticks))))
    client.post("/v1/chat/completions", CHAT)
    found = samples(client)
    assert found["emberkv_time_to_first_token_seconds_sum"] == 2.0  # it is read at submission, too
    assert found["emberkv_time_to_first_token_seconds_count"] == 1.0
    assert found["emberkv_inter_token_seconds_sum"] == 3.0
    assert found["emberkv_inter_token_seconds_count"] == 3.0
    assert found["emberkv_queue_seconds_sum"] == 0.25
    assert found["emberkv_queue_seconds_count"] == 1.0


def test_tokens_of_one_step_share_their_gap(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    engine.script = Script("abcdef", tokens_per_step=3)
    ticks = itertools.count(100)
    client = Client(create_app(lifecycle, clock=lambda: float(next(ticks))))
    client.post("/v1/chat/completions", CHAT)
    found = samples(client)
    assert found["emberkv_inter_token_seconds_count"] == 3.0
    assert found["emberkv_inter_token_seconds_sum"] == pytest.approx(1.0)


def test_finished_answers_by_api_and_reason(client: Client) -> None:
    client.post("/v1/chat/completions", CHAT)
    client.post("/v1/chat/completions", {**CHAT, "n": 2, "max_tokens": 2})
    client.post("/v1/completions", {"model": MODEL, "prompt": "a", "stop": "l", "stream": True})
    client.post("/v1/messages", {**CHAT, "max_tokens": 1})
    found = samples(client)
    assert {name: value for name, value in found.items() if name.startswith("emberkv_requests_finished_total")} == {
        "emberkv_requests_finished_total chat_completions stop": 1,
        "emberkv_requests_finished_total chat_completions length": 2,
        "emberkv_requests_finished_total completions stop": 1,
        "emberkv_requests_finished_total messages length": 1,
    }


def test_before_the_model_is_loaded_there_are_no_engine_figures() -> None:
    found = samples(Client(create_app(Lifecycle())))
    assert "emberkv_requests_running" not in found
    assert found["emberkv_time_to_first_token_seconds_count"] == 0


def test_apps_do_not_share_metrics(lifecycle: Lifecycle, client: Client) -> None:
    client.post("/v1/chat/completions", CHAT)
    other = samples(Client(create_app(lifecycle)))
    assert other["emberkv_time_to_first_token_seconds_count"] == 0
