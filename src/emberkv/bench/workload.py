"""The script room: who says what, made from a seed before anything is sent."""

import random
from dataclasses import dataclass
from typing import TypedDict

from emberkv.bench.words import text
from emberkv.errors import ConfigError


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Workload:
    """Conversations of ``turns`` questions each, all over one system prompt, ``concurrency`` of them at a time.

    system_tokens, user_tokens: approximate lengths, exact where ``tokens_per_word`` is right for the model.
    answer_tokens: what each answer is limited to.
    nonce: goes into every text, so that runs with different nonces share no prefix beyond the chat template.

    Raises ConfigError naming the field when a value is out of range.
    """

    sessions: int = 8
    turns: int = 4
    concurrency: int = 4
    system_tokens: int = 1000
    user_tokens: int = 50
    answer_tokens: int = 32
    seed: int = 0
    nonce: str = ""
    tokens_per_word: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (
            ("sessions", 1), ("turns", 1), ("concurrency", 1),
            ("system_tokens", 0), ("user_tokens", 1), ("answer_tokens", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.tokens_per_word > 0:
            raise ConfigError(f"tokens_per_word is {self.tokens_per_word}; it must be above 0")

    @property
    def requests(self) -> int:
        return self.sessions * self.turns

    def system_prompt(self) -> str:
        """The text all conversations share; empty when ``system_tokens`` is 0."""
        return self._text("system", self.system_tokens) if self.system_tokens else ""

    def opening(self) -> list[Message]:
        """The messages that every conversation starts with."""
        prompt = self.system_prompt()
        return [{"role": "system", "content": prompt}] if prompt else []

    def question(self, session: int, turn: int) -> Message:
        return {"role": "user", "content": self._text(f"session {session} turn {turn}", self.user_tokens)}

    def _text(self, part: str, tokens: int) -> str:
        rng = random.Random(f"{self.seed}/{self.nonce}/{part}")
        return text(rng, max(1, round(tokens / self.tokens_per_word)))
