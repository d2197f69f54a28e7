"""``emberkv cluster``: workers and a gateway on Ray Serve, started, seen, scaled and stopped by one command each."""

import fcntl
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import typer
import yaml
from rich.console import Console
from rich.table import Table

from emberkv.cli.command import App
from emberkv.defaults import state_folder
from emberkv.errors import ConfigError, PlacementError
from emberkv.files import read_own_file, replace_file
from emberkv.serving.server import bind_socket

if TYPE_CHECKING:
    from emberkv.cluster.placement import Placement

app = App(name="cluster", help="Run workers and a gateway on Ray Serve.")

DEFAULT_NAME = "emberkv"
RAY_SECONDS = 120.0
"""How long a Ray on this machine may take to start or to stop."""

Name = Annotated[str, typer.Option("--name", help="Of the cluster, where a machine has several.")]


@app.callback()
def cluster() -> None:
    """Run workers and a gateway on Ray Serve, which places them, checks their health and starts them again.

    Needs the extra "cluster": pip install '.[cluster,torch]' in emberkv's folder.
    """


Model = Annotated[str | None, typer.Argument(help="A folder or a Hugging Face name, as for serve.")]
ServeOptions = Annotated[list[str] | None, typer.Argument(help="Options of serve, after --.")]
Workers = Annotated[int, typer.Option(min=1, help="How many workers there are at least.")]
MaxWorkers = Annotated[
    int | None, typer.Option(min=1, help="How many there may be under load; --workers if not given.")
]
Port = Annotated[int, typer.Option(min=1, max=65535, help="The gateway's.")]
Host = Annotated[str, typer.Option(help='Where all servers listen; "node" is each node\'s own address.')]
Address = Annotated[str | None, typer.Option(help="Of a Ray that runs; without it, one is started here.")]
SecretFile = Annotated[
    Path | None, typer.Option(help="With the cluster's secret, on every node; without it, one is made here.")
]
Cpus = Annotated[float, typer.Option(min=0, help="Of a worker, as Ray counts them.")]
Gpus = Annotated[float, typer.Option(min=0, help="Of a worker, as Ray counts them.")]


@app.command("up")
def up(
    model: Model = None,
    serve_options: ServeOptions = None,
    workers: Workers = 2,
    max_workers: MaxWorkers = None,
    port: Port = 8080,
    host: Host = "127.0.0.1",
    address: Address = None,
    secret_file: SecretFile = None,
    cpus: Cpus = 1.0,
    gpus: Gpus = 0.0,
    name: Name = DEFAULT_NAME,
) -> None:
    """Start a cluster, and wait until it takes requests.

    The local Ray needs seconds to start and about 1 GB of memory.
    """
    folder = _folder(name)
    _check_addresses(host, address, secret_file)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _is_running(folder):
        raise PlacementError(
            f"cluster {name!r} runs already; stop it by 'emberkv cluster down', or give another --name"
        )
    if address is None and host != "node":
        bind_socket(host, port).close()  # what listens there would be taken for the gateway
    most = max(workers, max_workers or workers)
    placement = _placement().Placement(
        model=model,
        secret_file=str(secret_file.resolve() if secret_file is not None else _own_secret(folder)),
        workers=workers,
        max_workers=max(most, SCALABLE_WORKERS),
        host=host,
        port=port,
        cpus=cpus,
        gpus=gpus,
        serve_options=tuple(serve_options or ()),
    )
    if address is None:
        _show(f"starting Ray; its log is {folder / 'ray.log'}")
        address = _start_ray(folder, cpus=max(os.cpu_count() or 1, placement.max_workers * cpus))
    state = ClusterState(name, address, workers, most, placement.model_dump(mode="json"))
    state.write(folder)
    _show(f"handing the gateway and the workers to Ray Serve at {address}")
    _deploy(state, placement, folder)
    _wait_ready(state, placement.start_seconds)
    typer.echo(f"{state.url} takes requests; emberkv cluster status shows its workers.")


def _check_addresses(host: str, address: str | None, secret_file: Path | None) -> None:
    """Raises EmberError for a secret that others can read, and for addresses by which nodes could not be reached."""
    if secret_file is not None:
        read_own_file(secret_file)  # better refused here than by every worker
    if host in ("0.0.0.0", "::"):  # noqa: S104 - it is refused, not listened on
        raise ConfigError(f"--host {host}: the gateway could not name its workers; use 'node', or an address")
    if host == "node" and address == "auto":
        raise ConfigError("--address auto: with --host node, give the address itself, such as 10.0.0.1:6379")


@app.command("status")
def status(name: Name = DEFAULT_NAME) -> None:
    """Show what Serve knows of the replicas, and the gateway of the workers."""
    state = ClusterState.read(_folder(name), name)
    with _connected(state) as serve:
        application = serve.status().applications.get(name)
    if application is None:
        raise PlacementError(f"Ray Serve at {state.address} has no application {name!r}; emberkv cluster down ends it")
    table = Table(box=None, header_style="bold")
    for column in ("replica", "Serve", "replicas"):
        table.add_column(column)
    for deployment, found in sorted(application.deployments.items()):
        if not found.replica_states and found.status.value == "HEALTHY":
            continue  # a worker that there might be
        replicas = ", ".join(f"{count} {kind.lower()}" for kind, count in found.replica_states.items()) or "none"
        table.add_row(deployment, found.status.value.lower(), replicas)
    console = Console()
    console.print(f"{name}: gateway {state.url}, Ray {state.address}, {state.workers} to {state.max_workers} workers")
    console.print(table)


