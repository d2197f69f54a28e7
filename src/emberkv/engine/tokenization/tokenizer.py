"""Text to token ids and back."""

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class IncrementalDetokenizer(Protocol):
    """Turns a growing answer into text pieces that are always whole characters."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is now certain, possibly empty; never half a character."""
        ...

    def flush(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD."""
        ...


class Tokenizer(Protocol):
    """What serving needs of a tokenizer."""

    @property
    def cache_bytes(self) -> int:
        """Memory that remembered encodings take, of all owners together."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool, max_tokens: int | None = None) -> "array[int]":
        """The text's token ids, as the core takes them (`token_array`).

        Raises PromptTooLongError for a text that is found to have more than ``max_tokens``.
        """
        ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation, by the model's chat template.

        It ends where the answer begins; without ``add_generation_prompt`` behind the last message, and with
        ``continue_final_message`` within that, to be gone on with. variables: further ones for the template.

        Raises RequestError when the model has no template or the template rejects the messages.
        """
        ...

    def token_text(self, token_id: int) -> str:
        """One token's own text, for logprobs; bytes that are no whole character show as U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """One token's own bytes, which need not be whole characters."""
        ...

    def detokenizer(self) -> IncrementalDetokenizer: ...

    @property
    def description(self) -> Mapping[str, Any]:
        """Its class, its special tokens by name ("eos_token"), and its ``chat_template``."""
        ...

    def remembering_for(self, owner: str) -> "Tokenizer":
        """The same tokenizer, for whom what others have encoded makes nothing faster."""
        ...
