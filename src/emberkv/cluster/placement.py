"""Workers and a gateway as replicas of Ray Serve: it places them, checks their health, and starts them again.

    serve run emberkv.yaml          what `emberkv cluster up` writes; import_path emberkv.cluster.placement:app

Each replica runs one emberkv server as a process beside it, and ends with it. Requests go from clients to the gateway
and from there to the workers over HTTP, never through Serve's handles. Each worker is a deployment of its own, of one
replica or none, so that the one whose cache is worth least can be given up (`ScalingPolicy`).
"""

import errno
import logging
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingContext

from emberkv.cluster import wire
from emberkv.cluster.scaling import RecentWorth, ScalingLimits, ScalingMemory, WorkerLoad, choose_workers
from emberkv.errors import PlacementError
from emberkv.files import read_own_file

_log = logging.getLogger(__name__)

GATEWAY = "gateway"
NODE_HOST = "node"
"""As ``host``: each server listens on its node's own address, as a cluster of several machines needs."""

UNMEASURED_PREFILL_RATE = 1000.0
"""Tokens a second, of a worker that has not computed a prompt yet."""

_HEALTH_SECONDS = 5.0
_REPORT_SECONDS = 1.0
_LOG_BYTES = 65_536
"""Read from the end of a log."""

_AUTOSCALING = {
    "upscale_delay_s": 0,  # the policy has delays of its own
    "downscale_delay_s": 0,
    "downscale_to_zero_delay_s": 0,
    "metrics_interval_s": _REPORT_SECONDS,
    "look_back_period_s": 2 * _REPORT_SECONDS,
}


class Placement(BaseModel):
    """The arguments of `app`, as they stand under ``args`` in Serve's configuration file.

    model: as ``emberkv serve`` takes it. workers: how many there are at first. max_workers: how many there may be.
    host: where all servers listen; "node" is each node's own address. port: the gateway's. secret_file: on every node,
    the file with the cluster's secret. cpus, gpus: of a worker, as Ray counts them. serve_options, gateway_options:
    more options of ``emberkv serve`` and ``emberkv gateway``, as they are typed. drain_seconds: how long the answers of
    a worker that is given up may still run. start_seconds: how long a server may take to be ready.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    secret_file: str
    workers: int = Field(default=2, ge=1)
    max_workers: int = Field(default=8, ge=1)
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=1, le=65535)
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    serve_options: tuple[str, ...] = ()
    gateway_options: tuple[str, ...] = ()
    drain_seconds: float = Field(default=30.0, ge=0)
    start_seconds: float = Field(default=600.0, gt=0)


class ServerProcess:
    """One emberkv server as a child process, which shuts down cleanly on `stop`, or when this process ends.

    arguments: of the ``emberkv`` command. url: where it will listen.
    """

    def __init__(self, arguments: Sequence[str], url: str) -> None:
        self.url = url
        self._process = subprocess.Popen(  # noqa: S603 - the arguments are the operator's own
            [sys.executable, "-m", "emberkv.cli.supervised", *arguments], stdin=subprocess.PIPE
        )

    def wait_for(self, route: str, seconds: float) -> None:
        """Wait until ``/health`` or ``/ready`` answers 200.

        Raises PlacementError where the server ends, or takes longer.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (code := self._process.poll()) is not None:
                raise PlacementError(f"{self.url} ended with exit code {code} before {route} was 200{_last_error()}")
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}{route}", timeout=_HEALTH_SECONDS).status_code == httpx.codes.OK:
                    return
            time.sleep(0.1)
        raise PlacementError(f"{self.url}{route} was not 200 after {seconds:g} s")

    def check(self) -> None:
        """Raises PlacementError unless the server runs and answers."""
        if (code := self._process.poll()) is not None:
            raise PlacementError(f"{self.url} ended with exit code {code}")
        try:
            status = httpx.get(f"{self.url}/health", timeout=_HEALTH_SECONDS).status_code
        except httpx.TransportError as error:
            raise PlacementError(f"{self.url} does not answer: {error}") from error
        if status != httpx.codes.OK:
            raise PlacementError(f"{self.url}/health answered {status}")

    def stop(self, seconds: float) -> None:
        """Have it drain and end; after so many seconds it is killed."""
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            _log.warning("%s did not end within %g s; it is killed", self.url, seconds)
            self._process.kill()
            self._process.wait()


