"""The standard system prompt: the file to the letter, or the built-in one and a warning."""

from pathlib import Path

import pytest

from emberkv import get_standard_system_prompt
from emberkv.engine.warmup import BUILT_IN_PROMPT, MAX_PROMPT_BYTES


@pytest.mark.parametrize(
    "text",
    ["You are kind.", "  Ünïcödé 你好 👩\u200d👧\r\n", "x" * 100 * 1024, "é" * (MAX_PROMPT_BYTES // 2)],
    ids=["short", "unicode", "100 KiB", "1 MiB"],
)
def test_a_file_to_the_letter(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(text.encode())
    assert get_standard_system_prompt(path) == text
    assert get_standard_system_prompt(str(path)) == text
    assert not caplog.messages


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("You are kind.", encoding="utf-8-sig")
    assert get_standard_system_prompt(path) == "You are kind."


def test_without_a_file_the_built_in_one(caplog: pytest.LogCaptureFixture) -> None:
    assert get_standard_system_prompt() == BUILT_IN_PROMPT
    assert len(BUILT_IN_PROMPT) > 500
    assert not caplog.messages


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "is empty"),
        (b" \r\n\t", "is empty"),
        (b"ok \xff", "is not UTF-8 at byte 3"),
        (b"x" * (MAX_PROMPT_BYTES + 1), "is larger than 1,048,576 bytes"),
    ],
    ids=["missing", "empty", "blank", "not utf-8", "too large"],
)
def test_the_built_in_one_and_a_warning(
    content: bytes | None, problem: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    assert get_standard_system_prompt(path) == BUILT_IN_PROMPT
    assert caplog.messages == [f"the system prompt file {path} {problem}; the built-in prompt takes its place"]


def test_a_folder_is_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert get_standard_system_prompt(tmp_path) == BUILT_IN_PROMPT
    assert "cannot be read" in caplog.text
