"""Puts what the model really sampled into the next prompt, where a client sends an answer back in other words.

Clients send an answer's message back, not its tokens: with keys in another order, ``10`` for ``10.0``, trimmed text, or
arguments that they have added by default. Rendered again, it has other tokens than the cached ones, and encoding the
same text may give other tokens, too. So the prompt's text and token ids are taken from the `AnswerMemory` where

- the message means the same as what was sampled (`difference`),
- all text before it is the prompt that the answer was sampled for, to the last character,
- the chat template renders the message there, with its thoughts and calls, and a special token behind it.

Anything else is rendered as it was sent, and counted by the reason.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice, pairwise
from typing import Any

from emberkv.engine.tokenization.tokenizer import KnownTokens, Tokenizer
from emberkv.serving.answers.answer_memory import AnswerMemory, AnswerRecorder, Message, RememberedAnswer
from emberkv.serving.api.conversation import Conversation
from emberkv.serving.parsing.formats import OutputFormat, parse_output

SAME, REWRITTEN = "same_text", "rewritten"
"""Outcomes of an answer that was put in: its text was what the template renders, or another one."""
CHANGED = "changed"  # the client has sent another text, value or call
NO_THOUGHTS = "no_thoughts"  # the client has left out the thoughts
OTHER_PROMPT = "other_prompt"  # what comes before it is not what it was sampled for
TEMPLATE = "template"  # the chat template does not render it whole, or no special token follows
UNKNOWN = "unknown"  # it is not remembered
OUTCOMES = (SAME, REWRITTEN, CHANGED, NO_THOUGHTS, OTHER_PROMPT, TEMPLATE, UNKNOWN)
"""What can become of an answer in a prompt's history."""

_MOST_CUTS = 64
_MOST_DEPTH = 100


@dataclass(frozen=True, slots=True)
class SplicedPrompt:
    """A prompt's text with the remembered answers in it, and their token ids.

    digest: the text's `text_digest`. outcomes: how many answers of the history had each outcome.
    """

    text: str
    digest: bytes
    known: Sequence[KnownTokens] = ()
    outcomes: Mapping[str, int] = field(default_factory=dict)

    def recorder(
        self, memory: AnswerMemory, conversation: Conversation, output_format: OutputFormat
    ) -> AnswerRecorder | None:
        """What remembers the answer to this prompt; None for an answer that continues a text of the client's, because
        the client sends both back as one message.
        """
        if conversation.begun or conversation.continue_final_message or not conversation.add_generation_prompt:
            return None
        in_reasoning = output_format.ends_in_reasoning(self.text)
        return AnswerRecorder(memory, conversation.messages[-1], len(self.text), self.digest, in_reasoning)


def splice_answers(
    conversation: Conversation, text: str, tokenizer: Tokenizer, output_format: OutputFormat, memory: AnswerMemory
) -> SplicedPrompt:
    """The conversation's prompt with the remembered answers in place of those that were sent. text: as rendered."""
    splicer = _Splicer(conversation, text, tokenizer, output_format)
    outcomes: Counter[str] = Counter()
    for before, message in pairwise(conversation.messages):
        if message["role"] == "assistant":
            outcomes[splicer.take(message, memory.find(message, before))] += 1
    return splicer.prompt(outcomes)


