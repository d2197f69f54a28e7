"""Starts answers: token ids and parameters in, a stream of text out."""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emberkv.engine.request import Engine, GenerationRequest
from emberkv.engine.sampling_params import SamplingParams
from emberkv.engine.tokenizer import Tokenizer
from emberkv.errors import PromptTooLongError, RequestError
from emberkv.serving.answer import Answer
from emberkv.serving.answer_stream import AnswerStream, Postbox
from emberkv.serving.metrics import AnswerTimer, Clock, ServingMetrics
from emberkv.serving.tenants import Tenant


@dataclass(frozen=True, slots=True)
class Prompt:
    """One answer's order: token ids and how to continue them."""

    token_ids: Sequence[int]
    params: SamplingParams


class TextGenerator:
    """Starts answers on a model's engine. Belongs to one event loop at a time."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, metrics: ServingMetrics, clock: Clock) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._clock = clock
        self._postbox: Postbox | None = None

    def start(
        self,
        prompts: Sequence[Prompt],
        *,
        api: str,
        tenant: Tenant,
        arrived: float,
        on_close: Callable[[AnswerStream], None],
    ) -> AnswerStream:
        """Submit one request a prompt; call from the event loop.

        api: the metrics' label. arrived: when the HTTP request came, by the clock given.
        Raises what ``Engine.submit`` raises; then nothing is left running.
        """
        loop = asyncio.get_running_loop()
        if self._postbox is None or self._postbox.loop is not loop:
            self._postbox = Postbox(loop)
        stream = AnswerStream(self._engine, on_close)
        try:
            for index, prompt in enumerate(prompts):
                request = GenerationRequest(
                    uuid.uuid4().hex, prompt.token_ids, prompt.params, tenant.salt, tenant=tenant.name
                )
                answer = Answer(index, len(prompt.token_ids), self._tokenizer.detokenizer(), prompt.params.stop)
                timer = AnswerTimer(self._metrics, self._clock, api=api, arrived=arrived)
                stream.add(request, answer, timer, self._postbox)
        except BaseException:
            stream.close()
            raise
        return stream


def answer_budget(engine: Engine, prompt_tokens: int, asked: int | None, *, field: str = "max_tokens") -> int:
    """How many tokens an answer may have: what ``field`` asked for, or else what the context has left.

    Raises PromptTooLongError when prompt and answer do not fit, RequestError when the prompt is empty.
    """
    if prompt_tokens == 0:
        raise RequestError("the prompt is empty; it must have at least one token", param="prompt")
    if prompt_tokens > engine.max_prompt_tokens:
        raise PromptTooLongError(
            f"the prompt has {prompt_tokens} tokens; at most {engine.max_prompt_tokens} are accepted"
        )
    room = engine.context_length - prompt_tokens
    if asked is not None and asked > room:
        raise PromptTooLongError(
            f"{field} is {asked}; after a prompt of {prompt_tokens} tokens, the context of "
            f"{engine.context_length} tokens has room for at most {room}",
            param=field,
        )
    return room if asked is None else asked
