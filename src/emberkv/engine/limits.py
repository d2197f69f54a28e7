"""What a request must keep to, whatever the engine is doing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emberkv.core.hashing import token_array
from emberkv.engine.request import GenerationRequest
from emberkv.errors import PromptTooLongError, RequestError


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """context_length: most tokens of prompt and answer. vocab_size: token ids are below it."""

    context_length: int
    vocab_size: int
    eos_token_ids: frozenset[int]

    def check(self, request: GenerationRequest, pool_tokens: int) -> None:
        """Raises RequestError, or PromptTooLongError when neither context nor pool could ever hold the request.

        pool_tokens: what the KV pool holds.
        """
        prompt = request.prompt_token_ids
        if not prompt:
            raise RequestError("the prompt is empty; it must have at least one token", param="prompt")
        if not self._in_vocabulary(prompt):
            wrong = next(token for token in prompt if not 0 <= token < self.vocab_size)
            raise RequestError(f"token id {wrong} is not in the vocabulary of {self.vocab_size}", param="prompt")
        unknown = next((token for token in request.params.logit_bias if token >= self.vocab_size), None)
        if unknown is not None:
            raise RequestError(
                f"logit_bias names token id {unknown}; the vocabulary has {self.vocab_size}", param="logit_bias"
            )
        room = min(self.context_length, pool_tokens)
        total = len(prompt) + request.params.max_tokens
        if total > room:
            source = "the model's context" if room == self.context_length else "the KV pool"
            raise PromptTooLongError(
                f"{len(prompt)} prompt tokens and {request.params.max_tokens} to generate are {total}; "
                f"{source} holds {room}",
                param="prompt" if len(prompt) >= room else "max_tokens",
            )

    def _in_vocabulary(self, prompt: Sequence[int]) -> bool:
        try:
            tokens = np.frombuffer(token_array(prompt), dtype=np.int32)
        except OverflowError:
            return False
        return bool(tokens.min() >= 0 and tokens.max() < self.vocab_size)
