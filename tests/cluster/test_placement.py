"""What Ray Serve is asked for, and what its autoscaling policy answers it. Serve itself: tests/e2e/test_ray.py."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tests.waiting import DEADLINE


@pytest.fixture(scope="module")
def placement() -> ModuleType:
    """Imported by the process that runs these tests alone, as importing Ray takes two seconds."""
    import emberkv.cluster.placement

    return emberkv.cluster.placement


def context(name: str, replicas: int, **metrics: float) -> Any:
    by_replica = {key: {"replica": value} for key, value in metrics.items()}
    return SimpleNamespace(deployment_name=name, target_num_replicas=replicas, aggregated_metrics=by_replica)


def contexts(placement: ModuleType, *workers: Any, gateway: dict[str, float]) -> dict[str, Any]:
    all_of_them = [context(placement.GATEWAY, 1, **gateway), *workers]
    return {f"emberkv#{each.deployment_name}": each for each in all_of_them}


def decided(placement: ModuleType, *workers: Any, **gateway: float) -> dict[str, int]:
    changes: dict[str, int] = placement.ScalingPolicy()(contexts(placement, *workers, gateway=gateway))[0]
    return changes


def test_the_worker_whose_cache_is_worth_least_gets_no_replica(placement: ModuleType) -> None:
    workers = [context(f"worker-{n}", 1, backlog=0.0, worth=worth) for n, worth in enumerate((50.0, 3.0, 900.0))]
    assert decided(placement, *workers, workers=2.0, max_workers=2.0) == {
        "emberkv#gateway": 1, "emberkv#worker-0": 1, "emberkv#worker-1": 0, "emberkv#worker-2": 1,
    }  # fmt: skip


def test_workers_are_added_by_number_and_not_by_name(placement: ModuleType) -> None:
    running = [context("worker-0", 1, backlog=0.0, worth=0.0)]
    others = [context(f"worker-{n}", 0) for n in (10, 2)]
    assert decided(placement, *running, *others, workers=2.0, max_workers=2.0)["emberkv#worker-2"] == 1


def test_nothing_changes_before_the_gateway_has_reported_its_limits(placement: ModuleType) -> None:
    assert placement.ScalingPolicy()(contexts(placement, context("worker-0", 1), gateway={})) == ({}, {})


def test_limits_beyond_the_deployments_are_those(placement: ModuleType) -> None:
    workers = [context(f"worker-{n}", 0) for n in range(2)]
    assert sum(decided(placement, *workers, workers=9.0, max_workers=9.0).values()) == 3


def test_there_is_a_deployment_for_each_worker_that_there_may_be(placement: ModuleType) -> None:
    built = placement.app(placement.Placement(secret_file="/run/secret", workers=1, max_workers=3, gpus=0.5))
    gateway = built._bound_deployment
    assert gateway.name == placement.GATEWAY
    workers = [argument._bound_deployment for argument in gateway.init_args[1:]]
    assert [worker.name for worker in workers] == ["worker-0", "worker-1", "worker-2"]
    assert [worker._deployment_config.autoscaling_config.initial_replicas for worker in workers] == [1, 0, 0]
    assert {worker.ray_actor_options["num_gpus"] for worker in workers} == {0.5}


def test_the_configuration_file_names_the_arguments_that_differ_and_the_limits(placement: ModuleType) -> None:
    given = placement.Placement(model="m", secret_file="/run/secret", serve_options=("--ram-tier", "1GiB"))
    (application,) = placement.serve_config(given, name="c", workers=2, max_workers=4)["applications"]
    assert application["args"] == {"model": "m", "secret_file": "/run/secret", "serve_options": ["--ram-tier", "1GiB"]}
    assert application["deployments"] == [{"name": placement.GATEWAY, "user_config": {"workers": 2, "max_workers": 4}}]


def test_serve_accepts_the_configuration_file_and_the_one_in_the_documentation(placement: ModuleType) -> None:
    from ray.serve.schema import ServeDeploySchema

    written = placement.serve_config(
        placement.Placement(model="m", secret_file="/run/secret"), name="c", workers=2, max_workers=4
    )
    text = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    (shown,) = re.findall(r"```yaml\n(proxy_location: .*?)```", text, re.DOTALL)
    for config in (written, yaml.safe_load(shown)):
        (application,) = ServeDeploySchema.model_validate(config).applications
        assert application.import_path == "emberkv.cluster.placement:app"
        placement.Placement.model_validate(application.args)


def test_an_argument_that_is_none_is_refused(placement: ModuleType) -> None:
    with pytest.raises(ValidationError, match="replicas"):
        placement.Placement.model_validate({"secret_file": "/run/secret", "replicas": 2})


def test_a_server_that_does_not_start_is_reported_with_its_error_and_its_log(tmp_path: Path) -> None:
    log = tmp_path / "worker.err"
    script = f"""
import os, sys
os.dup2(os.open({str(log)!r}, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
from emberkv.cluster.placement import ServerProcess
from emberkv.errors import PlacementError
try:
    ServerProcess(["serve", "/no/such/model", "--port", "0"], "http://127.0.0.1:1").wait_for("/ready", {DEADLINE})
except PlacementError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "http://127.0.0.1:1 ended with exit code 2 before /ready was 200: no folder '/no/such/model' exists; "
    )
    assert done.stdout.endswith(f" (its log is {log})\n")
