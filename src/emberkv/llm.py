"""An inference engine in the caller's own process, with the prefix cache that ``emberkv serve`` has."""

import asyncio
import operator
import os
import queue
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, SupportsIndex

from emberkv.config import ServeConfig
from emberkv.core.explaining.explanation import Explanation
from emberkv.core.explaining.ledger import Ledger
from emberkv.core.sequence import FinishReason
from emberkv.engine.assembly import AssembledEngine
from emberkv.engine.constraints import check_constraint
from emberkv.engine.request import (
    CacheUsage,
    EngineStats,
    GenerationRequest,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from emberkv.engine.torch.assembly import assemble, load_configured
from emberkv.engine.torch.model.loader import LoadedModel
from emberkv.errors import EngineStoppedError, RequestError
from emberkv.serving.answers.answer import Answer
from emberkv.serving.api.openai_messages import template_messages
from emberkv.serving.cache.ledger_store import LedgerStore
from emberkv.serving.cache.service import cache_service, text_of
from emberkv.serving.engine_setup import cache_sizes, engine_config, model_options, tier_config
from emberkv.serving.errors import GenerationFailedError
from emberkv.serving.tenancy import DEFAULT_TENANT
from emberkv.settings import serve_config

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a chat as a list of OpenAI messages, which the model's chat template renders."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer.

    token_ids: without the end-of-sequence token. usage: how many prompt tokens came from the cache, and from which
    tier. logprobs: one entry a token, empty unless `SamplingParams.logprobs` is set. stop_sequence: the stop
    string that ended the answer, which is not in ``text``.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: CacheUsage
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop_sequence: str | None = None


class _ClosedAtExit(ABC):
    """Leaving the ``with`` block closes it."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CompletionStream(_ClosedAtExit):
    """Pieces of an answer's text, as they become certain. Iterate once; leaving the ``with`` block aborts the request.

    Iterating raises EngineStoppedError when the engine is closed first, GenerationFailedError when it fails, and
    RequestError for a constraint that the model's tokenizer cannot follow.
    """

    def __init__(self, llm: "LLM", request: GenerationRequest) -> None:
        self._llm = llm
        self._request = request
        self._outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._texts: list[str] = []
        detokenizer = llm.loaded.tokenizer.detokenizer()
        self._answer = Answer(0, len(request.prompt_token_ids), detokenizer, request.params.stop)
        llm.engine.loop.submit(request, self._outputs.put)

    @property
    def usage(self) -> CacheUsage:
        """Where the prompt's tokens came from; known from the first piece on."""
        return self._answer.usage

    @property
    def completion(self) -> Completion:
        """The whole answer. Raises RequestError before the stream has ended."""
        answer = self._answer
        if answer.finish_reason is None:
            raise RequestError("the answer is not complete; iterate over the stream to its end first")
        count = answer.completion_tokens
        return Completion(
            "".join(self._texts),
            tuple(self._token_ids[:count]),
            answer.finish_reason,
            answer.usage,
            tuple(self._logprobs[:count]),
            answer.stop_sequence,
        )

    def __iter__(self) -> Iterator[str]:
        answer = self._answer
        while answer.finish_reason is None:
            output = self._outputs.get()
            self._token_ids += output.token_ids
            self._logprobs += output.logprobs
            if output.refusal is not None:
                raise output.refusal
            answer.absorb(output)
            if answer.stop_sequence is not None:
                self.close()
            if answer.finish_reason is FinishReason.ERROR:
                raise GenerationFailedError(f"generation failed: {answer.error}")
            if answer.finish_reason is FinishReason.ABORT:
                raise EngineStoppedError("the request was aborted before its answer was complete")
            delta = answer.take()
            if delta is not None and delta.text:
                self._texts.append(delta.text)
                yield delta.text

    def close(self) -> None:
        """Abort the request if it still runs. Idempotent."""
        self._llm.engine.loop.abort(self._request.request_id)


class LLM(_ClosedAtExit):
    """A model with its prefix cache, computed on a thread of this process. All methods may be called from any thread.

    model: a folder or a hub id; None loads the bundled demonstration model. cache_ram: bytes of the KV pool ("4GiB");
    None takes what `emberkv serve` would. cache_dir: a folder in which blocks outlive the process, up to ``cache_disk``
    bytes of them; a server with the same settings finds them, too. ram_tier: bytes of host memory below the pool.
    progress: called with a line of text at each stage of loading. The other settings are those of
    `emberkv.config.ServeConfig`. No environment variable is read.

    Raises ConfigError for a setting that cannot work, ModelError and its subclasses for a model that cannot be served,
    KernelsError where ``kernels="native"`` cannot be compiled, CacheFolderError for an unusable ``cache_dir``.

    >>> from emberkv import LLM, SamplingParams
    >>> with LLM(cache_ram="64MiB") as llm:
    ...     prompt = "The library opens at nine and closes when the last reader has gone home. " * 4
    ...     cold = llm.generate(prompt, SamplingParams(max_tokens=4, temperature=0))
    ...     warm = llm.generate(prompt, SamplingParams(max_tokens=4, temperature=0))
    >>> cold.usage.cached_tokens, warm.usage.computed_tokens, warm.text == cold.text
    (0, 1, True)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        quantize: Literal["none", "int8", "int4"] = "none",
        kv_dtype: Literal["auto", "int8"] = "auto",
        device: str = "auto",
        kernels: Literal["auto", "native", "torch"] = "auto",
        generation_config: Literal["auto", "ignore"] = "auto",
        cache_ram: int | str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_disk: int | str | None = None,
        ram_tier: int | str | None = None,
        eviction: str = "lru",
        exact: bool = False,
        prefix_cache: bool = True,
        block_size: int | None = None,
        prefill_chunk: int | None = None,
        max_step_tokens: int | None = None,
        max_running: int | None = None,
        machine_cache: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        given = {
            "model": None if model is None else os.fspath(model), "dtype": dtype, "quantize": quantize,
            "kv_dtype": kv_dtype,
            "device": device, "kernels": kernels, "generation_config": generation_config,
            "cache_ram": cache_ram, "cache_dir": cache_dir, "cache_disk": cache_disk, "ram_tier": ram_tier,
            "eviction": eviction, "exact": exact, "prefix_cache": prefix_cache, "block_size": block_size,
            "prefill_chunk": prefill_chunk, "max_step_tokens": max_step_tokens, "max_running": max_running,
            "machine_cache": machine_cache,
        }  # fmt: skip
        config = serve_config(given, {})
        self._ledger_store = LedgerStore(Ledger())
        # OpenMP threads belong to the thread that first used torch; were it this one, its team would compete with
        # that of the engine's thread for the cores at every step.
        with ThreadPoolExecutor(1, thread_name_prefix="emberkv-load") as loading:
            self.loaded, self.engine = loading.submit(self._load, config, progress or (lambda _: None)).result()
        self._cache = cache_service(self.engine, self._ledger_store, name=self.loaded.name, folder=config.cache_dir)
        self.engine.loop.start()

    def _load(self, config: ServeConfig, progress: Progress) -> tuple[LoadedModel, AssembledEngine]:
        sizes = cache_sizes(config)
        loaded, kernels = load_configured(model_options(config), sizes, progress)
        settings = engine_config(config, sizes.pool_bytes(loaded), tier_config(config, {}))
        return loaded, assemble(loaded, settings, kernels=kernels, progress=progress)

    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> Completion:
        """Answer one prompt, and wait for the whole answer. Without ``params``, the model's defaults hold.

        Raises PromptTooLongError when prompt and ``max_tokens`` exceed the context, RequestError for what else cannot
        be used, EngineStoppedError after `close`, GenerationFailedError when computing fails.
        """
        return self.generate_batch([prompt], params)[0]

    def generate_batch(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> list[Completion]:
        """Answer prompts together, as `generate` does each; the completions are in the prompts' order."""
        streams: list[CompletionStream] = []
        try:
            streams.extend(self.stream(prompt, params) for prompt in prompts)
            for stream in streams:
                for _ in stream:
                    pass
        finally:
            for stream in streams:
                stream.close()
        return [stream.completion for stream in streams]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> CompletionStream:
        """Start one answer and iterate over its text while it is generated.

        Raises what `generate` raises; the errors of computing are raised by the iteration.
        """
        token_ids = self.encode(prompt)
        sampling = self.loaded.sampling_defaults if params is None else params
        if sampling.constraint is not None:
            check_constraint(sampling.constraint)
        return CompletionStream(self, GenerationRequest(uuid.uuid4().hex, token_ids, sampling))

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt as the model sees them.

        Raises RequestError for a chat that cannot be rendered, and for what is neither text, token ids nor messages.
        """
        tokenizer = self.loaded.tokenizer
        if isinstance(prompt, str):
            return list(tokenizer.encode(prompt, add_special_tokens=True))
        messages = [each for each in prompt if isinstance(each, Mapping)]
        if messages and len(messages) == len(prompt):
            text = tokenizer.render_chat(template_messages(messages))
            return list(tokenizer.encode(text, add_special_tokens=False))
        tokens = [each for each in prompt if isinstance(each, SupportsIndex)]
        if len(tokens) < len(prompt):
            given = ", ".join(sorted({type(each).__name__ for each in prompt}))
            raise RequestError(f"the prompt is a list of {given}; it must be text, token ids or chat messages")
        return [operator.index(token) for token in tokens]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return text_of(self.loaded.tokenizer, token_ids)

    def explain(self, prompt: Prompt) -> Explanation:
        """What ``prompt`` would hit if it came now, by tier, and why the rest of it would be computed."""
        return asyncio.run(self._cache.explain(self.encode(prompt), DEFAULT_TENANT)).explanation

    def stats(self) -> EngineStats:
        """Pool, hits, evictions and tiers, as of the last step."""
        return self.engine.loop.stats()

    def close(self) -> None:
        """Abort what runs, store what waits to be stored, and end the engine's thread. Idempotent."""
        self.engine.close()