@app.command("scale")
def scale(
    workers: Annotated[int, typer.Argument(min=1, help="How many workers there are at least.")],
    max_workers: Annotated[int | None, typer.Option(min=1, help="How many there may be under load.")] = None,
    name: Name = DEFAULT_NAME,
) -> None:
    """Change how many workers there are. Of too many, those whose caches are worth least drain and end."""
    folder = _folder(name)
    state = ClusterState.read(folder, name)
    placement = _placement().Placement.model_validate(state.placement)
    if max(workers, max_workers or 0) > placement.max_workers:
        raise ConfigError(
            f"{max(workers, max_workers or 0)} workers; this cluster was started for at most {placement.max_workers}: "
            "stop it, and start it with more --max-workers"
        )
    state = ClusterState(name, state.address, workers, max(workers, max_workers or workers), state.placement)
    _deploy(state, placement, folder)
    state.write(folder)
    typer.echo(f"{workers} to {state.max_workers} workers from now on; emberkv cluster status shows when they are.")


@app.command("down")
def down(name: Name = DEFAULT_NAME) -> None:
    """Stop a cluster: its workers drain first. A Ray that it has started ends too."""
    folder = _folder(name)
    is_own_ray = (folder / "lock").exists()
    try:
        state = ClusterState.read(folder, name)
        with _connected(state) as serve:
            if name in serve.status().applications:
                serve.delete(name)
    except PlacementError:
        if not is_own_ray:  # else Ray ends below, and with it all that it runs
            raise
    _stop_ray(folder)
    (folder / "cluster.json").unlink(missing_ok=True)
    typer.echo(f"cluster {name!r} is stopped.")


