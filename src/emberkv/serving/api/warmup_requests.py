"""Requests whose prompts are warmed at the start: whole bodies, as agents send them, with tools and messages."""

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emberkv.core.hashing import PUBLIC_OWNER
from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.engine.warmup import read_system_prompt
from emberkv.errors import ConfigError, RequestError
from emberkv.serving.api.anthropic_schema import PromptRequest
from emberkv.serving.api.openai_schema import ChatCompletionRequest
from emberkv.serving.api.rendering import canonical_chat, canonical_messages
from emberkv.serving.api.responses_api import unstored_chat
from emberkv.serving.api.validation import Json, is_anthropic, parse_body
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.event_stream import compact_json
from emberkv.serving.tenancy import DEFAULT_TENANT
from emberkv.serving.warmup.warm_prompt import WarmPrompt


@dataclass(frozen=True, slots=True)
class WarmupRequest:
    """The body of a chat completion, an Anthropic message or a response. path: the file that it was read from."""

    path: Path
    body: Json

    def tokens(self, tokenizer: Tokenizer, rules: CanonicalRules | None) -> "array[int]":
        """The token ids of its prompt, as the API would render it. Raises RequestError for what cannot be used."""
        body = compact_json({**self.body, "model": "any"}).encode()
        if "input" in self.body:
            body = unstored_chat(body, DEFAULT_TENANT)
        if "input" not in self.body and is_anthropic(self.body):
            conversation = canonical_messages(parse_body(PromptRequest, body), rules)[0].conversation()
        else:
            conversation = canonical_chat(parse_body(ChatCompletionRequest, body), rules)[0].conversation()
        return tokenizer.encode(conversation.prompt_text(tokenizer), add_special_tokens=False)


def read_warmup_requests(paths: Iterable[Path]) -> list[WarmupRequest]:
    """The requests in these files.

    Raises ConfigError for a file that cannot be read, is larger than 1 MiB, or holds no request with messages or input.
    """
    requests = []
    for path in paths:
        try:
            body = json.loads(read_system_prompt(path))
        except ConfigError as error:
            raise ConfigError(f"--warmup-request {error}") from error
        except (ValueError, RecursionError) as error:  # the latter for JSON that is nested too deeply
            raise ConfigError(f"--warmup-request {path} is not valid JSON: {error}") from error
        if not isinstance(body, dict) or not ("messages" in body or "input" in body):
            raise ConfigError(
                f"--warmup-request {path} is no request; it must be a JSON object with 'messages', as chat completions "
                "and Anthropic messages have them, or with the 'input' of a response"
            )
        requests.append(WarmupRequest(path, body))
    return requests


def request_prompts(
    requests: Sequence[WarmupRequest], tokenizer: Tokenizer, rules: CanonicalRules | None
) -> tuple[list[WarmPrompt], list[str]]:
    """The prompts of the requests, each once, and why others cannot be used with this model. They are public, as warmed
    system prompts are.
    """
    prompts, problems = [], []
    for request in requests:
        try:
            prompts.append(WarmPrompt(tuple(request.tokens(tokenizer, rules)), PUBLIC_OWNER))
        except RequestError as error:
            problems.append(f"request {request.path}: {error}")
    return list(dict.fromkeys(prompts)), problems