class WorkerReplica:
    """One worker of the cluster, as Serve runs it."""

    def __init__(self, worker_id: str, placement: Placement) -> None:
        secret = Path(placement.secret_file)
        self._headers = {"authorization": f"Bearer {read_own_file(secret).decode().strip()}"}
        self._worth = RecentWorth()
        self._stop_seconds = placement.drain_seconds + _HEALTH_SECONDS
        host = _host(placement)
        port = free_port(host)
        arguments = ["serve", *([placement.model] if placement.model else []), *placement.serve_options]
        arguments += ["--host", host, "--port", str(port), "--drain-seconds", f"{placement.drain_seconds:g}"]
        arguments += ["--worker-id", worker_id, "--cluster-secret-file", str(secret)]
        arguments += ["--gateway", _url(_gateway_host(placement), placement.port)]
        self._server = ServerProcess(arguments, _url(host, port))
        self._server.wait_for("/ready", placement.start_seconds)

    def check_health(self) -> None:
        """Serve replaces the replica where this raises."""
        self._server.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `ScalingPolicy` decides by."""
        response = httpx.get(f"{self._server.url}{wire.PREFIX}/load", headers=self._headers, timeout=_HEALTH_SECONDS)
        report = wire.decode(response.raise_for_status().content, wire.LoadReport)
        tokens = report.waiting_tokens + report.prefill_tokens
        return {
            "backlog": tokens / (report.prefill_rate or UNMEASURED_PREFILL_RATE),
            "worth": self._worth.update(report.hit_tokens, time.monotonic()),
        }

    def __del__(self) -> None:
        """Serve calls this, and waits for it, when it stops the replica."""
        if hasattr(self, "_server"):
            self._server.stop(self._stop_seconds)


class GatewayReplica:
    """The cluster's gateway, as Serve runs it. Its user config holds the limits that `emberkv cluster scale` sets."""

    def __init__(self, placement: Placement, *_workers: object) -> None:
        host = _host(placement)
        self._limits: dict[str, float] = {}
        self._stop_seconds = placement.drain_seconds + _HEALTH_SECONDS
        arguments = ["gateway", "--host", host, "--port", str(placement.port), *placement.gateway_options]
        arguments += ["--cluster-secret-file", placement.secret_file]
        self._server = ServerProcess(arguments, _url(host, placement.port))
        self._server.wait_for("/health", placement.start_seconds)

    def reconfigure(self, limits: Mapping[str, float]) -> None:
        """limits: workers and max_workers (`ScalingLimits`)."""
        checked = ScalingLimits(int(limits["workers"]), int(limits["max_workers"]))
        self._limits = {"workers": float(checked.workers), "max_workers": float(checked.max_workers)}

    def check_health(self) -> None:
        """Serve replaces the replica where this raises."""
        self._server.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The limits, which reach `ScalingPolicy` this way."""
        return self._limits

    def __del__(self) -> None:
        """Serve calls this, and waits for it, when it stops the replica."""
        if hasattr(self, "_server"):
            self._server.stop(self._stop_seconds)


class ScalingPolicy:
    """The application's autoscaling policy: Serve calls it every moment with what all replicas report."""

    def __init__(self) -> None:
        self._memory = ScalingMemory()

    def __call__(self, contexts: Mapping[Any, AutoscalingContext]) -> tuple[dict[Any, int], dict[Any, Any]]:
        """How many replicas each deployment should have: one or none. Nothing changes before the gateway reports."""
        reports = {context.deployment_name: _reported(context) for context in contexts.values()}
        gateway = reports[GATEWAY]
        if "workers" not in gateway:
            return {}, {}
        names = sorted((name for name in reports if name != GATEWAY), key=_number)
        running = {
            context.deployment_name: _load(reports[context.deployment_name])
            for context in contexts.values()
            if context.deployment_name != GATEWAY and context.target_num_replicas
        }
        most = min(int(gateway["max_workers"]), len(names))
        limits = ScalingLimits(min(int(gateway["workers"]), most), most)
        chosen = choose_workers(names, running, limits, self._memory, time.monotonic()) | {GATEWAY}
        return {key: int(context.deployment_name in chosen) for key, context in contexts.items()}, {}


