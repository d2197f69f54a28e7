"""What a forked server runs. Importing this does, once for all servers, what each of them would do at its start: import
modules, those too that are imported late, and build transformers' table of weight names, which takes half a second.
"""

import gc
import os

import pydantic.v1  # noqa: F401 - FastAPI imports it with its first route
import transformers.models.llama.modeling_llama  # noqa: F401 - transformers imports it with the model
import uvicorn.loops.auto
import uvicorn.protocols.websockets.auto  # noqa: F401 - uvicorn imports these when it serves
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import emberkv.cli.gateway
import emberkv.cli.startup
import emberkv.cluster.gateway
import emberkv.engine.torch.assembly
import emberkv.serving.engine_setup  # noqa: F401 - the commands import these when they run
from emberkv.cli.main import app

get_checkpoint_conversion_mapping("llama")
gc.freeze()  # a server collects garbage at its start, and would go through all of these objects


def run(arguments: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    """Become ``emberkv`` with these arguments, in ``folder``, what it prints in the file ``log``."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    app(arguments, prog_name="emberkv")
