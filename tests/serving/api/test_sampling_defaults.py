"""What the model advises is the default of sampling on every route, and what a request gives takes its place."""

from dataclasses import replace

import pytest

from emberkv.engine.request import SamplingParams
from emberkv.serving.app import create_app
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from tests.serving.fakes import FakeEngine
from tests.serving.harness import MODEL, Client

USER = [{"role": "user", "content": "Hi"}]
ADVISED = SamplingParams(temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.1)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/messages", {"messages": USER}),
    ],
)
def test_requests_get_the_models_defaults_for_what_they_leave_open(
    path: str, body: dict[str, object], model: ServedModel, engine: FakeEngine
) -> None:
    lifecycle = Lifecycle()
    lifecycle.loaded(replace(model, sampling_defaults=ADVISED))
    client = Client(create_app(lifecycle))
    for given in ({}, {"temperature": 0, "top_k": 3}):
        assert client.post(path, {"model": MODEL, "max_tokens": 9, **body, **given}).status_code == 200
    assert [request.params for request in engine.submitted] == [
        replace(ADVISED, max_tokens=9),
        replace(ADVISED, max_tokens=9, temperature=0, top_k=3),
    ]
