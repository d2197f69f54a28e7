"""What the start says of the model: its context with what limits it, and a request that it can answer."""

import dataclasses
import json
import shlex

import pytest

from emberkv.cli.startup import context_line, curl_line, stages
from emberkv.engine.torch.model.geometry import LayerGeometry, ModelGeometry

GEOMETRY = ModelGeometry(4, 2, 16, 384, 4096, (LayerGeometry(None, None, 0.25),), stated_context=4096)


def test_the_context_is_what_can_be_asked_for_and_why() -> None:
    assert context_line(GEOMETRY, 100_000) == "4,096 tokens"
    assert context_line(GEOMETRY, 1_024) == "1,024 tokens: all that the KV pool holds, of the model's 4,096"
    longer = dataclasses.replace(GEOMETRY, stated_context=131_072)
    assert context_line(longer, 100_000) == (
        "4,096 tokens, of the model's 131,072: beyond these, its RoPE rotates all positions otherwise"
    )


@pytest.mark.parametrize("chats", [True, False])
@pytest.mark.parametrize("needs_key", [True, False])
def test_the_request_to_try_fits_the_model(chats: bool, needs_key: bool) -> None:
    words = shlex.split(curl_line("http://127.0.0.1:1", "tiny", needs_key, chats=chats))
    body = json.loads(words[-1])
    assert words[1] == f"http://127.0.0.1:1/v1/{'chat/' if chats else ''}completions"
    assert set(body) == {"model", "messages" if chats else "prompt", "max_tokens", "temperature"}
    assert ("Authorization: Bearer YOUR_KEY" in words) == needs_key


def test_without_a_terminal_each_stage_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with stages("one") as stage:
        stage("two [x]")
    assert caplog.messages == ["one", "two [x]"]