@app.command("hold-ray", hidden=True)
def hold_ray(folder: Path, cpus: float) -> None:
    """Run a Ray on this machine until SIGTERM; ``address`` in the folder says where."""
    import ray  # noqa: PLC0415 - an extra

    lock = (folder / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.write(str(os.getpid()))
    lock.flush()
    ray.init("local", num_cpus=ceil(cpus), include_dashboard=False, log_to_driver=False)
    replace_file(folder / "address", ray.get_runtime_context().gcs_address.encode())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        signal.pause()


SCALABLE_WORKERS = 16
"""`scale` may ask for as many without a new start, or for the most that were given to `up`."""


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What the commands remember of a cluster, in its folder. placement: the arguments of Serve's application."""

    name: str
    address: str
    workers: int
    max_workers: int
    placement: dict[str, Any]

    @property
    def url(self) -> str:
        """Where the gateway listens."""
        host = self.placement["host"]
        shown = self.address.rpartition(":")[0] if host == "node" else host
        return (
            f"http://[{shown}]:{self.placement['port']}" if ":" in shown else f"http://{shown}:{self.placement['port']}"
        )

    def write(self, folder: Path) -> None:
        replace_file(folder / "cluster.json", json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def read(cls, folder: Path, name: str) -> "ClusterState":
        """Raises PlacementError where there is none."""
        try:
            return cls(**json.loads((folder / "cluster.json").read_bytes()))
        except FileNotFoundError as error:
            raise PlacementError(f"no cluster {name!r} was started here; start one by emberkv cluster up") from error


def _placement() -> Any:
    """The module that needs Ray, which takes a second to import. Raises PlacementError where it is not installed."""
    os.environ.update(_ray_environment())  # Ray reads it when it is imported
    try:
        from emberkv.cluster import placement  # noqa: PLC0415 - Ray is an extra
    except ModuleNotFoundError as error:
        raise PlacementError(f"{error.name} is not installed; pip install '.[cluster]' in emberkv's folder") from error
    return placement


def _folder(name: str) -> Path:
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"--name is {name!r}; use letters, digits, - and _")
    return state_folder() / "clusters" / name


def _own_secret(folder: Path) -> Path:
    path = folder / "secret"
    if not path.exists():
        replace_file(path, secrets.token_urlsafe(32).encode())
    return path


def _is_running(folder: Path) -> bool:
    """Whether a Ray that was started here still runs, or a cluster on another one has not been stopped."""
    return _ray_pid(folder) is not None or (not (folder / "lock").exists() and (folder / "cluster.json").exists())


def _ray_pid(folder: Path) -> int | None:
    """Of the process that holds the Ray that was started here; None where there is none."""
    with suppress(FileNotFoundError), (folder / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(lock.read())
    return None


def _start_ray(folder: Path, cpus: float) -> str:
    """Have a process of its own hold a Ray; its address."""
    (folder / "address").unlink(missing_ok=True)
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - the folder is this command's own
            [sys.executable, "-m", "emberkv.cli.main", "cluster", "hold-ray", str(folder), str(cpus)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            env={name: value for name, value in _ray_environment().items() if name != "RAY_ADDRESS"},
        )  # fmt: skip
    end = time.monotonic() + RAY_SECONDS
    try:
        while not (folder / "address").exists():
            if process.poll() is not None or time.monotonic() > end:
                raise PlacementError(f"Ray did not start; {folder / 'ray.log'} says why")
            time.sleep(0.1)
    except BaseException:
        process.terminate()
        process.wait(RAY_SECONDS)
        raise
    return (folder / "address").read_text()


def _stop_ray(folder: Path) -> None:
    if (pid := _ray_pid(folder)) is None:
        (folder / "lock").unlink(missing_ok=True)  # of a Ray that has ended by itself
        return
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + RAY_SECONDS
    while _ray_pid(folder) is not None:
        if time.monotonic() > end:
            raise PlacementError(f"Ray, process {pid}, did not stop within {RAY_SECONDS:g} s")
        time.sleep(0.1)
    (folder / "lock").unlink(missing_ok=True)


def _ray_environment() -> dict[str, str]:
    """Ray's processes and clients authenticate by a token in the user's home, unless the user says otherwise."""
    return {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", **os.environ}


def _deploy(state: ClusterState, placement: "Placement", folder: Path) -> None:
    """Give Serve the application, or what has changed of it."""
    config = _placement().serve_config(placement, name=state.name, workers=state.workers, max_workers=state.max_workers)
    path = folder / "serve.yaml"
    replace_file(path, yaml.safe_dump(config, sort_keys=False).encode())
    done = subprocess.run(  # noqa: S603 - the path is this command's own
        [sys.executable, "-m", "ray.serve.scripts", "run", "--non-blocking", str(path)],
        env={**_ray_environment(), "RAY_ADDRESS": state.address}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise PlacementError(f"Ray Serve took no application: {_last_line(done.stderr or done.stdout)}")


def _wait_ready(state: ClusterState, seconds: float) -> None:
    """Show each server's stages until the gateway takes requests. Raises PlacementError where Serve gives up, or the
    gateway has no worker in time.
    """
    end = time.monotonic() + seconds
    shown: dict[str, str] = {}
    with _connected(state) as serve, httpx.Client(base_url=state.url) as gateway:
        while time.monotonic() < end:
            stages, is_ready = gateway_stages(gateway)
            found = serve.status().applications.get(state.name)
            if found is not None and found.status.value in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise PlacementError(f"{serve_failure(found)}; emberkv cluster down ends what runs")
            for server, stage in (serve_stages(found) | stages).items():
                if shown.get(server) != stage:
                    shown[server] = stage
                    _show(f"{server}: {stage}")
            if is_ready:
                return
            time.sleep(0.5)
    raise PlacementError(f"{state.url} was not ready after {seconds:g} s; emberkv cluster status says what runs")


def serve_stages(application: Any) -> dict[str, str]:
    """What Ray Serve does with each server that it starts, by its name. application: Serve's status; None: none yet."""
    deployments = {} if application is None else application.deployments
    return {
        name: " and ".join(kind.lower() for kind in found.replica_states)
        for name, found in sorted(deployments.items())
        if found.replica_states
    }


def serve_failure(application: Any) -> str:
    """Why Ray Serve has given up. application: Serve's status."""
    reasons = [
        f"{name}: {_last_line(found.message).rpartition('PlacementError: ')[2]}"
        for name, found in sorted(application.deployments.items())
        if found.status.value != "HEALTHY" and found.message
    ]
    return "; ".join(reasons) or f"Ray Serve says {application.status.value}: {_last_line(application.message)}"


def gateway_stages(gateway: httpx.Client) -> tuple[dict[str, str], bool]:
    """What the gateway knows of each worker, by its id, and whether it takes requests. Nothing of workers where it does
    not answer yet, or answers its operator alone. What another program answers at its address counts as no answer.
    """
    try:
        is_ready = gateway.get("/ready").status_code == httpx.codes.OK
        listed = gateway.get("/v1/cluster")
        workers = listed.json()["workers"] if listed.status_code == httpx.codes.OK else ()
        return {
            each["worker_id"]: f"{each['status']}: {each['detail']}" if each["detail"] else each["status"]
            for each in workers
            if each["worker_id"]
        }, is_ready
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return {}, False


def _show(line: str) -> None:
    typer.echo(line, err=True)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


@contextmanager
def _connected(state: ClusterState) -> Iterator[Any]:
    """Ray Serve's client, connected to the cluster's Ray. Raises PlacementError where that does not answer."""
    _placement()
    import ray  # noqa: PLC0415 - an extra, which reads the environment when it is imported
    from ray import serve  # noqa: PLC0415

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it writes each call of it to stderr
    try:
        ray.init(address=state.address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise PlacementError(f"Ray at {state.address} does not answer; the cluster may still run there") from error
    try:
        yield serve
    finally:
        ray.shutdown()
