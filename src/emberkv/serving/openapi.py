"""``/openapi.json``: every route with its request, its answer, its errors and its headers; and ``/docs``, the same as
one HTML page, which loads nothing else and needs no script.

Routes read their bodies themselves, off the event loop where these are large, so FastAPI does not know their shapes;
they are put in here. The answers' models are for this page alone.
"""

import re
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from emberkv import __version__
from emberkv.serving.api.anthropic_schema import MessagesRequest, PromptRequest
from emberkv.serving.api.cache_api import CacheQuestion
from emberkv.serving.api.openai_schema import ChatCompletionRequest, CompletionRequest
from emberkv.serving.api.responses_schema import ResponsesRequest
from emberkv.serving.api.tokenizer_api import DetokenizeRequest, TokenizeRequest
from emberkv.serving.api.validation import Json
from emberkv.serving.request_context import CACHE_HEADER

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 0 auto; padding: 1rem }
code, .path { font-family: ui-monospace, monospace; overflow-wrap: anywhere }
section { border-top: 1px solid #8886; margin-top: 1.5rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid #8883 }
nav ul { columns: 18rem; padding-left: 1rem }
"""


def docs_page(document: Json, openapi_path: str) -> str:
    """A page of an OpenAPI document: each route with the fields of its request and its answer, and its errors.

    openapi_path: where the document itself is, for a link.
    """
    routes = [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = document["components"]["schemas"]
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    links = "".join(f'<li><a href="#{_anchor(*route)}">{_named(*route)}</a></li>' for route in routes)
    sections = "".join("".join(_section(*route, schemas)) for route in routes)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f'<h1>{title}</h1><p>Tools read the same as <a href="{escape(openapi_path)}">openapi.json</a>.</p>'
        f"<nav><ul>{links}</ul></nav>{sections}</body></html>"
    )


def _anchor(method: str, path: str, _operation: Json) -> str:
    return escape(f"{method.lower()}{path.replace('/', '-').replace('{', '').replace('}', '')}")


def _named(method: str, path: str, _operation: Json) -> str:
    return f'<span class="path">{escape(method)} {escape(path)}</span>'


def _section(method: str, path: str, operation: Json, schemas: Json) -> Iterator[str]:
    route = (method, path, operation)
    yield f'<section id="{_anchor(*route)}"><h2>{_named(*route)}</h2>'
    if "requestBody" in operation:
        yield f"<h3>Request</h3>{_content(operation['requestBody'], schemas)}"
    for status, response in operation["responses"].items():
        if status == "200":
            yield f"<h3>Answer</h3>{_content(response, schemas)}"
    errors = {status: each["description"] for status, each in operation["responses"].items() if status != "200"}
    if errors:
        rows = "".join(f"<tr><td>{escape(status)}</td><td>{escape(text)}</td></tr>" for status, text in errors.items())
        yield f"<h3>Errors</h3><table>{rows}</table>"
    yield "</section>"


def _content(described: Json, schemas: Json) -> str:
    """The fields of a body in JSON, one a row; a sentence where it has another form."""
    schema = described.get("content", {}).get("application/json", {}).get("schema", {})
    if "$ref" not in schema:
        return f"<p>{escape(described.get('description', 'JSON.'))}</p>"
    model = schemas[_name(schema)]
    needed = model.get("required", [])
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_type(field))}</td>"
        f"<td>{'required' if name in needed else ''}</td></tr>"
        for name, field in model.get("properties", {}).items()
    )
    about = re.sub("``(.+?)``", r"<code>\1</code>", escape(model.get("description", "")))
    return f"<p>{about}</p><table><tr><th>Field</th><th>Type</th><th></th></tr>{rows}</table>"


def _type(schema: Json) -> str:
    """A field's type in words, as "list of string or null"."""
    if "$ref" in schema:
        return _name(schema)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def _name(reference: Json) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class CachedTokens(_Answer):
    cached_tokens: int


class ReasoningTokens(_Answer):
    reasoning_tokens: int


class Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class CalledFunction(_Answer):
    name: str
    arguments: str


class ToolCall(_Answer):
    id: str
    type: str
    function: CalledFunction


class AssistantMessage(_Answer):
    role: str
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: CalledFunction | None = None


class ChatChoice(_Answer):
    index: int
    message: AssistantMessage
    logprobs: Json | None
    finish_reason: str | None


class ChatCompletion(_Answer):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(_Answer):
    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ContentBlock(_Answer):
    """type: text, thinking (with a signature) or tool_use (with id, name and input)."""

    type: str
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessageUsage(_Answer):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Message(_Answer):
    id: str
    type: str
    role: str
    model: str
    content: list[ContentBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(_Answer):
    input_tokens: int


class Tokenized(_Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(_Answer):
    prompt: str


class ErrorDetail(_Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Answer):
    error: ErrorDetail
    request_id: str


class AnthropicErrorDetail(_Answer):
    type: str
    message: str


class AnthropicError(_Answer):
    type: str
    error: AnthropicErrorDetail
    request_id: str


REQUESTS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": PromptRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    **{f"/v1/cache/{name}": CacheQuestion for name in ("explain", "warm", "pin", "unpin", "remove")},
}
ANSWERS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": Completion,
    "/v1/messages": Message,
    "/v1/messages/count_tokens": TokenCount,
    "/tokenize": Tokenized,
    "/detokenize": Detokenized,
}
_STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_OPEN = ("/", "/docs", "/dashboard", "/health", "/ready", "/openapi.json")
_ERRORS = {
    400: "A field is wrong, or the prompt is too long (code context_length_exceeded).",
    401: "No key, or a wrong one.",
    404: "No such model, prefix or response.",
    413: "The body is larger than --max-body.",
    415: "The body has a content-encoding other than gzip.",
    429: "More requests than the server takes; 529 for Anthropic's clients. See Retry-After.",
    500: "The engine failed.",
    503: "The model is not loaded yet, or the server is shutting down; see Retry-After.",
    504: "The answer took longer than --request-timeout.",
}
_PREFIX = "#/components/schemas/{model}"


def openapi_document(app: FastAPI, root_path: str = "") -> Json:
    """The OpenAPI document of an app whose routes are all in place, served under ``root_path``."""
    document = app.openapi()
    document["servers"] = [{"url": root_path or "/"}]
    document["info"] = {"title": "emberkv", "version": __version__}
    models: set[type[BaseModel]] = {*REQUESTS.values(), *ANSWERS.values(), Error, AnthropicError}
    in_order = sorted(models, key=lambda model: model.__name__)
    _, schemas = models_json_schema([(model, "validation") for model in in_order], ref_template=_PREFIX)
    document["components"] = {
        "schemas": schemas["$defs"],
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        },
    }
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation.update(_described(path))
    return document


