"""The operator's system prompts, one a file or the built-in one, and what they are in tokens."""

from pathlib import Path

import pytest

from emberkv.config import ServeConfig
from emberkv.core.hashing import PUBLIC_OWNER
from emberkv.engine.tokenization.tokenizer import shared_prefix
from emberkv.engine.warmup import BUILT_IN_PROMPT
from emberkv.errors import ConfigError
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.warmup.warm_prompt import WarmPrompt, configured_prompts, standard_prompts
from tests.serving.fakes import ByteTokenizer


def warm_prompt(text: str) -> WarmPrompt:
    return WarmPrompt(tuple(f"<system>{text}<user>".encode()), PUBLIC_OWNER)


def test_without_files_the_built_in_one() -> None:
    assert configured_prompts(ServeConfig()) == [BUILT_IN_PROMPT]


def test_none_are_read_when_nothing_is_warmed(tmp_path: Path) -> None:
    assert configured_prompts(ServeConfig(warmup=False, warmup_system_files=(tmp_path / "missing",))) == []


def test_one_a_file(tmp_path: Path) -> None:
    files = tmp_path / "a", tmp_path / "b"
    for path, text in zip(files, ("Be kind.", "Be brief."), strict=True):
        path.write_text(text)
    assert configured_prompts(ServeConfig(warmup_system_files=files)) == ["Be kind.", "Be brief."]
    fallback = ServeConfig(warmup_system_files=files[:1], warmup_fallback_file=files[1])
    assert configured_prompts(fallback) == ["Be kind."]
    assert configured_prompts(ServeConfig(warmup_fallback_file=files[1])) == ["Be brief."]


@pytest.mark.parametrize(("content", "problem"), [(None, "cannot be read"), ("", "is empty")])
def test_a_useless_file_is_refused_as_an_option_and_replaced_as_a_fallback(
    content: str | None, problem: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"^--warmup-system-file {path} {problem}"):
        configured_prompts(ServeConfig(warmup_system_files=(path,)))
    assert configured_prompts(ServeConfig(warmup_fallback_file=path)) == [BUILT_IN_PROMPT]
    assert problem in caplog.text


def test_equal_prompts_count_once() -> None:
    prompts, problems = standard_prompts(["Be kind.", "Be brief.", "Be kind."], ByteTokenizer(), None)
    assert prompts == [warm_prompt("Be kind."), warm_prompt("Be brief.")]
    assert problems == []


def test_a_prompt_that_the_template_rejects_is_a_problem() -> None:
    prompts, problems = standard_prompts(["offend the template", "Be kind."], ByteTokenizer(), None)
    assert prompts == [warm_prompt("Be kind.")]
    assert problems == ["system prompt 1: the chat template rejects these messages"]
    assert list(prompts[0].tokens) == shared_prefix(ByteTokenizer(), "Be kind.")


def test_rules_rewrite_them_as_they_do_requests() -> None:
    rules = CanonicalRules.model_validate({"lines": [{"name": "date", "match": "Today is*", "action": "move"}]})
    prompts, _ = standard_prompts(["Today is Monday\nBe kind."], ByteTokenizer(), rules)
    (moved,) = rules.of_system(["Today is Monday\nBe kind."]).texts
    assert moved.startswith("Be kind.")
    assert prompts == [warm_prompt(moved)]


def test_none_are_asked_for() -> None:
    assert standard_prompts([], ByteTokenizer(), None) == ([], [])
