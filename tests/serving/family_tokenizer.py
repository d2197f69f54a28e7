"""Byte tokens with the chat template of a family of models."""

from collections.abc import Mapping, Sequence
from typing import Any

from tests.serving.fakes import ByteTokenizer
from tests.serving.parsing.families import Family, render


class FamilyTokenizer(ByteTokenizer):
    """A `ByteTokenizer` with a family's chat template."""

    chat_problem: str | None = None

    def __init__(self, family: Family) -> None:
        self.template = family.template

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
