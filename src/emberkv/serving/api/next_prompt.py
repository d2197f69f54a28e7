"""The beginning of a conversation's next prompt, which is known before the user has written the next message."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace

from emberkv.engine.tokenization.tokenizer import OPENINGS, common_prefix
from emberkv.serving.answers.answer_memory import template_message
from emberkv.serving.api.conversation import Conversation
from emberkv.serving.parsing.events import ParsedMessage

Encode = Callable[[Conversation], "array[int]"]
"""The token ids of a conversation's prompt. Raises RequestError for one that the chat template does not take."""

_TRIED = OPENINGS[:4]  # each has the whole conversation rendered and encoded


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
