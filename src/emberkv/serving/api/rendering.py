"""Renders a checked request to token ids: canonical rules, chat template, tokenizer, and ``cache_control`` marks.

A mark names a prefix to be retained for a while: its blocks are evicted last, but not locked. Anthropic's marks stand
on blocks of the system prompt and of messages, on tools, and on the request itself; on OpenAI requests the same object
is accepted on messages, their text parts and tools. A mark covers the prompt from its beginning through what it is on.
Of several, the one that lasts longest counts, and of these the last, since it covers the others.
"""

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, takewhile
from typing import Any, Generic, TypeVar

from emberkv.engine.request import Constraint
from emberkv.engine.tokenization.tokenizer import OPENINGS, KnownTokens, Tokenizer, common_prefix
from emberkv.errors import RequestError
from emberkv.serving.answers.answer import OutputParsing, openai_call_id
from emberkv.serving.answers.answer_memory import AnswerRecorder, template_message
from emberkv.serving.api.anthropic_schema import PromptRequest
from emberkv.serving.api.conversation import Conversation
from emberkv.serving.api.openai_schema import ChatCompletionRequest
from emberkv.serving.api.splicing import SplicedPrompt, splice_answers
from emberkv.serving.api.validation import Json
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.lifecycle import ServedModel
from emberkv.serving.parsing.events import ParsedMessage
from emberkv.serving.parsing.formats import OutputFormat

Encode = Callable[[Conversation], "array[int]"]
"""The token ids of a conversation's prompt. Raises RequestError for one that the chat template does not take."""

_TRIED = OPENINGS[:4]  # each has the whole conversation rendered and encoded
_LOOK_BACK = 4096  # characters


@dataclass(frozen=True, slots=True)
class NextPrompt:
    """What the prompt of the user's next message begins with. conversation: the one that is being answered."""

    conversation: Conversation
    encode: Encode

    @property
    def beginning(self) -> int:
        """See `Conversation.beginning`."""
        return self.conversation.beginning

    def tokens(self, answer: ParsedMessage) -> "array[int]":
        """The token ids up to where the text of the user's next message begins, whatever that is.

        answer: what the model has answered to ``conversation``, without tool calls. Raises what ``encode`` raises.
        """
        said = template_message(answer)
        assert said is not None, "it is None for broken calls alone"
        messages = [*self.conversation.messages, said]
        following = ([*messages, {"role": "user", "content": text}] for text in _TRIED)
        prompts = [self.encode(replace(self.conversation, messages=each)) for each in following]
        return array("i", common_prefix(prompts))


def next_prompt(conversation: Conversation, encode: Encode) -> NextPrompt | None:
    """None for a conversation that hardly goes on: one without tools and earlier answers, such as a request for a
    title; and for one whose answer the client has begun.
    """
    is_begun = conversation.begun or conversation.continue_final_message or not conversation.add_generation_prompt
    return NextPrompt(conversation, encode) if conversation.goes_on and not is_begun else None


FIELD = "cache_control"
LIFETIMES = {"5m": 300.0, "1h": 3600.0}

Request = TypeVar("Request", PromptRequest, ChatCompletionRequest)


@dataclass(frozen=True, slots=True)
class Mark(Generic[Request]):
    """seconds: how long to keep it. cut: the request as far as the mark covers it."""

    seconds: float
    cut: Request


def anthropic_mark(request: PromptRequest) -> Mark[PromptRequest] | None:
    """The mark that counts; None without one. Raises RequestError for one that cannot be used."""
    return _lasting_longest(_anthropic_marks(request))


def chat_mark(request: ChatCompletionRequest) -> Mark[ChatCompletionRequest] | None:
    """As `anthropic_mark`."""
    return _lasting_longest(_chat_marks(request))


