"""``python -m emberkv.cli.supervised ARGUMENTS``: the ``emberkv`` command, which stops when its standard input closes.

So a server ends, in order, with the process that has started it, however that ends.
"""

import os
import signal
import sys
import threading

from emberkv.cli.main import app


def _stop_with_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):  # unbuffered: a read that waits in a buffer's lock would abort the exit
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_with_stdin, daemon=True).start()
    app()
