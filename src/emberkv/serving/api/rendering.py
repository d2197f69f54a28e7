"""Renders a checked request to token ids: canonical rules, chat template, tokenizer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.errors import RequestError
from emberkv.serving.api.anthropic_schema import PromptRequest
from emberkv.serving.api.openai_schema import ChatCompletionRequest, TemplateOptions, template_messages
from emberkv.serving.api.retain_marks import anthropic_mark, chat_mark, covered_tokens, without_marks
from emberkv.serving.canonical import CanonicalRules

Given = TypeVar("Given", bound=PromptRequest)

Applied = Mapping[str, int]
"""How many lines, or tools, each rule changed. Names and numbers only: it may be logged."""

_SYSTEM_ROLES = ("system", "developer")


def canonical_chat(
    request: ChatCompletionRequest, rules: CanonicalRules | None
) -> tuple[ChatCompletionRequest, Applied]:
    """An OpenAI chat request. Its system prompt is the system messages that it begins with."""
    if rules is None:
        return request, {}
    counts: Counter[str] = Counter()
    roles = [message.get("role") for message in request.messages]
    leading = next((at for at, role in enumerate(roles) if role not in _SYSTEM_ROLES), len(roles))
    system = _of_system([message.get("content") for message in request.messages[:leading]], rules, counts)
    messages = [
        {**message, "content": content} for message, content in zip(request.messages[:leading], system, strict=True)
    ]
    messages += [_of_message(message, rules, counts) for message in request.messages[leading:]]
    tools = _of_tools(request.tools, rules, counts)
    return request.model_copy(update={"messages": messages, "tools": tools}), counts


def canonical_messages(request: Given, rules: CanonicalRules | None) -> tuple[Given, Applied]:
    """An Anthropic request."""
    if rules is None:
        return request, {}
    counts: Counter[str] = Counter()
    (system,) = _of_system([request.system], rules, counts)
    messages = [_of_message(message, rules, counts) for message in request.messages]
    tools = _of_tools(request.tools, rules, counts)
    return request.model_copy(update={"system": system, "messages": messages, "tools": tools}), counts


def _of_system(contents: list[Any], rules: CanonicalRules, counts: Counter[str]) -> list[Any]:
    rewritten = rules.of_system([text for content in contents for text in _texts(content)])
    counts.update(rewritten.counts)
    texts = iter(rewritten.texts)
    return [_with_texts(content, [next(texts) for _ in _texts(content)]) for content in contents]


def _of_message(message: dict[str, Any], rules: CanonicalRules, counts: Counter[str]) -> dict[str, Any]:
    if message.get("role") != "user":
        return message
    texts = []
    for text in _texts(message.get("content")):
        rewritten = rules.of_user(text)
        counts.update(rewritten.counts)
        texts += rewritten.texts
    return {**message, "content": _with_texts(message.get("content"), texts)} if texts else message


def _of_tools(
    tools: list[dict[str, Any]] | None, rules: CanonicalRules, counts: Counter[str]
) -> list[dict[str, Any]] | None:
    if not tools:
        return tools
    ordered, changed = rules.of_tools(tools)
    counts.update(changed)
    return ordered


def _texts(content: object) -> list[str]:
    """The texts of a message's content, in either form. What is no text is for the API's own checks to refuse."""
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if _is_text(part)] if isinstance(content, list) else []


def _with_texts(content: Any, texts: list[str]) -> Any:
    """``content`` with its texts replaced, in order."""
    if isinstance(content, str):
        return texts[0]
    if not isinstance(content, list):
        return content
    following = iter(texts)
    return [{**part, "text": next(following)} if _is_text(part) else part for part in content]


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


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
