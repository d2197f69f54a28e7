"""What a forked server runs. Importing this imports all that a server needs."""

import os

import emberkv.cli.startup
import emberkv.engine.torch.assembly  # noqa: F401 - imports torch and transformers
from emberkv.cli.main import app


def run(arguments: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    """Become ``emberkv`` with these arguments, in ``folder``, its standard error in the file ``log``."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 2)
    os.close(output)
    app(arguments, prog_name="emberkv")
