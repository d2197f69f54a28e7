"""Remembers the token ids of answers, so that the next prompt of a conversation can have them as they were sampled."""

import json
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from emberkv.core.hashing import token_array
from emberkv.serving.parsing.events import ParsedMessage

Message = Mapping[str, Any]

MAX_ANSWERS = 20_000
MAX_BYTES = 64 << 20
_MOST_ALIKE = 8
"""Answers that are remembered under one key: the same words to the same question, in different conversations."""

_OVERHEAD = 1000  # bytes of an entry's objects, measured roughly


def text_digest(text: str) -> bytes:
    return sha256(text.encode(errors="surrogatepass")).digest()


@dataclass(slots=True)
class RememberedAnswer:
    """An answer as it was sampled, and the prompt that it was an answer to.

    message: in the form of chat templates. text: as the model wrote it. prompt_chars, prompt_digest: the length of the
    prompt's text and its `text_digest`. in_reasoning: whether the prompt ended within a thought. rendered: what a chat
    template made of the message when it was last put into a prompt; None before.
    """

    message: Message
    text: str
    token_ids: "array[int]"
    prompt_chars: int
    prompt_digest: bytes
    in_reasoning: bool = False
    rendered: str | None = None

    @property
    def size(self) -> int:
        """Approximate bytes. The message and what is rendered of it are about as long as the text."""
        return _OVERHEAD + 4 * sys.getsizeof(self.text) + self.token_ids.itemsize * len(self.token_ids)


def template_message(message: ParsedMessage) -> Message | None:
    """An answer in the form of chat templates; None if a call's arguments are not a whole JSON object."""
    calls = []
    for call in message.calls:
        try:
            arguments = json.loads(call.arguments) if call.is_complete else None
        except (ValueError, RecursionError):  # too deep, or with a number that Python does not read
            return None
        if not isinstance(arguments, dict):
            return None
        function = {"name": call.name, "arguments": arguments}
        calls.append({"id": call.call_id, "type": "function", "function": function})
    answer: dict[str, Any] = {"role": "assistant", "content": message.content}
    if message.reasoning:
        answer["reasoning_content"] = message.reasoning
    if calls:
        answer["tool_calls"] = calls
    return answer


def message_key(message: Message, before: Message) -> bytes:
    """What an answer is found by: the ids of its calls, or without calls its trimmed text; and the message before it.

    Thus a message with other arguments or another text beside its calls is found, too: it has to be compared.
    """
    calls = message.get("tool_calls") or ()
    named = repr([call.get("id") or call["function"]["name"] for call in calls])
    digest = sha256(named.encode(errors="surrogatepass"))
    for text in ("" if calls else str(message.get("content") or "").strip(), str(before.get("content"))):
        digest.update(text_digest(text))
    return digest.digest()


class AnswerMemory:
    """Answers by `message_key`, for one owner, which never gets another's. Thread-safe.

    All owners together have at most ``max_answers`` and ``max_bytes``; what exceeds them is taken from the owner with
    the most bytes, the least recently used first. ::

        memory = AnswerMemory().of("tenant")
    """

    def __init__(self, *, max_answers: int = MAX_ANSWERS, max_bytes: int = MAX_BYTES) -> None:
        self._store = _Store(max_answers, max_bytes)
        self._owner: tuple[str, ...] = ()

    def of(self, owner: str) -> "AnswerMemory":
        """The same memory for an owner within this one: a tenant, or what a tenant separates by ``cache_salt``."""
        memory = copy(self)
        memory._owner = (*self._owner, owner)
        return memory

    def size(self) -> tuple[int, int]:
        """How many answers there are, and their approximate bytes, of all owners together."""
        return self._store.answers, self._store.bytes_used

    def add(self, answer: RememberedAnswer, before: Message) -> None:
        """Remember an answer. before: the message that it answers."""
        self._store.add(self._owner, message_key(answer.message, before), answer)

    def find(self, message: Message, before: Message) -> Sequence[RememberedAnswer]:
        """The answers that ``message``, as a client sent it, may be; the newest first."""
        return self._store.find(self._owner, message_key(message, before))


@dataclass(slots=True)
class _TenantAnswers:
    """One tenant's answers, by owner and key, the least recently used first."""

    answers: "OrderedDict[tuple[tuple[str, ...], bytes], list[RememberedAnswer]]" = field(default_factory=OrderedDict)
    bytes_used: int = 0


class _Store:
    def __init__(self, max_answers: int, max_bytes: int) -> None:
        self._max_answers = max_answers
        self._max_bytes = max_bytes
        self._tenants: dict[str, _TenantAnswers] = {}
        self._lock = threading.Lock()
        self.answers = 0
        self.bytes_used = 0

    def add(self, owner: tuple[str, ...], key: bytes, answer: RememberedAnswer) -> None:
        if answer.size > self._max_bytes:
            return
        with self._lock:
            held = self._tenants.setdefault(owner[0] if owner else "", _TenantAnswers())
            alike = held.answers.setdefault((owner, key), [])
            held.answers.move_to_end((owner, key))
            alike.insert(0, answer)
            self._count(held, 1, answer.size)
            for forgotten in alike[_MOST_ALIKE:]:
                self._count(held, -1, -forgotten.size)
            del alike[_MOST_ALIKE:]
            while self.answers > self._max_answers or self.bytes_used > self._max_bytes:
                self._forget_oldest()

    def find(self, owner: tuple[str, ...], key: bytes) -> Sequence[RememberedAnswer]:
        with self._lock:
            held = self._tenants.get(owner[0] if owner else "")
            if held is None or (owner, key) not in held.answers:
                return ()
            held.answers.move_to_end((owner, key))
            return tuple(held.answers[owner, key])

    def _forget_oldest(self) -> None:
        tenant, held = max(self._tenants.items(), key=lambda each: each[1].bytes_used)
        _, forgotten = held.answers.popitem(last=False)
        self._count(held, -len(forgotten), -sum(each.size for each in forgotten))
        if not held.answers:
            del self._tenants[tenant]

    def _count(self, held: _TenantAnswers, answers: int, size: int) -> None:
        self.answers += answers
        self.bytes_used += size
        held.bytes_used += size


@dataclass(frozen=True, slots=True)
class AnswerRecorder:
    """Remembers the answer to one prompt, once it has ended.

    before: the prompt's last message. prompt: its text.
    """

    memory: AnswerMemory
    before: Message
    prompt_chars: int
    prompt_digest: bytes
    in_reasoning: bool

    def record(self, message: ParsedMessage, text: str, token_ids: Sequence[int]) -> None:
        """Remember a whole answer, unless it is empty, or cut off within a call's arguments or a thought."""
        answer = template_message(message)
        is_thought_alone = bool(message.reasoning) and not (message.content or message.calls)
        if answer is not None and token_ids and not is_thought_alone:
            self.memory.add(
                RememberedAnswer(
                    answer, text, token_array(token_ids), self.prompt_chars, self.prompt_digest, self.in_reasoning
                ),
                self.before,
            )
