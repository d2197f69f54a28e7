"""Workers and gateways as processes, for tests of what becomes of requests to them."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.process import Server, serving
from tests.machine import free_ports
from tests.waiting import DEADLINE, eventually

SECRET = "the-secret-of-these-tests"
TEXT = "the lamps along the street are lit at six and go out at dawn. " * 10


class Cluster:
    """Workers by name, each on a port of its own, so that it can be started again, and a gateway that knows them: the
    one that was started last, where there are several.
    """

    def __init__(self, folder: Path, model: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self._environment = environment
        self._model = model
        self._stack = ExitStack()
        self.secret_file = folder / "secret"
        self.secret_file.write_text(SECRET)
        self.secret_file.chmod(0o600)
        self.ports: dict[str, int] = {}
        self.workers: dict[str, Server] = {}
        self.gateway: Server | None = None

    def start_worker(self, name: str, *more: str) -> Server:
        """more: options beside those that all have."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        port = self.ports.setdefault(name, free_ports())
        options = ("--served-name", "tiny", "--no-warmup", "--cache-ram", "24MiB", "--drain-seconds", "30")
        internal = ("--worker-id", name, "--cluster-secret-file", str(self.secret_file))
        given = (str(self._model), *options, *internal, *more)
        server = self._stack.enter_context(serving(folder, *given, port=port, environment=self._environment))
        self.workers[name] = server
        return server

    def start_gateway(self, *names: str, called: str = "gateway", **settings: str) -> Server:
        """names: of the workers that it is given. settings: its options by their names. A worker that a busy machine
        holds up for seconds is not given up, unless ``worker_timeout`` says so; test_sequence_cluster.py has gateways
        with the default.
        """
        settings = {"worker_timeout": "60", **settings}
        urls = [f"http://127.0.0.1:{self.ports.setdefault(name, free_ports())}" for name in names]
        options = [part for url in urls for part in ("--worker", url)]
        options += [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
        folder = self.folder / called
        folder.mkdir(exist_ok=True)
        secret = ("--cluster-secret-file", str(self.secret_file))
        port = self.ports.setdefault(called, free_ports())
        self.gateway = self._stack.enter_context(
            serving(folder, *options, *secret, command="gateway", port=port, environment=self._environment)
        )
        return self.gateway

    def status(self, name: str) -> Mapping[str, Any]:
        """What the gateway says of a worker."""
        assert self.gateway is not None
        listed = httpx.get(f"{self.gateway.url}/v1/cluster", timeout=DEADLINE).json()["workers"]
        url = f"http://127.0.0.1:{self.ports[name]}"
        return next((each for each in listed if each["url"] == url), {"status": "unknown"})

    def until(self, name: str, status: str) -> None:
        eventually(lambda: self.status(name)["status"] == status)

    def close(self) -> None:
        self._stack.close()


@contextmanager
def cluster_in(folder: Path, model: Path, environment: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """environment: variables of all processes."""
    it = Cluster(folder, model, environment or {})
    try:
        yield it
    finally:
        it.close()