def covered_tokens(
    tokenizer: Tokenizer, text: str, token_ids: Sequence[int], cut_text: str, known: Sequence[KnownTokens] = ()
) -> int:
    """How many of a prompt's tokens lie within what it has in common with its cut form, both rendered.

    known: the parts of ``text`` that were not encoded.
    """
    shorter = min(len(text), len(cut_text))
    length = bisect_left(range(shorter), True, key=lambda at: text[: at + 1] != cut_text[: at + 1])
    start, before = _near_end(tokenizer, text, token_ids, length, known)
    within = _behind(start, [each for each in known if each.end <= length])
    common = tokenizer.encode(text[start:length], add_special_tokens=False, known=within)
    rest = islice(token_ids, before, None)
    pairs = zip(common, rest, strict=False)
    most = min(len(common), len(token_ids) - before)
    return before + next((at for at, (one, other) in enumerate(pairs) if one != other), most)


def _near_end(
    tokenizer: Tokenizer, text: str, token_ids: Sequence[int], length: int, known: Sequence[KnownTokens]
) -> tuple[int, int]:
    """Where a special token begins in ``text`` just before character ``length``, and how many tokens come before it.

    That is counted from the end, so that the beginning of a long prompt is not encoded again: 0 and 0 where the end is
    the longer part, or no special token begins near.
    """
    first = max(0, length - _LOOK_BACK)
    near = [each for each in known if each.end > first]
    cuts = takewhile(lambda at: at <= length, tokenizer.cuts(text, first))
    outside = [at for at in cuts if not any(each.start < at < each.end for each in near)]
    if not outside or outside[-1] < len(text) // 2:
        return 0, 0
    start = outside[-1]
    behind = tokenizer.encode(text[start:], add_special_tokens=False, known=_behind(start, known))
    before = len(token_ids) - len(behind)
    return (start, before) if before >= 0 and list(token_ids[before:]) == list(behind) else (0, 0)


def _behind(start: int, known: Sequence[KnownTokens]) -> list[KnownTokens]:
    """Those behind character ``start``, of the text from there on."""
    return [KnownTokens(each.start - start, each.end - start, each.token_ids) for each in known if each.start >= start]


Candidate = tuple[float, Callable[[], Request]]
"""A mark's seconds, and what makes its cut. Only the cut of the mark that counts is made: each is a copy."""


def _lasting_longest(marks: Iterator[Candidate[Request]]) -> Mark[Request] | None:
    best = None
    for mark in marks:
        if best is None or mark[0] >= best[0]:
            best = mark
    return None if best is None else Mark(best[0], best[1]())


def _anthropic_marks(request: PromptRequest) -> Iterator[Candidate[PromptRequest]]:
    if seconds := _seconds({FIELD: request.cache_control}, ""):
        yield seconds, lambda: request  # of the request itself: all of it is covered
    anyone = [{"role": "user", "content": ""}]  # templates want a message behind the system prompt
    for index, tool in enumerate(request.tools or ()):
        if seconds := _seconds(tool, f"tools.{index}"):
            yield seconds, partial(_with_beginning, request, "tools", index, messages=anyone, tool_choice=None)
    if isinstance(request.system, list):
        for index, block in enumerate(request.system):
            if seconds := _seconds(block, f"system.{index}"):
                yield seconds, partial(_with_beginning, request, "system", index, messages=anyone)
    yield from _message_marks(request, request.messages, "messages.{}", ".content.{}")


def _chat_marks(request: ChatCompletionRequest) -> Iterator[Candidate[ChatCompletionRequest]]:
    for index, tool in enumerate(request.tools or ()):
        if seconds := _seconds(tool, f"tools[{index}]"):
            yield seconds, partial(_with_beginning, request, "tools", index)
    yield from _message_marks(request, request.messages, "messages[{}]", ".content[{}]")


def _message_marks(
    request: Request, messages: list[Json], message_place: str, part_place: str
) -> Iterator[Candidate[Request]]:
    for index, message in enumerate(messages):
        place = message_place.format(index)
        content = message.get("content")
        for part, each in enumerate(content if isinstance(content, list) else ()):
            if seconds := _seconds(each, place + part_place.format(part)):
                yield seconds, partial(_to_part, request, index, part)
        if seconds := _seconds(message, place):
            yield seconds, partial(_with_beginning, request, "messages", index)


def _with_beginning(request: Request, field: str, index: int, **changes: Any) -> Request:
    """The request with ``field``, a list, up to ``index``."""
    return request.model_copy(update={field: getattr(request, field)[: index + 1], **changes})


