"""``emberkv serve`` in a process of its own, and questions about how it is.

Importing torch and transformers takes most of a server's start. So these are forked off a process that has imported
them, as are other commands, except where a test wants the command itself.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Protocol

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.machine import MACHINE_CACHE
from tests.waiting import DEADLINE

START_DEADLINE = 2 * DEADLINE
"""Seconds for a process that may have to import torch and to load a model first."""
METRICS_KEY = "metrics-key"
EMBERKV = [sys.executable, "-m", "emberkv.cli.main"]


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of ours; one thread computes, so that others can work. The metrics
    have a key, so that they can be read whether API keys are set or not.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EMBERKV_")}
    ours = {"COLUMNS": "250", "OMP_NUM_THREADS": "1", "EMBERKV_MACHINE_CACHE": str(MACHINE_CACHE)}
    ours["EMBERKV_METRICS_KEY"] = METRICS_KEY
    return inherited | ours


class Process(Protocol):
    """What tests use of `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Forked:
    """``emberkv`` in a process that begins with all modules imported. command: ``serve``, ``gateway`` or another one.
    log: takes what it prints. environment: variables of its own.
    """

    def __init__(
        self, command: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.e2e.forked"])
        inherited = dict(os.environ)
        os.environ.update(clean_environment())  # read by what is imported
        try:
            ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(inherited)
        from tests.e2e.forked import run  # imports torch

        given = ([command, *arguments], clean_environment() | (environment or {}), os.getcwd(), str(log))
        self._command = command
        self._process = context.Process(target=run, args=given, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"emberkv {self._command}", timeout)
        return self._process.exitcode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


@dataclass
class Server:
    """A server that is ready."""

    url: str
    process: Process
    log: Path

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value, now."""
        values = self._samples(name, labels)
        assert len(values) == 1, f"{name} {labels}: {values}"
        return values[0]

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples of that name with these labels; 0 where there is none yet."""
        return sum(self._samples(name, labels))

    def metrics_text(self) -> str:
        """All that ``/metrics`` has now."""
        return httpx.get(f"{self.url}/metrics", headers={"x-api-key": METRICS_KEY}, timeout=DEADLINE).text

    def _samples(self, name: str, labels: Mapping[str, str]) -> list[float]:
        return [
            sample.value
            for family in text_string_to_metric_families(self.metrics_text())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def is_idle(self) -> bool:
        """Whether no request runs or waits, and no block is held."""
        names = ("emberkv_requests_running", "emberkv_requests_waiting")
        return not any(self.metric(name) for name in names) and not self.metric("emberkv_pool_blocks", state="in_use")

    def exit_code(self) -> int:
        return self.process.wait(DEADLINE)


@contextmanager
def serving(
    folder: Path,
    *arguments: str,
    through: Sequence[str] = (),
    command: str = "serve",
    port: int = 0,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server, stopped at the end. port: 0 is a free one. through: a command that starts the rest of its line, in a
    process that has imported nothing. command: what emberkv is to do. environment: variables of a forked server.
    """
    log = folder / "server.log"
    log.write_bytes(b"")
    process: Process
    given = [*arguments, "--port", str(port)]
    if through:
        with log.open("wb") as stderr:
            line = [*through, *EMBERKV, command, *given]
            process = subprocess.Popen(line, stderr=stderr, env=clean_environment())
    else:
        process = Forked(command, given, log, environment)
    try:
        yield Server(_ready_url(process, log), process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(DEADLINE)


def _ready_url(process: Process, log: Path) -> str:
    end = time.monotonic() + START_DEADLINE
    while not (found := re.search(r'listening(?:\s+|": ")(http://[^\s"]+)', log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, f"the server is not ready in time: {log.read_text()}"
        time.sleep(0.05)
    return found[1]
