"""Set-ups as files say them: what is read, and what is said of what cannot be."""

from pathlib import Path

import pytest

from emberkv.errors import ConfigError, EmberError, WorkloadError
from emberkv.sim.build import machine_of
from emberkv.sim.config import SimulationConfig, load_set_up, open_set_up, required, with_changes
from emberkv.workload.request import Request
from emberkv.workload.source import ClosedLoopTraceSource, Source
from tests.sim.build import config
from tests.workload.build import jsonl, mooncake_line

WORKLOAD = """
workload:
  seed: 1
  sessions: 3
  arrivals: {kind: constant, rate: 1}
  clients: [{name: chat, weight: 1, message: 20, output: 10, turns: 2, think_time: 4}]
"""


def file(folder: Path, text: str) -> Path:
    path = folder / "set-up.yaml"
    path.write_text(text)
    return path


def drain(source: Source) -> list[Request]:
    requests = []
    while (request := source.next_arrival()) is not None:
        requests.append(request)
    return requests


def test_a_file_can_say_all_of_it(tmp_path: Path) -> None:
    set_up = load_set_up(
        file(
            tmp_path,
            f"""{WORKLOAD}
simulation:
  model: qwen2.5-7b
  hardware: l40s
  replicas: 2
  routing: bounded-hashing
  eviction: s3fifo
  tiers: [{{name: ram, capacity: 64GiB}}, {{name: remote, capacity: 1TiB, shared: true}}]
  outages: [{{replica: 1, at: 5.0, down_for: 2.5}}]
  random_outages: {{mean_time_up: 3600.0, mean_time_down: 60.0}}
  slo: {{ttft_ms: 500.0}}
  warm_up: 60.0
""",
        )
    )
    simulation = set_up.simulation
    assert set_up.workload is not None
    assert (simulation.model, simulation.replicas, simulation.routing) == ("qwen2.5-7b", 2, "bounded-hashing")
    assert [tier.capacity for tier in simulation.tiers] == [64 * 2**30, 2**40]
    assert simulation.slo.ttft_ms == 500.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("simulation: {kv_blox: 3}", "simulation: .*unknown: kv_blox; accepted: model, hardware"),
        ("simulations: {}", "unknown: simulations; accepted: workload, trace, simulation"),
        ("simulation: {routing: nearest}", "simulation.routing 'nearest': .*'nearest' is unknown; accepted: random"),
        ("simulation: {eviction: mru}", "simulation.eviction 'mru': .*'mru' is unknown; accepted: lru"),
        ("simulation: {replicas: 0}", "simulation.replicas 0: use at least 1"),
        ("simulation: {replicas: '2'}", "simulation.replicas '2': use a whole number"),
        ("simulation: {outages: [{replica: 1, at: 1.0}]}", "an outage of replica 1; there are 0 to 0"),
        ("simulation: {tiers: [{name: a, capacity: 1}, {name: a, capacity: 1}]}", "each needs a name of its own"),
        ("simulation: {tiers: [{name: a, capacity: many}]}", "capacity 'many': use a size such as 4GiB"),
        ("simulation: {rates: {per_prefill_token: 1.0, per_decode_token: 1.0}}", "with rates, kv_blocks must be given"),
        ("simulation: {cache_only: true, tiers: [{name: a, capacity: 1}]}", "cache_only knows no time"),
        ("trace: {path: t.jsonl, formt: azure}", "trace: .*unknown: formt; accepted: path, format"),
        ("trace: {path: t.jsonl, rate: -1.0}", "trace.rate -1.0: use at least 1e-09"),
        (f"{WORKLOAD}\ntrace: {{path: t.jsonl}}", "has both workload and trace"),
        ("- 1", "expected a mapping"),
        ("{", "is not YAML"),
    ],
)
def test_what_cannot_be_is_told_by_its_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"set-up\.yaml.*{said}"):
        load_set_up(file(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"gone\.yaml cannot be read"):
        load_set_up(tmp_path / "gone.yaml")
    with pytest.raises(WorkloadError, match="has neither workload nor trace"):
        required(open_set_up(file(tmp_path, "simulation: {}"))[1], tmp_path)


def test_options_go_before_and_those_not_given_do_not_count() -> None:
    changed = with_changes(SimulationConfig(replicas=3, seed=5), {"replicas": 4, "seed": None})
    assert (changed.replicas, changed.seed) == (4, 5)
    with pytest.raises(ConfigError, match="kv_blocks"):
        with_changes(SimulationConfig(), {"kv_blocks": -1})


def test_a_trace_is_clipped_and_sped_up(tmp_path: Path) -> None:
    jsonl(tmp_path / "t.jsonl", *(mooncake_line(1000 * at, 600, [at, at + 1]) for at in range(5)))
    path = file(tmp_path, "trace: {path: t.jsonl, start: 1.0, stop: 4.0, rate: 2.0}")
    workload = required(open_set_up(path)[1], path)
    assert [each.arrival_time for each in drain(workload.source())] == [0.0, 0.5, 1.0]
    assert workload.block_size() == 512


def test_block_sizes_are_the_workload_s_own(tmp_path: Path) -> None:
    line = {**mooncake_line(0, 40, [1, 2]), "block_size": 32}
    trace = jsonl(tmp_path / "t.jsonl", line)
    csv = tmp_path / "t.csv"
    csv.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.0,374,44\n")
    sizes = [required(open_set_up(path)[1], path).block_size() for path in (trace, csv, file(tmp_path, WORKLOAD))]
    assert sizes == [32, 16, 16]


def test_a_closed_loop_waits(tmp_path: Path) -> None:
    jsonl(tmp_path / "t.jsonl", mooncake_line(0, 600, [0, 1]))
    path = file(tmp_path, "trace: {path: t.jsonl, closed_loop: true}")
    assert isinstance(required(open_set_up(path)[1], path).source(), ClosedLoopTraceSource)


def test_a_seed_changes_what_is_generated(tmp_path: Path) -> None:
    path = file(tmp_path, WORKLOAD.replace("message: 20", "message: {kind: exponential, mean: 90}"))
    workload = required(open_set_up(path)[1], path)
    lengths = [[each.prompt_tokens for each in drain(which.source())] for which in (workload, workload.with_seed(2))]
    assert lengths[0] != lengths[1]
    assert lengths[0] == [each.prompt_tokens for each in drain(workload.with_seed(1).source())]


def test_memory_decides_the_blocks() -> None:
    machines = [machine_of(with_changes(SimulationConfig(), {"memory": memory}), 16) for memory in (None, 40 * 2**30)]
    assert machines[0].num_blocks > machines[1].num_blocks > 1000
    assert machine_of(config(kv_blocks=7), 10).num_blocks == 7
    with pytest.raises(ConfigError, match="does not fit"):
        machine_of(with_changes(SimulationConfig(), {"memory": 2**30}), 16)


@pytest.mark.parametrize("changes", [{"model": "nobody/knows"}, {"hardware": "abacus"}, {"weights": "int3"}])
def test_what_nobody_knows_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(EmberError):
        machine_of(with_changes(SimulationConfig(), changes), 16)