def _to_part(request: Request, index: int, part: int) -> Request:
    """The request with its messages up to ``part`` of the content of message ``index``."""
    message = request.messages[index]
    last = {**message, "content": message["content"][: part + 1]}
    return request.model_copy(update={"messages": [*request.messages[:index], last]})


def _seconds(marked: object, place: str) -> float:
    """How long something is to be kept; 0 where it bears no mark."""
    control = marked.get(FIELD) if isinstance(marked, dict) else None
    if control is None:
        return 0.0
    at = f"{place}.{FIELD}" if place else FIELD
    if not isinstance(control, dict) or control.get("type") != "ephemeral":
        raise RequestError(f"{at} is {control!r}; it must be an object with type 'ephemeral'", param=at)
    lifetime = control.get("ttl", "5m")
    if not isinstance(lifetime, str) or lifetime not in LIFETIMES:
        raise RequestError(f"{at}.ttl is {lifetime!r}; it must be '5m' or '1h'", param=f"{at}.ttl")
    return LIFETIMES[lifetime]


AnyPromptRequest = TypeVar("AnyPromptRequest", bound=PromptRequest)

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


def canonical_messages(request: AnyPromptRequest, rules: CanonicalRules | None) -> tuple[AnyPromptRequest, Applied]:
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
    """canonical: what the rules changed. retain_tokens: how many from the first are to be kept for retain_seconds.
    conversation, text: of a chat, what was rendered and to what; None and "" of token ids or plain text. history: how
    many answers in the conversation had each outcome of `splice_answers`. recorder: remembers the answer to the prompt.
    next_prompt: what the prompt of the user's next message begins with; None where no such message is expected.
    borders: behind how many tokens other prompts are expected to part from it, where a hit ends at checkpoints.
    """

    token_ids: Sequence[int]
    canonical: Applied = field(default_factory=dict)
    retain_tokens: int = 0
    retain_seconds: float = 0.0
    conversation: Conversation | None = None
    text: str = ""
    history: Mapping[str, int] = field(default_factory=dict)
    recorder: AnswerRecorder | None = None
    next_prompt: NextPrompt | None = None
    borders: tuple[int, ...] = ()

    @property
    def left_out(self) -> Mapping[str, int]:
        """What of the request is not in the prompt; see `Conversation`."""
        return {} if self.conversation is None else self.conversation.left_out

    @property
    def session(self) -> str:
        """What the session is called where the client does not name it: all turns of a conversation have the same, and
        a request that is not expected to go on has "".
        """
        if self.conversation is None or not self.conversation.goes_on:
            return ""
        return f"inferred-{self.conversation.beginning % 2**64:016x}"

    def constraint(self, output_format: OutputFormat, wanted: Constraint | None = None) -> Constraint | None:
        """Which answers are allowed: `Conversation.constraint`."""
        if self.conversation is None:
            return wanted
        return self.conversation.constraint(output_format, self.text, wanted)

    def parsing(
        self, output_format: OutputFormat, new_call_id: Callable[[], str] = openai_call_id
    ) -> OutputParsing | None:
        """How the answer is to be parsed: `Conversation.parsing`."""
        if self.conversation is None:
            return None
        return self.conversation.parsing(output_format, self.text, new_call_id)

    @property
    def system_text(self) -> str:
        return "" if self.conversation is None else self.conversation.system_text


def render_messages(
    request: PromptRequest,
    model: ServedModel,
    rules: CanonicalRules | None,
    max_tokens: int | None = None,
    *,
    finds_borders: bool = False,
) -> RenderedPrompt:
    """An Anthropic request's prompt. Raises RequestError for what cannot be used, or has more than ``max_tokens``.

    model: as the request's tenant sees it; earlier answers that it remembers are put in as they were sampled.
    finds_borders: as for a prompt that is computed, where the model takes them; each is one more rendering.
    """
    request, canonical = canonical_messages(request, rules)
    rendered, spliced = _rendered(request.conversation(), canonical, anthropic_mark(request), model, max_tokens)
    return _with_borders(rendered, spliced, model) if finds_borders else rendered


