"""What ``emberkv cluster up`` can say of a cluster that starts. The command itself: tests/e2e/test_ray.py."""

from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from emberkv.cli.cluster import gateway_stages, serve_failure, serve_stages


def deployment(**states: int) -> Any:
    return SimpleNamespace(replica_states=states)


def failed(message: str, status: str = "DEPLOY_FAILED") -> Any:
    return SimpleNamespace(status=SimpleNamespace(value=status), message=message)


def gateway(ready: int, workers: httpx.Response | Exception) -> httpx.Client:
    """A gateway that answers ``/ready`` with a status, and ``/v1/cluster`` so."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/ready":
            return httpx.Response(ready)
        if isinstance(workers, Exception):
            raise workers
        return workers

    return httpx.Client(base_url="http://gateway", transport=httpx.MockTransport(answer))


def test_what_serve_does_with_each_server_that_it_starts() -> None:
    deployments = {
        "worker-1": deployment(),
        "worker-0": deployment(STOPPING=1, STARTING=1),
        "gateway": deployment(RUNNING=1),
    }
    stages = serve_stages(SimpleNamespace(deployments=deployments))
    assert list(stages.items()) == [("gateway", "running"), ("worker-0", "stopping and starting")]
    assert serve_stages(None) == {}


def test_what_the_gateway_knows_of_workers() -> None:
    workers = [
        {"worker_id": "worker-0", "status": "up", "detail": ""},
        {"worker_id": "worker-1", "status": "starting", "detail": "the model is being loaded"},
        {"worker_id": "", "status": "down", "detail": "it was never reached"},
    ]
    with gateway(200, httpx.Response(200, json={"workers": workers})) as asked:
        assert gateway_stages(asked) == ({"worker-0": "up", "worker-1": "starting: the model is being loaded"}, True)


def test_a_gateway_that_does_not_answer_or_tells_its_operator_alone() -> None:
    with gateway(503, httpx.ConnectError("refused")) as absent:
        assert gateway_stages(absent) == ({}, False)
    with gateway(200, httpx.Response(401, json={"error": {}})) as guarded:
        assert gateway_stages(guarded) == ({}, True)


@pytest.mark.parametrize("body", [b"<html>", b"\xff", b"[]", b'{"object": "x"}', b'{"workers": [{"worker_id": "w"}]}'])
def test_what_something_else_answers_at_the_gateways_address_is_no_answer(body: bytes) -> None:
    with gateway(200, httpx.Response(200, content=body)) as other:
        assert gateway_stages(other) == ({}, False)


def test_why_serve_has_given_up_is_the_servers_own_error() -> None:
    trace = "failed 3 times. Error:\nTraceback:\nemberkv.errors.PlacementError: http://h:1 ended: no folder '/m' exists"
    deployments = {"worker-0": failed(trace), "gateway": failed("", "HEALTHY")}
    application = SimpleNamespace(deployments=deployments, **vars(failed("Failed to update the deployments.")))
    assert serve_failure(application) == "worker-0: http://h:1 ended: no folder '/m' exists"
    application.deployments = {}
    assert serve_failure(application) == "Ray Serve says DEPLOY_FAILED: Failed to update the deployments."
