"""A bound on the time that a chat template may run: each pass of a loop and each call of a macro checks a deadline.

A template is a program, and variables of a request steer it: a loop within a loop can outlast any client. Jinja has no
such bound. So each template is compiled once more, with a check in the body of every loop and macro, and replaces the
one that transformers has compiled.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf
from time import monotonic
from typing import Any

from jinja2 import Environment, Template, nodes, pass_context
from transformers.utils import chat_template_utils

from emberkv.errors import EmberError

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
