"""Whether a model's chat template can be used, tried within bounds before any request needs it; and the bound on the
time that it may run.

A template is a program, and variables of a request steer it: a loop within a loop can outlast any client. Jinja has no
such bound. So each template is compiled once more, with a check of a deadline in the body of every loop and macro, and
replaces the one that transformers has compiled.
"""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from math import inf
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

from jinja2 import Environment, Template, TemplateSyntaxError, meta, nodes, pass_context
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from emberkv.errors import ConfigError, EmberError, reason_of

TEMPLATE_SECONDS = 10.0
"""Conversations of thousands of messages take a hundredth of it."""

_CHECK = "emberkv_deadline"

_deadline: ContextVar[float] = ContextVar("deadline of the template that is rendered", default=inf)


class TemplateTimeoutError(EmberError):
    """A chat template has run for too long."""


@contextmanager
def template_deadline(seconds: float = TEMPLATE_SECONDS) -> Iterator[None]:
    """Templates of `bound_template` that are rendered within raise TemplateTimeoutError after ``seconds``."""
    token = _deadline.set(monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def bound_template(text: str) -> None:
    """Have transformers render this template with its deadline checked. Raises what compiling it raises."""
    compiled: Any = chat_template_utils._compile_jinja_template  # untyped; it keeps what it has compiled
    template: Template = compiled(text)
    environment = template.environment
    if _CHECK in environment.filters:
        return
    environment.filters[_CHECK] = _check
    bounded = Template.from_code(environment, _code(environment, text), environment.make_globals(None))
    template.root_render_func, template.blocks = bounded.root_render_func, bounded.blocks


@pass_context  # so that it is not computed once, when the template is compiled
def _check(_context: Mapping[str, Any], value: object) -> object:
    if monotonic() > _deadline.get():
        raise TemplateTimeoutError(f"it does not end within {TEMPLATE_SECONDS:g} s")
    return value


def _code(environment: Environment, text: str) -> Any:
    source = environment.parse(text)
    bodies: list[nodes.For | nodes.Macro] = [*source.find_all(nodes.For), *source.find_all(nodes.Macro)]
    for node in bodies:
        check = nodes.Filter(nodes.Const(None), _CHECK, [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(check).set_lineno(node.lineno).set_environment(environment))
    return environment.compile(source)


NO_TEMPLATE = "this model has no chat template"
TEMPLATE_FILE = "chat_template.jinja"

_MOST_STEPS = 1_000_000
_MOST_CHARACTERS = 1 << 20
_SYSTEM = {"role": "system", "content": "You count lamps."}
_USER = {"role": "user", "content": "Which lamps are lit?"}
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe_the_lamps",
        "description": "Says which lamps are lit.",
        "parameters": {"type": "object", "properties": {"street": {"type": "string"}}},
    },
}

_log = logging.getLogger(__name__)


class _UnboundedError(EmberError):
    """A template takes more steps or makes more text than any that is of use."""


def install_chat_template(tokenizer: PreTrainedTokenizerFast, folder: Path, chosen: str | None) -> str | None:
    """Give ``tokenizer`` the template that it is to use, and say why there can be no chats; None: there can.

    folder: the model's, which says where a fault is. chosen: the name of one of the model's templates, or a file with
    one; None: the model's own. The log has the reason, and a warning where tools are ignored.

    Raises ConfigError when ``chosen`` is neither a template's name nor a file.
    """
    if chosen is not None:
        tokenizer.chat_template = _chosen(tokenizer.chat_template, chosen)
    templates = tokenizer.chat_template
    named = dict(templates) if isinstance(templates, dict) else {"default": templates}
    text = named.get("default")
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    source = chosen or (TEMPLATE_FILE if (folder / TEMPLATE_FILE).is_file() else "the chat template")
    if text:
        fault = template_fault(text, special)
        problem = None if fault is None else f"{source}, {fault}"
    elif isinstance(templates, dict):
        names = ", ".join(map(repr, sorted(named)))
        problem = f"the model has several chat templates ({names}) and no default; choose one by --chat-template NAME"
    else:
        problem = NO_TEMPLATE
    if problem is not None:
        _log.warning("%s: only /v1/completions works", problem)
    elif ignores_tools(str(text), str(named.get("tool_use", text)), special):
        _log.warning("%s ignores tools: the model does not see those that requests define", source)
    return problem


