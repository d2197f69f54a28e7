"""Apps and servers around a fake engine."""

from collections.abc import Iterator

import pytest

from emberkv.serving.app import create_app
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.serving.server import HttpServer
from tests.serving.fakes import ByteTokenizer, FakeEngine
from tests.serving.harness import MODEL, Client, serving


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.stop()


@pytest.fixture
def model(engine: FakeEngine) -> ServedModel:
    return ServedModel((MODEL, "alias"), 1_700_000_000, engine, ByteTokenizer())


@pytest.fixture
def lifecycle(model: ServedModel) -> Lifecycle:
    lifecycle = Lifecycle()
    lifecycle.loaded(model)
    return lifecycle


@pytest.fixture
def client(lifecycle: Lifecycle) -> Client:
    return Client(create_app(lifecycle, wall_clock=lambda: 1_800_000_000.5))


@pytest.fixture
def server(lifecycle: Lifecycle) -> Iterator[HttpServer]:
    with serving(lifecycle) as server:
        yield server
