"""Byte tokens with the chat template of a family of models."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emberkv.engine.tokenization.tokenizer import KnownTokens
from tests.serving.fakes import BOS, ByteTokenizer
from tests.serving.parsing.families import Family, render


class FamilyTokenizer(ByteTokenizer):
    """A `ByteTokenizer` with a family's chat template, whose marks of turns can be cut before as special tokens can."""

    chat_problem: str | None = None

    def __init__(self, family: Family) -> None:
        self.template = family.template
        self.marks = {"<|im_start|>", "<|im_end|>", family.end.strip(), family.turn.split("\n")[0]} - {""}
        self._cut = re.compile("|".join(map(re.escape, sorted(self.marks))))

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        max_tokens: int | None = None,
        known: Sequence[KnownTokens] = (),
    ) -> list[int]:
        ids = [BOS] * add_special_tokens
        done = 0
        for each in known:
            ids += [*text[done : each.start].encode(), *each.token_ids]
            done = each.end
        return [*ids, *text[done:].encode()]

    def cuts(self, text: str, start: int) -> Iterator[int]:
        return (match.start() for match in self._cut.finditer(text, start))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        return render(self.template, messages, add_generation_prompt=add_generation_prompt)
