"""Starts answers on the engine: token ids and sampling parameters in, a stream of text out."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emberkv.engine.request import Engine, GenerationRequest, SamplingParams
from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.errors import PromptTooLongError, RequestError
from emberkv.serving.answers.answer import Answer, Echo
from emberkv.serving.answers.answer_stream import AnswerStream, OutputQueue
from emberkv.serving.metrics.request_metrics import AnswerTimer, Clock, ServingMetrics
from emberkv.serving.request_context import RequestContext


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of one answer: token ids, and how they are continued.

    retain_tokens: how many of them, from the first, the cache retains for ``retain_seconds``. silent: the answer is
    empty; the engine draws one token, because a prompt's last step ends with it, and the token is left out. echo:
    stands before the answer, with log-probabilities where the request wants them.
    """

    token_ids: Sequence[int]
    params: SamplingParams
    retain_tokens: int = 0
    retain_seconds: float = 0.0
    silent: bool = False
    echo: Echo | None = None


class TextGenerator:
    """Starts answers on a model's engine. Belongs to one event loop at a time."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, metrics: ServingMetrics, clock: Clock) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._clock = clock
        self._outputs: OutputQueue | None = None

    def start(
        self, prompts: Sequence[Prompt], request: RequestContext, *, on_close: Callable[[AnswerStream], None]
    ) -> AnswerStream:
        """Submit one request a prompt; call from the event loop.

        Raises what ``Engine.submit`` raises; then nothing is left running.
        """
        loop = asyncio.get_running_loop()
        if self._outputs is None or self._outputs.loop is not loop:
            self._outputs = OutputQueue(loop)
        stream = AnswerStream(self._engine, on_close)
        try:
            for index, prompt in enumerate(prompts):
                generation = GenerationRequest(
                    request.answer_id(index),
                    prompt.token_ids,
                    prompt.params,
                    request.tenant.salt,
                    tenant=request.tenant.name,
                    session_id=request.session,
                    retain_tokens=prompt.retain_tokens,
                    retain_seconds=prompt.retain_seconds,
                )
                answer = Answer(
                    index,
                    len(prompt.token_ids),
                    self._tokenizer.detokenizer(),
                    prompt.params.stop,
                    silent=prompt.silent,
                    echo=prompt.echo,
                )
                timer = AnswerTimer(self._metrics, self._clock, api=request.api, arrived=request.arrived)
                stream.add(generation, answer, timer, self._outputs)
                self._metrics.prompt_tokens.labels(request.api).observe(len(prompt.token_ids))
        except BaseException:
            stream.close()
            raise
        return stream


def answer_budget(engine: Engine, prompt_tokens: int, wanted: int | None, *, field: str = "max_tokens") -> int:
    """How many tokens an answer may have: as many as are ``wanted`` by the request's ``field``, else as many as fit.

    Raises PromptTooLongError when prompt and answer do not fit, RequestError when the prompt is empty.
    """
    if prompt_tokens == 0:
        raise RequestError("the prompt is empty; it must have at least one token", param="prompt")
    if prompt_tokens > engine.max_prompt_tokens:
        raise PromptTooLongError(
            f"the prompt has {prompt_tokens} tokens; at most {engine.max_prompt_tokens} are accepted"
        )
    room = engine.context_length - prompt_tokens
    if wanted is not None and wanted > room:
        raise PromptTooLongError(
            f"{field} is {wanted}; after a prompt of {prompt_tokens} tokens, the context of "
            f"{engine.context_length} tokens has room for at most {room}",
            param=field,
        )
    return room if wanted is None else wanted
