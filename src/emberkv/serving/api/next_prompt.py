"""The beginning of a conversation's next prompt, which is known before the user has written the next message."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from emberkv.engine.tokenization.tokenizer import Tokenizer, common_prefix
from emberkv.serving.api.conversation import Conversation
from emberkv.serving.parsing.events import ParsedMessage

_OPENINGS = ("Hello", "\nleading line", " leading space", "1 and 2")
"""User messages whose beginnings differ in kind, because a first character may melt into the token before it."""


@dataclass(frozen=True, slots=True)
class NextPrompt:
    """Renders what the prompt of the next user message begins with. conversation: the one that is being answered."""

    conversation: Conversation

    @property
    def beginning(self) -> int:
        """A hash of the conversation's messages up to the first answer, which its later turns have, too."""
        first = takewhile(lambda message: message["role"] != "assistant", self.conversation.messages)
        return hash(tuple((message["role"], str(message.get("content"))) for message in first))

    def tokens(self, answer: ParsedMessage, tokenizer: Tokenizer) -> "array[int]":
        """The token ids up to where the text of the user's next message begins, whatever that is.

        answer: what the model has answered to ``conversation``, without tool calls. Raises RequestError for a
        conversation that the model's chat template does not take.
        """
        said: Mapping[str, Any] = {"role": "assistant", "content": answer.content}
        if answer.reasoning:
            said = {**said, "reasoning_content": answer.reasoning}
        messages = [*self.conversation.messages, said]
        prompts = [
            replace(self.conversation, messages=[*messages, {"role": "user", "content": text}]).prompt_text(tokenizer)
            for text in _OPENINGS
        ]
        return array("i", common_prefix([tokenizer.encode(each, add_special_tokens=False) for each in prompts]))


def next_prompt(conversation: Conversation) -> NextPrompt | None:
    """None for a conversation that hardly goes on: one without tools and earlier answers, such as a request for a
    title; and for one whose answer the client has begun.
    """
    goes_on = bool(conversation.tools) or any(each["role"] == "assistant" for each in conversation.messages)
    is_begun = conversation.begun or conversation.continue_final_message or not conversation.add_generation_prompt
    return NextPrompt(conversation) if goes_on and not is_begun else None
