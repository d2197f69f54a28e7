"""How a run of the tests ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[1]


def test_a_run_that_names_a_file_that_does_not_exist_says_so_where_other_processes_collect() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", "tests/test_of_nothing.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=DEADLINE)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR, run.stdout
    assert "ERROR: file or directory not found: tests/test_of_nothing.py" in run.stderr
