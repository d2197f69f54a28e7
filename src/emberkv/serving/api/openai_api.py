"""The OpenAI API: its routes, and its responses, whole or as a stream of chunks."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Protocol

from fastapi import APIRouter, Depends, Request
from fastapi.params import Depends as Dependency
from fastapi.responses import JSONResponse, Response

from emberkv.core.sequence import FinishReason
from emberkv.engine.request import PrefillProgress, TokenLogprobs
from emberkv.errors import RequestError
from emberkv.serving.answer_service import AnswerService, Prompt, RequestPreparer
from emberkv.serving.answers.answer import Answer, AnswerDelta, PlacedLogprobs, echo_of
from emberkv.serving.answers.answer_stream import AnswerStream, WholeAnswer
from emberkv.serving.api.anthropic_api import anthropic_card
from emberkv.serving.api.openai_schema import (
    DEFAULT_COMPLETION_TOKENS,
    MAX_ECHOED_LOGPROBS,
    ChatCompletionRequest,
    CompletionRequest,
    OpenAIRequest,
)
from emberkv.serving.api.rendering import RenderedPrompt, render_chat
from emberkv.serving.api.validation import parse_body
from emberkv.serving.auth import ApiKeys
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.errors import NotFoundError, failure_mid_stream, openai_error, speaks_anthropic
from emberkv.serving.event_stream import compact_json, ping_comment, sse_event
from emberkv.serving.lifecycle import Lifecycle, ServedModel, answer_budget
from emberkv.serving.parsing.events import (
    CallArguments,
    CallBegin,
    CallEnd,
    ContentText,
    OutputEvent,
    ParsedMessage,
    ReasoningText,
)
from emberkv.serving.request_context import RequestContext
from emberkv.serving.tenancy import Tenant

FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
"""The API's words for how an answer ends; an aborted or failed answer ends with an error instead."""

LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity
DONE = b"data: [DONE]\n\n"


class TokenWriter(Protocol):
    """What of a tokenizer is needed to write single tokens."""

    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class OpenAIWriter(ABC):
    """Writes the answers to one request in the API's wire form.

    choices: answers to each prompt; a prompt's tokens are counted once, with its first answer. include_usage: whether
    the stream ends with a chunk of usage.
    """

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(
        self,
        request_id: str,
        model: str,
        created: int,
        tokens: TokenWriter,
        *,
        choices: int = 1,
        include_usage: bool = False,
    ) -> None:
        self._id = request_id
        self._model = model
        self._created = created
        self._choices = choices
        self._include_usage = include_usage
        self.tokens = tokens
        self._names: dict[int, str] = {}
        head = compact_json(self._envelope(self.chunk_object))
        # a chunk is put together as text, because one is made for every token of every stream
        self._chunk_head = f'data: {head[:-1]},"choices":['
        self._chunk_tail = '],"usage":null}\n\n' if include_usage else "]}\n\n"

    @abstractmethod
    def opening_choice(self, index: int) -> str | None:
        """The JSON of the choice that announces an answer, where the API has one."""

    @abstractmethod
    def delta_choices(self, delta: AnswerDelta, answer: Answer) -> Iterator[str]:
        """The JSON of the only choice of each chunk that the delta of an answer makes."""

    @abstractmethod
    def whole_choice(self, index: int, whole: WholeAnswer) -> dict[str, Any]: ...

    def whole(self, answers: Sequence[WholeAnswer]) -> dict[str, Any]:
        """The response to a request that did not ask for a stream."""
        return {
            **self._envelope(self.whole_object),
            "choices": [self.whole_choice(index, answer) for index, answer in enumerate(answers)],
            "usage": self._usage([answer.answer for answer in answers]),
        }

    async def events(self, stream: AnswerStream) -> AsyncGenerator[bytes, None]:
        """The whole stream of events. A failure becomes an error event; [DONE] comes last in any case."""
        try:
            for answer in stream.answers:
                opening = self.opening_choice(answer.index)
                if opening is not None:
                    yield self._chunk(opening)
            answers = stream.answers
            async for delta in stream:
                for choice in self.delta_choices(delta, answers[delta.index]):
                    yield self._chunk(choice)
            if self._include_usage:
                envelope = self._envelope(self.chunk_object)
                yield sse_event({**envelope, "choices": [], "usage": self._usage(stream.answers)})
        except Exception as error:  # noqa: BLE001 - the answer has begun: the client can only learn of it by an event
            yield sse_event(openai_error(failure_mid_stream(error)))
        yield DONE

    def ping(self, progress: PrefillProgress | None) -> bytes:
        """A comment, as the API has no event for it."""
        return ping_comment(progress)

    def _chunk(self, choice: str) -> bytes:
        return f"{self._chunk_head}{choice}{self._chunk_tail}".encode()

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        first_of_each = answers[:: self._choices]
        prompt = sum(answer.usage.prompt_tokens for answer in first_of_each)
        completion = sum(answer.completion_tokens for answer in answers)
        cached = sum(answer.usage.cached_tokens for answer in first_of_each)
        reasoning = sum(answer.reasoning_tokens for answer in answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }


def finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST_LOGPROB)


def finish_name(reason: FinishReason | None) -> str | None:
    return None if reason is None else FINISH_REASONS[reason]


def finish_json(reason: FinishReason | None) -> str:
    return "null" if reason is None else f'"{FINISH_REASONS[reason]}"'


class ChatWriter(OpenAIWriter):
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    finish_with_calls: ClassVar[str] = "tool_calls"

    def opening_choice(self, index: int) -> str:
        delta = '"delta":{"role":"assistant","content":""}'
        return f'{{"index":{index},{delta},"logprobs":null,"finish_reason":null}}'

    def delta_choices(self, delta: AnswerDelta, answer: Answer) -> Iterator[str]:
        pieces = [self.piece(event) for event in delta.events]
        deltas = [piece for piece in pieces if piece] or ["{}"]
        logprobs = compact_json(self._logprobs(delta.logprobs)) if delta.logprobs else "null"
        finish = "null" if delta.finish_reason is None else f'"{self._finish(answer)}"'
        for position, each in enumerate(deltas, 1):
            end = finish if position == len(deltas) else "null"
            yield f'{{"index":{delta.index},"delta":{each},"logprobs":{logprobs},"finish_reason":{end}}}'
            logprobs = "null"

    def whole_choice(self, index: int, whole: WholeAnswer) -> dict[str, Any]:
        return {
            "index": index,
            "message": self.message(whole.message),
            "logprobs": self._logprobs(whole.logprobs) if whole.logprobs else None,
            "finish_reason": self._finish(whole.answer),
        }

    def message(self, message: ParsedMessage) -> dict[str, Any]:
        """An answer as a message. Its content is null where it has nothing but calls."""
        written: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None}
        if message.reasoning:
            written["reasoning_content"] = message.reasoning
        if message.calls:
            written["content"] = message.content or None
            written["tool_calls"] = [
                {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.calls
            ]
        return written

    def piece(self, event: OutputEvent) -> str | None:
        """What one event adds to the message, as JSON. It is put together as text, for speed."""
        match event:
            case ContentText(text):
                return f'{{"content":{compact_json(text)}}}'
            case ReasoningText(text):
                return f'{{"reasoning_content":{compact_json(text)}}}'
            case CallBegin(index, name, call_id):
                begun = {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
                return compact_json({"tool_calls": [{"index": index, **begun}]})
            case CallArguments(index, text):
                return f'{{"tool_calls":[{{"index":{index},"function":{{"arguments":{compact_json(text)}}}}}]}}'
            case CallEnd():
                return None

    def _finish(self, answer: Answer) -> str | None:
        """The ``finish_reason``, not "tool_calls" if ``max_tokens`` or a stop string has cut off the last call."""
        has_calls = answer.finish_reason is FinishReason.STOP and answer.calls and not answer.is_cut_in_call
        return self.finish_with_calls if has_calls else finish_name(answer.finish_reason)

    def _logprobs(self, entries: Sequence[PlacedLogprobs]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._token(entry.token.token_id, entry.token.logprob),
                    "top_logprobs": [self._token(*alternative) for alternative in entry.token.top],
                }
                for entry in entries
            ]
        }

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self.tokens.token_text(token_id),
            "logprob": finite(logprob),
            "bytes": list(self.tokens.token_bytes(token_id)),
        }


class FunctionCallWriter(ChatWriter):
    """Writes answers to requests in the former form, with ``functions``: an answer has one call at most."""

    finish_with_calls = "function_call"

    def message(self, message: ParsedMessage) -> dict[str, Any]:
        written = super().message(message)
        for call in written.pop("tool_calls", ()):
            written["function_call"] = call["function"]
        return written

    def piece(self, event: OutputEvent) -> str | None:
        match event:
            case CallBegin(_, name, _):
                return compact_json({"function_call": {"name": name, "arguments": ""}})
            case CallArguments(_, text):
                return compact_json({"function_call": {"arguments": text}})
        return super().piece(event)


