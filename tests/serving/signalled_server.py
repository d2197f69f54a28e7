"""A server in a process of its own, to be sent signals. Its engine stops speaking after two tokens, and stops
once standard input has a line, or ends.
"""

import logging
import sys

from emberkv.serving.app import create_app
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.serving.server import HttpServer, bind_socket
from tests.serving.fakes import ByteTokenizer, FakeEngine, Script


def main() -> None:
    engine = FakeEngine(Script("Hello", pause_after=2))
    lifecycle = Lifecycle()
    lifecycle.loaded(ServedModel(("tiny",), 0, engine, ByteTokenizer()))
    server = HttpServer(create_app(lifecycle), lifecycle, bind_socket(port=0), drain_seconds=600)
    logging.basicConfig(level="INFO")
    with server.capture_signals(until_exit=True):
        print(server.url, flush=True)
        server.run()
        print("stopping the engine", flush=True)
        sys.stdin.readline()
        engine.stop()
    print("returned", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
