"""generation_config.json sets sampling defaults where it is valid, and never costs a model its end tokens."""

import json
from pathlib import Path

import pytest

from emberkv.engine.request import SamplingParams
from emberkv.engine.torch.model.generation_config import FILE_NAME, read_generation_config, sampling_defaults
from emberkv.engine.torch.model.loader import load_model
from emberkv.errors import CorruptModelError

ADVISED = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}


def test_what_the_file_sets_becomes_the_default() -> None:
    content = {**ADVISED, "do_sample": True, "eos_token_id": 7, "max_new_tokens": 3}
    assert sampling_defaults(content) == SamplingParams(
        temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.1
    )
    assert sampling_defaults({"temperature": None}) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("temperature", 5, "temperature is 5; it must be from 0 to 2"),
        ("temperature", float("nan"), "temperature is nan; it must be from 0 to 2"),
        ("top_p", 0, "top_p is 0; it must be above 0 and at most 1"),
        ("top_k", -1, "top_k is -1; it must be 0 (all tokens) or more"),
        ("top_k", 20.5, "top_k is 20.5; it must be an integer"),
        ("min_p", "a", "min_p is 'a'; it must be a number"),
        ("repetition_penalty", True, "repetition_penalty is True; it must be a number"),
        ("repetition_penalty", 0, "repetition_penalty is 0; it must be from 0.01 to 100"),
    ],
)
def test_a_value_of_no_use_is_ignored_by_name(
    name: str, value: object, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert getattr(sampling_defaults({**ADVISED, name: value}), name) == getattr(SamplingParams(), name)
    assert [record.getMessage() for record in caplog.records] == [
        f"generation_config.json of the model: {problem}; it is ignored"
    ]


def test_a_broken_file_is_refused_or_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_generation_config(tmp_path, "auto") == {}
    (tmp_path / FILE_NAME).write_text('{"temperature": 0.')
    with pytest.raises(CorruptModelError, match=r"is not valid JSON.*--generation-config ignore"):
        read_generation_config(tmp_path, "auto")
    assert read_generation_config(tmp_path, "ignore") == {}
    assert "is not valid JSON" in caplog.text


def test_a_model_keeps_its_end_tokens_whatever_the_file_is(copied: Path) -> None:
    path = copied / FILE_NAME
    path.write_text(json.dumps({**ADVISED, "max_new_tokens": -1}))
    loaded = load_model(str(copied))
    assert loaded.sampling_defaults.temperature == 0.6
    assert loaded.eos_token_ids == {0, 2}
    path.write_text(json.dumps({**ADVISED, "eos_token_id": 7}))
    ignoring = load_model(str(copied), generation_config="ignore")
    assert ignoring.sampling_defaults == SamplingParams()
    assert ignoring.eos_token_ids == {0, 2, 7}
    path.write_text("[")
    assert load_model(str(copied), generation_config="ignore").eos_token_ids == {0, 2}