class CompletionWriter(OpenAIWriter):
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def opening_choice(self, index: int) -> None:
        return None

    def delta_choices(self, delta: AnswerDelta, answer: Answer) -> Iterator[str]:
        logprobs = compact_json(self._logprobs(delta.logprobs)) if delta.logprobs else "null"
        yield (
            f'{{"index":{delta.index},"text":{compact_json(delta.text)},"logprobs":{logprobs},'
            f'"finish_reason":{finish_json(delta.finish_reason)}}}'
        )

    def whole_choice(self, index: int, whole: WholeAnswer) -> dict[str, Any]:
        return {
            "index": index,
            "text": whole.text,
            "logprobs": self._logprobs(whole.logprobs) if whole.logprobs else None,
            "finish_reason": finish_name(whole.answer.finish_reason),
        }

    def _logprobs(self, entries: Sequence[PlacedLogprobs]) -> dict[str, Any]:
        return {
            "tokens": [self._name(entry.token.token_id) for entry in entries],
            "token_logprobs": [finite(entry.token.logprob) for entry in entries],
            "top_logprobs": [self._alternatives(entry.token) for entry in entries],
            "text_offset": [entry.start for entry in entries],
        }

    def _alternatives(self, token: TokenLogprobs) -> dict[str, float] | None:
        """The likeliest tokens by name, and the chosen one, where the request wants alternatives.

        Of tokens with the same text, the chosen one has it as its name, or else the likeliest.
        """
        if token.logprob is None:
            return None
        named: dict[str, float] = {}
        chosen = self._name(token.token_id)
        for token_id, logprob in token.top:
            name = self._name(token_id)
            if name in named or (name == chosen and token_id != token.token_id):
                name = f"token_id:{token_id}"
            named[name] = max(logprob, LOWEST_LOGPROB)
        return {**named, chosen: max(token.logprob, LOWEST_LOGPROB)} if token.top else named

    def _name(self, token_id: int) -> str:
        if token_id not in self._names:
            self._names[token_id] = self._spelled(token_id)
        return self._names[token_id]

    def _spelled(self, token_id: int) -> str:
        """A token's text, or its bytes as ``bytes:\\xe2\\x80``, where these are no whole characters."""
        spelled = self.tokens.token_bytes(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def prepare_chat(
    body: bytes, model: ServedModel, rules: CanonicalRules | None
) -> tuple[ChatCompletionRequest, list[Prompt], RenderedPrompt]:
    """Check, render and tokenize a chat request. Without max_tokens, an answer may fill the context.

    Raises RequestError.
    """
    request = parse_body(ChatCompletionRequest, body)
    model.check_name(request.model)
    request.check()
    logprobs = request.wanted_logprobs
    rendered = render_chat(request, model, rules, model.engine.max_prompt_tokens, finds_borders=True)
    constraint = rendered.constraint(model.output_format, request.constraint())
    field, wanted = request.wanted_tokens
    budget = answer_budget(model, len(rendered.token_ids), wanted, field=field)
    choices = request.sampling(
        model.sampling_defaults, max_tokens=budget.tokens, logprobs=logprobs, constraint=constraint
    )
    prompts = [
        Prompt(
            rendered.token_ids,
            each,
            rendered.retain_tokens,
            rendered.retain_seconds,
            is_clipped=budget.is_clipped,
            parsing=rendered.parsing(model.output_format),
            system=rendered.system_text,
            history=rendered.history,
            recorder=rendered.recorder,
            next_prompt=rendered.next_prompt,
            borders=rendered.borders,
        )
        for each in choices
    ]
    return request, prompts, rendered


def prepare_completion(body: bytes, model: ServedModel) -> tuple[CompletionRequest, list[Prompt]]:
    """Check and tokenize a completion request. Raises RequestError."""
    request = parse_body(CompletionRequest, body)
    model.check_name(request.model)
    request.check()
    constraint = request.constraint()
    prompts = []
    for given in request.prompts():
        token_ids = _completion_tokens(given, model)
        budget = answer_budget(model, len(token_ids), request.max_tokens)
        most = budget.tokens if request.max_tokens is not None else min(budget.tokens, DEFAULT_COMPLETION_TOKENS)
        wants_no_tokens = request.max_tokens == 0
        choices = request.sampling(
            model.sampling_defaults,
            max_tokens=1 if wants_no_tokens else most,
            logprobs=request.logprobs,
            prompt_logprobs=request.logprobs if request.echo else None,
            constraint=constraint,
        )
        echo = echo_of(given, token_ids, model.tokenizer) if request.echo else None
        prompts += [
            Prompt(token_ids, params, wants_no_tokens=wants_no_tokens, echo=echo, is_clipped=budget.is_clipped)
            for params in choices
        ]
    _check_echoed_logprobs(request, prompts)
    return request, prompts


def _check_echoed_logprobs(request: CompletionRequest, prompts: list[Prompt]) -> None:
    if not request.echo or request.logprobs is None:
        return
    entries = sum(len(prompt.token_ids) for prompt in prompts) * (request.logprobs + 1)
    if entries > MAX_ECHOED_LOGPROBS:
        raise RequestError(
            f"echo with logprobs asks for {entries} log-probabilities of prompt tokens; at most {MAX_ECHOED_LOGPROBS} "
            "are given at once: send fewer prompts, shorter ones, or smaller logprobs",
            param="logprobs",
        )


def _completion_tokens(given: str | list[int], model: ServedModel) -> Sequence[int]:
    if not isinstance(given, str):
        return given
    return model.tokenizer.encode(given, add_special_tokens=True, max_tokens=model.engine.max_prompt_tokens)


def openai_router(lifecycle: Lifecycle, keys: ApiKeys, preparer: RequestPreparer, answers: AnswerService) -> APIRouter:
    """The routes, open to requests with one of ``keys``."""
    router = APIRouter()
    guard = Depends(keys.tenant)

    def writer_arguments(request: OpenAIRequest, context: RequestContext) -> dict[str, Any]:
        model = lifecycle.model()
        return {
            "request_id": context.request_id,
            "model": request.model,
            "created": context.created,
            "tokens": model.tokenizer,
            "choices": request.choices,
            "include_usage": request.include_usage,
        }

    @router.post("/v1/chat/completions")
    async def chat_completions(http: Request, tenant: Annotated[Tenant, guard]) -> Response:
        work = partial(prepare_chat, rules=preparer.rules)
        request, prompts, rendered = await preparer.prepare(work, await http.body(), tenant)
        salted = tenant.salted(request.cache_salt)
        context = answers.request(
            http,
            "chat_completions",
            salted,
            rendered.canonical,
            user_id=request.session,
            inferred_session=rendered.session,
            left_out=rendered.left_out,
        )
        stream = answers.start(prompts, context)
        kind = FunctionCallWriter if request.wants_function_call else ChatWriter
        writer = kind(**writer_arguments(request, context))
        return await answers.respond(http, stream, writer, as_events=bool(request.stream))

    @router.post("/v1/completions")
    async def completions(http: Request, tenant: Annotated[Tenant, guard]) -> Response:
        request, prompts = await preparer.prepare(prepare_completion, await http.body(), tenant)
        left_out: Counter[str] = Counter()
        request.count_unknown(left_out)
        salted = tenant.salted(request.cache_salt)
        context = answers.request(http, "completions", salted, user_id=request.session, left_out=left_out)
        stream = answers.start(prompts, context)
        writer = CompletionWriter(**writer_arguments(request, context))
        return await answers.respond(http, stream, writer, as_events=bool(request.stream))

    _add_other_routes(router, lifecycle, guard)
    return router


def _add_other_routes(router: APIRouter, lifecycle: Lifecycle, guard: Dependency) -> None:
    """The models, and embeddings, which are refused."""

    @router.post("/v1/embeddings", dependencies=[guard], include_in_schema=False)
    async def embeddings() -> Response:
        raise NotFoundError("embeddings are not supported; send them to a server of an embedding model")

    @router.get("/v1/models", dependencies=[guard])
    async def models(http: Request) -> Response:
        model = lifecycle.model()
        if speaks_anthropic(http):
            cards = [anthropic_card(model, name) for name in model.names]
            return JSONResponse(
                {"data": cards, "has_more": False, "first_id": model.names[0], "last_id": model.names[-1]}
            )
        return JSONResponse({"object": "list", "data": [openai_card(model, name) for name in model.names]})

    @router.get("/v1/models/{name:path}", dependencies=[guard])
    async def model_card(name: str, http: Request) -> Response:
        model = lifecycle.model()
        model.check_name(name)
        return JSONResponse((anthropic_card if speaks_anthropic(http) else openai_card)(model, name))


def openai_card(model: ServedModel, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "emberkv",
        "max_model_len": model.engine.context_length,
    }