def app(placement: Placement) -> serve.Application:
    """The Serve application: ``max_workers`` deployments, of which ``workers`` run at first, and the gateway."""
    workers = [
        _deployment(
            WorkerReplica,
            worker_name(number),
            placement,
            actor={"num_cpus": placement.cpus, "num_gpus": placement.gpus},
            replicas={"min_replicas": 0, "max_replicas": 1, "initial_replicas": int(number < placement.workers)},
        ).bind(worker_name(number), placement)
        for number in range(max(placement.workers, placement.max_workers))
    ]
    return _deployment(
        GatewayReplica,
        GATEWAY,
        placement,
        actor={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
        replicas={"min_replicas": 1, "max_replicas": 1},
    ).bind(placement, *workers)


def _deployment(
    replica: type, name: str, placement: Placement, *, actor: dict[str, Any], replicas: dict[str, int]
) -> serve.Deployment:
    decorated: serve.Deployment = serve.deployment(
        name=name,
        ray_actor_options=actor,
        autoscaling_config={**_AUTOSCALING, **replicas},
        health_check_period_s=2,
        health_check_timeout_s=2 * _HEALTH_SECONDS,
        graceful_shutdown_timeout_s=placement.drain_seconds + 4 * _HEALTH_SECONDS,
    )(replica)
    return decorated


def serve_config(placement: Placement, *, name: str, workers: int, max_workers: int) -> dict[str, Any]:
    """Serve's configuration of a cluster, to be written as YAML. Deployed again, only the limits may differ: Serve
    starts all replicas anew for other arguments.
    """
    return {
        "proxy_location": "Disabled",
        "applications": [
            {
                "name": name,
                "route_prefix": None,
                "import_path": "emberkv.cluster.placement:app",
                "args": placement.model_dump(mode="json", exclude_defaults=True),
                "deployments": [{"name": GATEWAY, "user_config": {"workers": workers, "max_workers": max_workers}}],
                "autoscaling_policy": {"policy_function": "emberkv.cluster.placement:ScalingPolicy"},
            }
        ],
    }


def _last_error() -> str:
    """The last error that a server has printed to its log, which is this process's, and where the log is; "" where that
    is no file.
    """
    log = Path("/proc/self/fd/2").resolve()
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    error = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")
    return f": {error} (its log is {log})" if error else f"; its log is {log}"


def worker_name(number: int) -> str:
    """Of a deployment and the worker that it runs."""
    return f"worker-{number}"


def free_port(host: str) -> int:
    """A port of ``host`` on which nothing listens, below those that Linux gives to outgoing connections: one of these
    could be taken before the worker listens.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port


def _host(placement: Placement) -> str:
    own_address: Callable[[], str] = ray.util.get_node_ip_address
    return own_address() if placement.host == NODE_HOST else placement.host


def _gateway_host(placement: Placement) -> str:
    """The gateway runs on Ray's head node."""
    if placement.host != NODE_HOST:
        return placement.host
    address = ray.get_runtime_context().gcs_address
    return str(address.rpartition(":")[0])


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])


def _reported(context: AutoscalingContext) -> dict[str, float]:
    """The latest of each metric that the deployment's one replica reports."""
    metrics = context.aggregated_metrics or {}
    return {name: max(by_replica.values()) for name, by_replica in metrics.items() if by_replica}


def _load(report: Mapping[str, float]) -> WorkerLoad | None:
    return WorkerLoad(report["backlog"], report["worth"]) if {"backlog", "worth"} <= report.keys() else None
