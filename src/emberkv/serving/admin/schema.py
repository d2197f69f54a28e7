"""The body of the routes below /v1/cache: a prompt in either API's form, a past response, or a listed prefix."""

from typing import Annotated, Any

from pydantic import AliasChoices, Field

from emberkv.errors import ConfigError, RequestError
from emberkv.serving.api.anthropic_schema import PromptRequest
from emberkv.serving.api.openai_schema import MAX_SALT, ChatCompletionRequest, CompletionRequest
from emberkv.serving.api.rendering import RenderedPrompt, render_chat, render_messages
from emberkv.serving.api.validation import RequestBody, parse_body
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.http.responses import compact_json
from emberkv.serving.lifecycle import ServedModel
from emberkv.serving.tenancy.tenants import EVERYBODY, Tenant, Tenants

MAX_TOKEN_ID = 2**31 - 1
_FORMS = ("openai", "anthropic", "response_id", "prefix")


class CacheQuestion(RequestBody):
    """The body of the routes under /v1/cache. Exactly one of the first four is given.

    openai: a chat or completion request's body; anthropic: a message request's. Both may leave out the model.
    response_id: of a past response; answer: which of its answers. prefix, or block_hash: a listed prefix's hash, in
    hexadecimal.
    tenant: whose prompt it is; the operator's to say. seconds: how long to pin; None: until it is unpinned.
    """

    openai: dict[str, Any] | None = None
    anthropic: dict[str, Any] | None = None
    response_id: str | None = None
    prefix: str | None = Field(default=None, validation_alias=AliasChoices("prefix", "identity"))
    answer: Annotated[int, Field(ge=0)] = 0
    tenant: str | None = None
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @property
    def cache_salt(self) -> str | None:
        """The OpenAI request's. Raises RequestError for one that a request could not have."""
        salt = (self.openai or {}).get("cache_salt")
        if salt is not None and not (isinstance(salt, str) and 0 < len(salt) <= MAX_SALT):
            raise RequestError(f"cache_salt must be a string of 1 to {MAX_SALT} characters", param="cache_salt")
        return salt

    def check(self, *accepted: str) -> None:
        """Raises RequestError unless exactly one of ``accepted`` is given, of all forms."""
        given = [form for form in _FORMS if getattr(self, form) is not None]
        if len(given) != 1 or given[0] not in accepted:
            raise RequestError(f"given: {', '.join(given) or 'nothing'}; give exactly one of {', '.join(accepted)}")

    def prefix_hash(self) -> bytes:
        """Raises RequestError unless it is hexadecimal."""
        try:
            return bytes.fromhex(self.prefix or "")
        except ValueError as error:
            message = f"prefix is {self.prefix!r}; it must be a block hash in hexadecimal, as they are listed"
            raise RequestError(message, param="prefix") from error


def rendered_prompt(question: CacheQuestion, model: ServedModel, rules: CanonicalRules | None) -> RenderedPrompt:
    """The prompt in question, as a request would be rendered. Raises RequestError for what cannot be used."""
    named = compact_json({"model": model.names[0], **(question.anthropic or question.openai or {})}).encode()
    if question.anthropic is not None:
        request = parse_body(PromptRequest, named)
        model.check_name(request.model)
        return _checked(render_messages(request, model.tokenizer, rules, model.countable_tokens))
    if question.openai is not None and "prompt" in question.openai:
        completion = parse_body(CompletionRequest, named)
        model.check_name(completion.model)
        prompt = completion.prompts()[0]
        if isinstance(prompt, str):
            prompt = list(model.tokenizer.encode(prompt, add_special_tokens=True, max_tokens=model.countable_tokens))
        return _checked(RenderedPrompt(prompt))
    chat = parse_body(ChatCompletionRequest, named)
    model.check_name(chat.model)
    return _checked(render_chat(chat, model.tokenizer, rules, model.countable_tokens))


def _checked(rendered: RenderedPrompt) -> RenderedPrompt:
    if not rendered.token_ids:
        raise RequestError("the prompt is empty; it must have at least one token", param="prompt")
    if max(rendered.token_ids) > MAX_TOKEN_ID:
        raise RequestError(f"prompt has a token id above {MAX_TOKEN_ID}, which no model knows", param="prompt")
    return rendered


def tenant_meant(question: CacheQuestion, tenants: Tenants) -> Tenant:
    """Whose prompt the operator asks about. Raises RequestError for a tenant that is missing or unknown."""
    if question.tenant is None:
        if not tenants.names:
            return EVERYBODY
        known = ", ".join(map(repr, tenants.names))
        raise RequestError(f"tenant is missing; this server has {known}", param="tenant")
    try:
        return tenants.named(question.tenant)
    except ConfigError as error:
        raise RequestError(str(error), param="tenant") from error
