"""The benchmarks' command lines, as far as they are alike."""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

WORK = Path(tempfile.gettempdir()) / "emberkv-benchmarks"
"""Where the random model and the servers' logs stay from one run to the next."""


def parser(doc: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """Takes --out and, where there is a default for it, --rounds. doc: the module's, shown as it is."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--out", type=Path, help="writes PREFIX.json and PREFIX.md")
    return made


def server_parser(doc: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """As `parser`, and takes the command of emberkv, as split into words."""
    made = parser(doc, rounds=rounds)
    made.add_argument("--emberkv", type=shlex.split, default=[sys.executable, "-m", "emberkv.cli.main"])
    return made


def random_model_parser(doc: str | None, *, cache_ram: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """As `server_parser`, and takes the folder of the random model and the size of its pool."""
    made = server_parser(doc, rounds=rounds)
    made.add_argument("--model", type=Path, default=WORK / "random-qwen2", help="written there if missing")
    made.add_argument("--cache-ram", default=cache_ram)
    return made
