"""The prefix that is warmed is one that real requests begin with, and none of a token more."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from emberkv.engine.tokenization.hf_tokenizer import HFTokenizer
from emberkv.engine.tokenization.tokenizer import shared_prefix
from tests.engine.tokenization.tokenizer_kinds import TOKENIZERS
from tests.models import CHAT_TEMPLATE, TURN_END, tiny_tokenizer

TINY = HFTokenizer(tiny_tokenizer())


def prompt_of(tokenizer: HFTokenizer, system: str, *turns: str) -> list[int]:
    messages = [{"role": "system", "content": system}]
    messages += [{"role": "user" if turn % 2 == 0 else "assistant", "content": text} for turn, text in enumerate(turns)]
    return tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False).tolist()


@settings(max_examples=100, deadline=None)
@given(system=st.text(max_size=60), turns=st.lists(st.text(max_size=20), min_size=1, max_size=3))
def test_every_conversation_begins_with_it(system: str, turns: list[str]) -> None:
    """Special tokens end the template's parts, so that no text melts into them."""
    prefix = shared_prefix(TINY, system)
    assert prompt_of(TINY, system, *turns)[: len(prefix)] == prefix


def test_it_ends_where_the_users_words_begin() -> None:
    text = f"<|im_start|>system\nBe kind.{TURN_END}\n<|im_start|>user\n"
    assert shared_prefix(TINY, "Be kind.") == TINY.encode(text, add_special_tokens=False).tolist()


def test_a_template_whose_last_token_may_melt_into_the_users_words() -> None:
    """The newline before the user's words is a token of its own, unless they begin with a newline, too."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens("\n\n")
    ours = HFTokenizer(tokenizer)
    prefix = shared_prefix(ours, "Be kind.")
    assert prefix == shared_prefix(TINY, "Be kind.")[:-1]
    assert (
        prompt_of(ours, "Be kind.", "\nHello")[: len(prefix) + 1]
        != prompt_of(ours, "Be kind.", "Hello")[: len(prefix) + 1]
    )


def test_a_template_that_puts_the_system_prompt_last() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages | reverse %}{{ m['content'] }};{% endfor %}"
    assert shared_prefix(HFTokenizer(tokenizer), "Be kind.") == []


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-template", "byte-level-template"])
def test_without_a_template_it_is_plain_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    prefix = shared_prefix(tokenizer, "a river carries what the rain gives it, ")
    assert len(prefix) > 5
    for more in ("one", "two"):
        text = f"a river carries what the rain gives it, {more}"
        assert tokenizer.encode(text, add_special_tokens=True).tolist()[: len(prefix)] == prefix


def test_a_template_that_takes_no_system_prompt_gets_it_from_the_user(fast_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(fast_tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("['system', 'user'", "['user'")
    adapted = HFTokenizer(tokenizer)
    user = adapted.render_chat([{"role": "user", "content": "Be kind.\n\nHi"}])
    assert adapted.render_chat([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]) == user
    prefix = shared_prefix(adapted, "Be kind.")
    assert len(prefix) > 2
    assert adapted.encode(user, add_special_tokens=False).tolist()[: len(prefix)] == prefix
