"""A server in a process of its own, to be sent signals. Its engine stops speaking after two tokens."""

from emberkv.serving.app import create_app
from emberkv.serving.lifecycle import Lifecycle, LoadedModel
from emberkv.serving.server import HttpServer, bind_socket
from tests.serving.fakes import ByteTokenizer, FakeEngine, Script


def main() -> None:
    engine = FakeEngine(Script("Hello", pause_after=2))
    lifecycle = Lifecycle()
    lifecycle.loaded(LoadedModel(("tiny",), 0, engine, ByteTokenizer()))
    server = HttpServer(create_app(lifecycle), lifecycle, bind_socket(port=0), drain_seconds=600)
    print(server.url, flush=True)
    server.run()
    engine.stop()
    print("returned")


if __name__ == "__main__":
    main()
