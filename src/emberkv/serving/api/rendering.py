"""From a checked request to token ids: canonical rules, chat template, tokenizer; and what is to be retained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emberkv.engine.tokenizer import Tokenizer
from emberkv.errors import RequestError
from emberkv.serving.api.anthropic_schema import PromptRequest
from emberkv.serving.api.chat_messages import template_messages
from emberkv.serving.api.openai_schema import ChatCompletionRequest, TemplateOptions
from emberkv.serving.api.retain_marks import anthropic_mark, chat_mark, covered_tokens, without_marks
from emberkv.serving.canonical.requests import Applied, canonical_chat, canonical_messages
from emberkv.serving.canonical.rules import CanonicalRules


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """canonical: what the rules changed. retain_tokens: how many from the first are to be kept for retain_seconds."""

    token_ids: Sequence[int]
    canonical: Applied = field(default_factory=dict)
    retain_tokens: int = 0
    retain_seconds: float = 0.0


def render_messages(
    request: PromptRequest, tokenizer: Tokenizer, rules: CanonicalRules | None, max_tokens: int | None = None
) -> RenderedPrompt:
    """An Anthropic request's prompt. Raises RequestError for what cannot be used, or has more than ``max_tokens``."""
    request, canonical = canonical_messages(request, rules)
    text = request.prompt_text(tokenizer)
    mark = anthropic_mark(request)
    try:
        cut = None if mark is None else mark.cut.prompt_text(tokenizer)
    except RequestError:
        cut = None  # a template may refuse half a conversation; a wish about eviction is no reason to refuse the whole
    token_ids = tokenizer.encode(text, add_special_tokens=False, max_tokens=max_tokens)
    return _with_mark(tokenizer, text, token_ids, canonical, cut, mark.seconds if mark else 0.0)


def render_chat(
    request: ChatCompletionRequest, tokenizer: Tokenizer, rules: CanonicalRules | None, max_tokens: int | None = None
) -> RenderedPrompt:
    """An OpenAI chat request's prompt. Raises RequestError as `render_messages` does."""
    request, canonical = canonical_chat(request, rules)
    text = _chat_text(request, tokenizer)
    mark = chat_mark(request)
    try:
        cut = None if mark is None else _chat_text(mark.cut, tokenizer)
    except RequestError:
        cut = None  # as above
    token_ids = tokenizer.encode(text, add_special_tokens=False, max_tokens=max_tokens)
    return _with_mark(tokenizer, text, token_ids, canonical, cut, mark.seconds if mark else 0.0)


def chat_text(
    options: TemplateOptions,
    messages: Sequence[Mapping[str, Any]],
    tools: list[dict[str, Any]] | None,
    tokenizer: Tokenizer,
) -> str:
    """A conversation as the chat template renders it. Raises RequestError for what cannot be used."""
    return tokenizer.render_chat(template_messages(messages), tools=without_marks(tools), **options.template_options())


def _chat_text(request: ChatCompletionRequest, tokenizer: Tokenizer) -> str:
    return chat_text(request, request.messages, request.shown_tools, tokenizer)


def _with_mark(
    tokenizer: Tokenizer, text: str, token_ids: Sequence[int], canonical: Applied, cut_text: str | None, seconds: float
) -> RenderedPrompt:
    if cut_text is None:
        return RenderedPrompt(token_ids, canonical)
    return RenderedPrompt(token_ids, canonical, covered_tokens(tokenizer, text, token_ids, cut_text), seconds)