def _chosen(templates: object, chosen: str) -> str:
    if isinstance(templates, dict) and chosen in templates:
        return str(templates[chosen])
    path = Path(chosen).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        names = f"one of {', '.join(map(repr, sorted(templates)))}, or " if isinstance(templates, dict) else ""
        raise ConfigError(
            f"--chat-template is {chosen!r}; accepted is {names}a readable file ({reason_of(error)})"
        ) from error


def template_fault(text: str, special: Mapping[str, str]) -> str | None:
    """Why the template renders no short conversation, with the line at fault where there is one; None: it does.

    special: what the tokenizer hands to templates (``bos_token`` and so on).
    """
    faults = []
    for conversation in ([_USER], [_SYSTEM, _USER]):
        try:
            _render(text, special, conversation)
        except Exception as error:  # noqa: BLE001 - whatever the template's program does wrong
            faults.append(_described(error))
        else:
            return None
    return faults[0]


def _described(error: Exception) -> str:
    if isinstance(error, TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    reason = "it calls itself without end" if isinstance(error, RecursionError) else reason_of(error)
    line = _line(error)
    return reason if line is None else f"line {line}: {reason}"


def template_variables(text: str) -> set[str]:
    """The variables that a template reads. Raises what compiling it raises.

    >>> template_variables("{% for message in messages %}{{ mood }}{% endfor %}") == {"messages", "mood"}
    True
    """
    compiled: Any = chat_template_utils._compile_jinja_template  # untyped; it keeps what it has compiled
    compiled(text)
    return meta.find_undeclared_variables(_parsed(text))


@lru_cache(maxsize=4)
def _parsed(text: str) -> nodes.Template:
    """Parsed as transformers' environment would; a start looks at each template several times."""
    compiled: Any = chat_template_utils._compile_jinja_template  # untyped
    environment: Environment = compiled("").environment
    return environment.parse(text)


def ignores_tools(text: str, with_tools: str, special: Mapping[str, str]) -> bool:
    """Whether a conversation is rendered alike without tools by ``text`` and with one by ``with_tools``."""
    try:
        return _render(with_tools, special, [_USER], [PROBE_TOOL]) == _render(text, special, [_USER])
    except Exception:  # noqa: BLE001 - it looks at the tool, and rejects it
        return False


def _render(
    text: str,
    special: Mapping[str, str],
    conversation: Sequence[Mapping[str, str]],
    tools: list[dict[str, Any]] | None = None,
) -> str:
    _check_constants(_parsed(text))
    render: Any = chat_template_utils.render_jinja_template
    messages = [[dict(message) for message in conversation]]
    with _bounded_steps():
        (rendered,), _ = render(messages, chat_template=text, tools=tools, add_generation_prompt=True, **special)
    if len(rendered) > _MOST_CHARACTERS:
        raise _UnboundedError(f"it makes {len(rendered):,} characters of a short conversation")
    return str(rendered)


def _check_constants(template: nodes.Template) -> None:
    """Refuse products of constants that are huge: they are computed when the template is compiled."""
    for node in template.find_all((nodes.Mul, nodes.Pow)):
        size = _estimate(node)
        of_text = any(isinstance(each.value, str) for each in node.find_all(nodes.Const))
        if size == inf or (of_text and size > _MOST_CHARACTERS):
            raise TemplateSyntaxError("it computes a constant that is too large", node.lineno)


def _estimate(node: nodes.Node) -> float:
    """How large a number, or how long a text, products and powers of constants come to; 1 for anything else."""
    match node:
        case nodes.Const(value=str() as text):
            return float(len(text))
        case nodes.Const(value=int() | float() as number):
            return float(abs(number)) if abs(number) < 1e300 else inf
        case nodes.Mul(left=left, right=right):
            return _estimate(left) * _estimate(right)
        case nodes.Pow(left=left, right=right):
            try:
                return float(_estimate(left) ** _estimate(right))
            except OverflowError:
                return inf
        case _:
            return 1.0


@contextmanager
def _bounded_steps() -> Iterator[None]:
    """Stop what this thread does within, once it takes more steps than a template of use."""
    steps = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal steps
        steps += 1
        if steps > _MOST_STEPS:
            raise _UnboundedError(f"it does not end within {_MOST_STEPS:,} steps")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def _line(error: Exception) -> int | None:
    """The last line of the template that the error has passed."""
    line, place = None, error.__traceback__
    while place is not None:
        if place.tb_frame.f_code.co_filename == "<template>":
            line = place.tb_lineno
        place = place.tb_next
    return line