def _described(path: str) -> Json:
    described: Json = {"responses": {"200": _answer(path)}}
    if path in REQUESTS:
        described["requestBody"] = {"required": True, "content": _json(REQUESTS[path])}
    if path not in _OPEN:
        described["security"] = [{"bearer": []}, {"x-api-key": []}, {}]
        kind = AnthropicError if path.startswith("/v1/messages") else Error
        for status, text in _ERRORS.items():
            described["responses"][str(status)] = {"description": text, "content": _json(kind)}
    return described


def _answer(path: str) -> Json:
    headers = {"x-request-id": "The request's id: the client's X-Request-Id, or one made here."}
    answer: Json = {"description": "The answer."}
    if path in ANSWERS:
        answer["content"] = _json(ANSWERS[path])
    elif path in _STREAMED:
        answer["content"] = {"application/json": {"schema": {"type": "object"}}}
    if path in _STREAMED:
        answer["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        headers[CACHE_HEADER] = (
            "Where the prompt's tokens came from, as in hit=512;pool=512;miss=2. Streams: a comment."
        )
    answer["headers"] = {
        name: {"description": text, "schema": {"type": "string"}} for name, text in sorted(headers.items())
    }
    return answer


def _json(model: type[BaseModel]) -> Json:
    return {"application/json": {"schema": {"$ref": _PREFIX.format(model=model.__name__)}}}
