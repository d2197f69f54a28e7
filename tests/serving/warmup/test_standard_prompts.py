"""The operator's system prompts as tokens: one a file, or the built-in one."""

from pathlib import Path

from emberkv.engine.shared_prefix import shared_prefix
from emberkv.engine.system_prompt import BUILT_IN_PROMPT
from emberkv.serving.canonical.rules import CanonicalRules
from emberkv.serving.warmup.standard_prompts import standard_prompts
from emberkv.serving.warmup.warm_prompt import WarmPrompt
from tests.serving.fakes import ByteTokenizer


def warm_prompt(text: str) -> WarmPrompt:
    return WarmPrompt(tuple(f"<system>{text}<user>".encode()))


def test_without_files_the_built_in_one() -> None:
    assert standard_prompts([], ByteTokenizer()) == ([warm_prompt(BUILT_IN_PROMPT)], [])


def test_one_a_file_and_equal_ones_once(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b", "c", "missing")]
    for path, text in zip(files, ("Be kind.", "Be brief.", "Be kind."), strict=False):
        path.write_text(text)
    prompts, problems = standard_prompts(files, ByteTokenizer())
    assert prompts == [warm_prompt("Be kind."), warm_prompt("Be brief."), warm_prompt(BUILT_IN_PROMPT)]
    assert problems == []


def test_a_prompt_that_the_template_rejects_is_a_problem(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_text("offend the template")
    files[1].write_text("Be kind.")
    prompts, problems = standard_prompts(files, ByteTokenizer())
    assert prompts == [warm_prompt("Be kind.")]
    assert problems == ["system prompt 1: the chat template rejects these messages"]
    assert list(prompts[0].tokens) == shared_prefix(ByteTokenizer(), "Be kind.")


def test_rules_rewrite_them_as_they_do_requests(tmp_path: Path) -> None:
    rules = CanonicalRules.model_validate({"lines": [{"name": "date", "match": "Today is*", "action": "move"}]})
    (tmp_path / "a").write_text("Today is Monday\nBe kind.")
    prompts, _ = standard_prompts([tmp_path / "a"], ByteTokenizer(), rules)
    (moved,) = rules.of_system(["Today is Monday\nBe kind."]).texts
    assert moved.startswith("Be kind.")
    assert prompts == [warm_prompt(moved)]


def test_none_are_asked_for() -> None:
    assert standard_prompts(None, ByteTokenizer()) == ([], [])