def render_chat(
    request: ChatCompletionRequest,
    model: ServedModel,
    rules: CanonicalRules | None,
    max_tokens: int | None = None,
    *,
    finds_borders: bool = False,
) -> RenderedPrompt:
    """An OpenAI chat request's prompt. See `render_messages`."""
    request, canonical = canonical_chat(request, rules)
    if model.answer_memory is not None and request.cache_salt is not None:
        model = replace(model, answer_memory=model.answer_memory.of(request.cache_salt))
    rendered, spliced = _rendered(request.conversation(), canonical, chat_mark(request), model, max_tokens)
    return _with_borders(rendered, spliced, model) if finds_borders else rendered


def _rendered(
    conversation: Conversation,
    canonical: Applied,
    mark: Mark[PromptRequest] | Mark[ChatCompletionRequest] | None,
    model: ServedModel,
    max_tokens: int | None,
) -> tuple[RenderedPrompt, SplicedPrompt]:
    conversation = conversation.counting_unread(model.tokenizer)
    spliced = _spliced(conversation, model)
    token_ids = model.tokenizer.encode(
        spliced.text, add_special_tokens=False, max_tokens=max_tokens, known=spliced.known
    )
    memory = model.answer_memory
    rendered = RenderedPrompt(
        token_ids,
        canonical,
        conversation=conversation,
        text=spliced.text,
        history=spliced.outcomes,
        recorder=None if memory is None else spliced.recorder(memory, conversation, model.output_format),
        next_prompt=next_prompt(conversation, partial(_token_ids, model=model)) if model.rewrites_turns else None,
    )
    if mark is None:
        return rendered, spliced
    try:
        cut = _spliced(mark.cut.conversation(), model).text
    except RequestError:  # a template may refuse half a conversation; a hint about eviction is no reason to refuse all
        return rendered, spliced
    covered = covered_tokens(model.tokenizer, spliced.text, token_ids, cut, spliced.known)
    return replace(rendered, retain_tokens=covered, retain_seconds=mark.seconds), spliced


_ANY_TEXT = "\ue000"
"""Stands for a text that is not known yet; it is for private use, and hardly any text begins with it."""


def _with_borders(rendered: RenderedPrompt, spliced: SplicedPrompt, model: ServedModel) -> RenderedPrompt:
    """Behind the system prompt with the tools, where other conversations part, and, where the template renders earlier
    turns anew, behind all that this turn's prompt and that of the user's next message have in common.
    """
    conversation, token_ids = rendered.conversation, rendered.token_ids
    if conversation is None or not model.takes_borders:
        return rendered
    anyone = {"role": "user", "content": _ANY_TEXT}
    leading = list(takewhile(lambda message: message["role"] in _SYSTEM_ROLES, conversation.messages))
    cuts = []
    if leading or conversation.tools:
        cuts.append([*leading, anyone])
    if model.rewrites_turns:
        cuts.append([*conversation.messages, {"role": "assistant", "content": _ANY_TEXT}, anyone])
    found = set()
    for messages in cuts:
        cut = replace(
            conversation, messages=messages, begun="", add_generation_prompt=True, continue_final_message=False
        )
        try:
            text = _spliced(cut, model).text
        except RequestError:  # the template refuses such a conversation, so no client can send it
            continue
        found.add(covered_tokens(model.tokenizer, spliced.text, token_ids, text, spliced.known))
    return replace(rendered, borders=tuple(sorted(found)))


def _token_ids(conversation: Conversation, model: ServedModel) -> "array[int]":
    spliced = _spliced(conversation, model)
    return model.tokenizer.encode(spliced.text, add_special_tokens=False, known=spliced.known)


def _spliced(conversation: Conversation, model: ServedModel) -> SplicedPrompt:
    """The prompt's text, with earlier answers as they were sampled where the model remembers them."""
    text = conversation.prompt_text(model.tokenizer)
    if model.answer_memory is None:
        return SplicedPrompt(text, b"")
    return splice_answers(conversation, text, model.tokenizer, model.output_format, model.answer_memory)
