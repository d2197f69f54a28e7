"""Declared prefixes as tokens: of requests with a system prompt, and of plain completions."""

import pytest

from emberkv.errors import ConfigError
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.tenancy import PublicPrompt
from emberkv.serving.warmup.warm_prompt import public_tokens
from tests.serving.fakes import BOS, ByteTokenizer

SYSTEM = PublicPrompt(system="Be kind.")


def test_a_system_prompt_is_rendered_up_to_where_requests_differ() -> None:
    assert public_tokens([SYSTEM], ByteTokenizer(), None) == [list(b"<system>Be kind.<user>")]


def test_a_text_is_what_completions_begin_with() -> None:
    assert public_tokens([PublicPrompt(text="Once")], ByteTokenizer(), None) == [[BOS, *b"Once"]]


def test_rules_that_rewrite_requests_rewrite_these() -> None:
    rules = CanonicalRules.model_validate({"lines": [{"name": "date", "match": "date: *", "action": "drop"}]})
    dated = PublicPrompt(system="date: today\nBe kind.")
    assert public_tokens([dated], ByteTokenizer(), rules) == public_tokens([SYSTEM], ByteTokenizer(), None)


def test_a_prompt_that_the_template_refuses_is_named() -> None:
    refused = PublicPrompt(system="offend the template")
    with pytest.raises(ConfigError, match=r"public_prefixes\.1 cannot be used with this model: the chat template"):
        public_tokens([SYSTEM, refused], ByteTokenizer(), None)
