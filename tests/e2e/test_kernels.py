"""What computes, as a user chooses it and sees it: the C++ kernels, or torch."""

import re
from pathlib import Path

import httpx
import pytest

from tests.conftest import CheckpointFactory
from tests.e2e.process import Forked, serving
from tests.waiting import DEADLINE

PROMPT = list(range(3, 93))  # five whole blocks of 16 tokens, two whole tiles of 32, and a rest


@pytest.mark.parametrize(
    ("given", "compiler", "shown", "cached"),
    [
        ((), True, r"C\+\+, vectors of \d+.*; decoded KV is exact", 89),
        (("--kernels", "torch"), True, r"torch$", 64),
        ((), False, r"torch$", 64),
    ],
    ids=["found", "not wanted", "no compiler"],
)
def test_the_summary_says_what_computes(
    checkpoint: CheckpointFactory, tmp_path: Path, given: tuple[str, ...], compiler: bool, shown: str, cached: int
) -> None:
    arguments = (str(checkpoint("llama")), "--cache-ram", "8MiB", *given)
    environment = {} if compiler else {"PATH": str(tmp_path)}
    with serving(tmp_path, *arguments, environment=environment) as server:
        log = server.log.read_text()
        body = {"model": checkpoint("llama").name, "prompt": PROMPT, "max_tokens": 1}
        for _ in range(2):
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=DEADLINE).json()
    assert re.search(rf"kernels\s+{shown}", re.sub(r" +\n", "\n", log), re.MULTILINE), log
    assert ("torch computes in place of the C++ kernels" in log) is not compiler
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached


def test_kernels_that_are_asked_for_and_cannot_be_are_an_error(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    arguments = [str(checkpoint("llama")), "--kernels", "native", "--port", "0"]
    refused = Forked("serve", arguments, log, {"PATH": str(tmp_path)})
    assert refused.wait(DEADLINE) == 2
    assert "error: no C++ compiler: none of g++, c++ is on the PATH" in log.read_text()
    assert "Traceback" not in log.read_text()
