"""A chat template whose loops or macros do not end is stopped; one that ends renders as it did."""

from math import inf

import pytest
from transformers.utils import chat_template_utils

from emberkv.engine.tokenization.template_check import TemplateTimeoutError, bound_template, template_deadline

MESSAGES = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]]
ORDINARY = """{%- macro shown(m) -%}{{ m.role }}: {{ m.content }}{%- endmacro -%}
{%- for m in messages if m.content -%}
{{ loop.index }}/{{ loop.length }}{{ "," if not loop.last }} {{ shown(m) }}
{%- else %}none{% endfor -%}
{%- for part in [1, [2, [3]]] recursive %}{{ loop(part) if part is iterable else part }}{% endfor %}"""
ENDLESS = {
    "loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(d) %}{% if d %}{{ f(d - 1) }}{{ f(d - 1) }}{% endif %}{% endmacro %}{{ f(n) }}",
    "recursive": "{% for x in [n] recursive %}{{ loop([x - 1, x - 1]) if x }}{% endfor %}",
}


def render(text: str, **variables: object) -> str:
    (rendered,), _ = chat_template_utils.render_jinja_template(MESSAGES, chat_template=text, **variables)
    return str(rendered)


def test_a_template_that_ends_renders_as_before() -> None:
    before = render(ORDINARY)
    bound_template(ORDINARY)
    with template_deadline(inf):
        assert render(ORDINARY) == before == "1/2, user: x2/2 assistant: y123"


@pytest.mark.parametrize("kind", ENDLESS)
def test_one_that_does_not_end_is_stopped(kind: str) -> None:
    bound_template(ENDLESS[kind])
    bound_template(ENDLESS[kind])  # a model that is loaded again
    with pytest.raises(TemplateTimeoutError, match="it does not end within 10 s"), template_deadline(0.05):
        render(ENDLESS[kind], n=40)


def test_the_deadline_ends_with_its_context() -> None:
    bound_template(ORDINARY)
    with pytest.raises(TemplateTimeoutError), template_deadline(-1):
        render(ORDINARY)
    assert render(ORDINARY).startswith("1/2")
