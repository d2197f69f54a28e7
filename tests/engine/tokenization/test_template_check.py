"""A chat template is tried at start: what is wrong with it is said with its line, and it is then never run."""

import json
from pathlib import Path

import pytest

from emberkv.engine.tokenization.template_check import ignores_tools, template_fault
from emberkv.engine.torch.model.loader import load_model
from emberkv.errors import ConfigError, RequestError

SPECIAL = {"bos_token": "<s>"}
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MESSAGE = [{"role": "user", "content": "x"}]


def give(folder: Path, templates: str | dict[str, str] | None) -> Path:
    """Replace the templates of a model's folder."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    if isinstance(templates, str):
        (folder / "chat_template.jinja").write_text(templates)
    elif templates is not None:
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (PLAIN, None),
        ("{% if messages[0].role != 'system' %}{{ raise_exception('no system prompt') }}{% endif %}", None),
        ("x\n{% for %}", "line 2: Expected an expression, got 'end of statement block'"),
        ("x\n\n{{ 1 // 0 }}", "line 3: integer division or modulo by zero"),
        ("{{ messages[9].x.y }}", "line 1: list object has no element 9"),
        ("{{ raise_exception('never') }}", "line 1: TemplateError: never"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}\n{{ f(1) }}", "line 1: it calls itself without end"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "line 1: it does not end within 1,000,000 steps",
        ),
        ("{{ ('a' * 1000000000) * 20 }}", "line 1: it computes a constant that is too large"),
        ("{{ strftime_now('%Y' * 10 ** 7) }}", "line 1: it computes a constant that is too large"),
        (
            "{% for i in range(2000) %}{{ 'x' * 1000 }}{% endfor %}",
            "it makes 2,000,000 characters of a short conversation",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, fault: str | None) -> None:
    assert template_fault(text, SPECIAL) == fault


def test_tools_that_change_nothing_are_ignored() -> None:
    assert ignores_tools(PLAIN, PLAIN, SPECIAL)
    assert not ignores_tools(PLAIN, PLAIN + "{{ tools }}", SPECIAL)
    assert not ignores_tools(PLAIN, PLAIN + "{% if tools %}{{ raise_exception('no') }}{% endif %}", SPECIAL)


@pytest.mark.parametrize(
    ("templates", "problem"),
    [
        ("a\n{% for %}", "chat_template.jinja, line 2: Expected an expression, got 'end of statement block'"),
        (None, "this model has no chat template"),
        (
            {"b": PLAIN, "a": PLAIN},
            "the model has several chat templates ('a', 'b') and no default; choose one by --chat-template NAME",
        ),
    ],
    ids=["broken", "none", "several"],
)
def test_a_model_that_cannot_chat_says_so_at_start_and_to_each_chat(
    templates: str | dict[str, str] | None, problem: str, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_model(str(give(copied, templates))).tokenizer
    assert tokenizer.chat_problem == problem
    assert caplog.messages == [f"{problem}: only /v1/completions works"]
    with pytest.raises(RequestError) as raised:
        tokenizer.render_chat(MESSAGE)
    assert str(raised.value) == f"{problem}; use /v1/completions"


def test_a_template_that_ignores_tools_is_warned_of(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_model(str(give(copied, PLAIN))).tokenizer.chat_problem is None
    assert caplog.messages == ["chat_template.jinja ignores tools: the model does not see those that requests define"]
    caplog.clear()
    assert (
        load_model(str(give(copied, {"default": PLAIN, "tool_use": PLAIN + "{{ tools }}"}))).tokenizer.chat_problem
        is None
    )
    assert not caplog.messages


def test_a_template_is_chosen_by_its_name_or_file(copied: Path, tmp_path: Path) -> None:
    give(copied, {"loud": "LOUD {{ messages[0].content }}", "calm": "calm {{ messages[0].content }}"})
    path = tmp_path / "own.jinja"
    path.write_text("own {{ messages[0].content }}")
    for chosen, begin in (("loud", "LOUD"), ("calm", "calm"), (str(path), "own")):
        assert load_model(str(copied), chat_template=chosen).tokenizer.render_chat(MESSAGE) == f"{begin} x"
    with pytest.raises(ConfigError, match=r"^--chat-template is 'none'; accepted is one of 'calm', 'loud', or"):
        load_model(str(copied), chat_template="none")