class _Splicer:
    """Builds the new text from left to right."""

    def __init__(
        self, conversation: Conversation, text: str, tokenizer: Tokenizer, output_format: OutputFormat
    ) -> None:
        self._conversation = conversation
        self._text = text
        self._tokenizer = tokenizer
        self._format = output_format
        self._parts: list[str] = []
        self._done = 0  # characters of the rendered text that are in the new one, or replaced in it
        self._length = 0  # characters of the new text
        self._digest = sha256()
        self._known: list[KnownTokens] = []

    def take(self, message: Message, candidates: Sequence[RememberedAnswer]) -> str:
        """Put in the first of the candidates that can be. Returns its outcome, or the last one's."""
        outcome = UNKNOWN
        for answer in candidates:
            outcome = self._taken(message, answer)
            if outcome in (SAME, REWRITTEN):
                break
        return outcome

    def _taken(self, message: Message, answer: RememberedAnswer) -> str:
        if reason := difference(message, answer.message, self._conversation.tools):
            return reason
        at = answer.prompt_chars - self._length + self._done
        if not self._done <= at <= len(self._text):
            return OTHER_PROMPT
        digest = self._digest.copy()
        digest.update(_bytes(self._text[self._done : at]))
        if digest.digest() != answer.prompt_digest:
            return OTHER_PROMPT
        end = self._end(message, answer, at)
        if end is None:
            return TEMPLATE
        answer.rendered = self._text[at:end]
        self._put(answer, at, end)
        return SAME if answer.rendered == answer.text else REWRITTEN

    def _put(self, answer: RememberedAnswer, at: int, end: int) -> None:
        for part in (self._text[self._done : at], answer.text):
            self._add(part)
        self._known.append(KnownTokens(self._length - len(answer.text), self._length, answer.token_ids))
        self._done = end

    def _add(self, part: str) -> None:
        self._parts.append(part)
        self._length += len(part)
        self._digest.update(_bytes(part))

    def _end(self, message: Message, answer: RememberedAnswer, at: int) -> int | None:
        """Where the message ends that the template has rendered from ``at`` on; None where it is not whole there."""
        text, rendered = self._text, answer.rendered
        if rendered is not None and text.startswith(rendered, at):
            end = at + len(rendered)
            if next(self._tokenizer.cuts(text, end), None) == end:
                return end
        shortest = len(_content(message)) + len(_reasoning(message))
        longest = 6 * (len(answer.text) + shortest) + 4096  # an escaped character is six
        for end in islice(self._tokenizer.cuts(text, at), _MOST_CUTS):
            if end - at > longest:
                return None
            if end - at >= shortest and self._shows(text[at:end], message, answer):
                return end
        return None

    def _shows(self, rendered: str, message: Message, answer: RememberedAnswer) -> bool:
        """Whether a text has the message's thoughts, its text, and calls of its tools."""
        calls = message.get("tool_calls") or ()
        parsed = parse_output(
            self._format, rendered, tools=self._conversation.tools if calls else (), in_reasoning=answer.in_reasoning
        )
        names = [call["function"]["name"] for call in calls]
        return (
            parsed.content.strip() == _content(message)
            and parsed.reasoning.strip() == _reasoning(message)
            and [call.name for call in parsed.calls] == names
        )

    def prompt(self, outcomes: Mapping[str, int]) -> SplicedPrompt:
        """The result, with the rest of the text."""
        self._add(self._text[self._done :])
        return SplicedPrompt("".join(self._parts), self._digest.digest(), self._known, outcomes)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _content(message: Message) -> str:
    return str(message.get("content") or "").strip()


def _reasoning(message: Message) -> str:
    return str(message.get("reasoning_content") or "").strip()


def difference(sent: Message, sampled: Message, tools: Sequence[Mapping[str, Any]]) -> str:
    """Why a message that a client has sent does not mean what was sampled, as an outcome; "" if it does.

    Both mean the same if their texts and thoughts are equal but for white space around them, and their calls in order
    have the same ids, names and arguments, whatever the order of keys and the form of numbers. A call with the same id
    may have further arguments with the default that the tool's schema gives, or that are false, null or empty.

    >>> difference({"role": "assistant", "content": "Yes"}, {"role": "assistant", "content": "Yes\\n"}, ())
    ''
    """
    calls, sampled_calls = sent.get("tool_calls") or (), sampled.get("tool_calls") or ()
    if _content(sent) != _content(sampled) or len(calls) != len(sampled_calls):
        return CHANGED
    if _reasoning(sent) != _reasoning(sampled):
        return CHANGED if _reasoning(sent) else NO_THOUGHTS
    is_same = all(_is_same_call(*both, tools) for both in zip(calls, sampled_calls, strict=True))
    return "" if is_same else CHANGED


def _is_same_call(sent: Message, sampled: Message, tools: Sequence[Mapping[str, Any]]) -> bool:
    given, wanted = sent["function"], sampled["function"]
    if given["name"] != wanted["name"] or sent.get("id") != sampled.get("id"):
        return False
    arguments, has_id = given["arguments"], sampled.get("id") is not None
    if has_id and isinstance(arguments, dict):
        defaults = _defaults(given["name"], tools)
        arguments = {
            name: value
            for name, value in arguments.items()
            if name in wanted["arguments"] or name not in defaults or not _is_same(value, defaults[name])
        }
    return _is_same(arguments, wanted["arguments"], may_add=has_id)


def _defaults(name: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The defaults in the schema of a tool's arguments."""
    for tool in tools:
        function = tool.get("function") or {}
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if function.get("name") == name and isinstance(properties, Mapping):
            each = ((name, schema) for name, schema in properties.items() if isinstance(schema, Mapping))
            return {name: schema["default"] for name, schema in each if "default" in schema}
    return {}


def _is_same(sent: object, sampled: object, *, may_add: bool = False, depth: int = 0) -> bool:
    """Whether two JSON values are equal. may_add: whether objects of the first may have further empty values."""
    if depth > _MOST_DEPTH:
        return False
    match sent, sampled:
        case dict(), dict():
            added = sent.keys() - sampled.keys()
            has_all = sampled.keys() <= sent.keys() and (may_add or not added)
            return (
                has_all
                and all(_is_empty(sent[name]) for name in added)
                and all(_is_same(sent[name], sampled[name], may_add=may_add, depth=depth + 1) for name in sampled)
            )
        case list(), list():
            return len(sent) == len(sampled) and all(
                _is_same(*both, may_add=may_add, depth=depth + 1) for both in zip(sent, sampled, strict=True)
            )
        case (bool(), _) | (_, bool()):
            return sent is sampled
        case (int() | float(), int() | float()):
            return sent == sampled
    return type(sent) is type(sampled) and sent == sampled


def _is_empty(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})
