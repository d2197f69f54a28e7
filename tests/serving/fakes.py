"""An engine that says what a script tells it, and a tokenizer of single bytes."""

import codecs
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emberkv.core.sequence import FinishReason
from emberkv.engine.request import (
    CacheUsage,
    EngineStats,
    GenerationRequest,
    OutputListener,
    PrefillProgress,
    TokenLogprobs,
    TokenOutput,
)
from emberkv.engine.tokenization.tokenizer import KnownTokens
from emberkv.errors import EngineStoppedError, PromptTooLongError, RequestError
from tests.waiting import DEADLINE

BOS = 256


class ByteDetokenizer:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(bytes(token_id for token_id in token_ids if token_id != BOS))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """Token ids are bytes; 256 begins a text. The chat template shows roles in angle brackets."""

    cache_bytes = 0

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        max_tokens: int | None = None,
        known: Sequence[KnownTokens] = (),
    ) -> list[int]:
        assert not known, "there are no cuts"
        return [BOS] * add_special_tokens + list(text.encode())

    def cuts(self, text: str, start: int) -> Iterator[int]:
        return iter(())

    def template_reads(self, variable: str) -> bool:
        return variable != "unread"

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        if messages[0]["content"] == "offend the template":
            raise RequestError("the chat template rejects these messages", param="messages")
        shown = "".join(f"{{{name}={value}}}" for name, value in (variables or {}).items())
        shown += "".join(f"<tool {(tool.get('function') or {}).get('name', '')}>" for tool in tools or ())
        for message in messages:
            calls = "".join(
                f"[{call['function']['name']} {call['function']['arguments']['x']}]"
                for call in message.get("tool_calls", ())
            )
            shown += f"<{message['role']}>{message['content']}{calls}"
        return shown + "<assistant>" * add_generation_prompt + "..." * continue_final_message

    def token_text(self, token_id: int) -> str:
        return "<begin>" if token_id == BOS else bytes([token_id]).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return b"<begin>" if token_id == BOS else bytes([token_id])

    @property
    def description(self) -> dict[str, Any]:
        return {"tokenizer_class": "ByteTokenizer", "eos_token": None, "chat_template": "roles in brackets"}

    def detokenizer(self, keep: Collection[str] = ()) -> ByteDetokenizer:
        return ByteDetokenizer()

    def remembering_for(self, owner: str) -> "ByteTokenizer":
        return self


@dataclass(frozen=True)
class Script:
    """What the engine does with each request.

    pause_after: after so many tokens the request waits for ``FakeEngine.resume``; 0 is before the first.
    """

    answer: str = "Hello there"
    tokens_per_step: int = 1
    finish: FinishReason = FinishReason.STOP
    error: str | None = None
    cached: int = 0
    created: int = 0
    queue_seconds: float = 0.25
    pause_after: int | None = None


@dataclass
class _Running:
    request: GenerationRequest
    listener: OutputListener
    script: Script
    said: int = 0
    aborted: bool = False
    outputs: int = field(default=0)

    def is_paused(self) -> bool:
        return not self.aborted and self.said == self.script.pause_after

    def step(self) -> TokenOutput:
        script, request = self.script, self.request
        self.outputs += 1
        usage = CacheUsage(len(request.prompt_token_ids), script.cached, script.created)
        queued = script.queue_seconds if self.outputs == 1 else None
        if self.aborted:
            return TokenOutput(request.request_id, usage=usage, finish_reason=FinishReason.ABORT)
        said_at_most = list(script.answer.encode())
        answer = said_at_most[: request.params.max_tokens]
        end = self.said + script.tokens_per_step
        if script.pause_after is not None and self.said < script.pause_after:
            end = min(end, script.pause_after)
        tokens = tuple(answer[self.said : end])
        self.said = end
        finish = None
        if end >= len(answer):
            finish = FinishReason.LENGTH if len(answer) < len(said_at_most) else script.finish
        return TokenOutput(
            request.request_id,
            tokens,
            self._logprobs(tokens),
            usage,
            finish,
            script.error if finish is FinishReason.ERROR else None,
            queued,
            self._prompt_logprobs() if self.outputs == 1 else (),
        )

    def _prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        count = self.request.params.prompt_logprobs
        if count is None:
            return ()
        first, *others = self.request.prompt_token_ids
        best = ((ord("x"), -0.25), (ord("y"), -1.5))
        return (TokenLogprobs(first, None, ()), *(TokenLogprobs(token, -2.0, best[:count]) for token in others))

    def _logprobs(self, tokens: tuple[int, ...]) -> tuple[TokenLogprobs, ...]:
        count = self.request.params.logprobs
        if count is None:
            return ()
        best = ((ord("x"), -0.25), (ord("y"), float("-inf")))
        return tuple(TokenLogprobs(token, -0.5, best[:count]) for token in tokens)


class FakeEngine:
    """Works on a thread of its own, one step a request in turn, as a real engine would."""

    context_length = 1000
    max_prompt_tokens = 990

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.engine_stats = EngineStats()
        self.is_full = False
        self.submitted: list[GenerationRequest] = []
        self.aborted: list[str] = []
        self._running: dict[str, _Running] = {}
        self._change = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, listener: OutputListener) -> None:
        with self._change:
            if self._stopping:
                raise EngineStoppedError("the engine has stopped")
            if len(request.prompt_token_ids) > self.max_prompt_tokens:
                raise PromptTooLongError("too long")
            if max(request.prompt_token_ids) > BOS:
                raise RequestError("prompt has a token id outside the vocabulary", param="prompt")
            self.submitted.append(request)
            self._running[request.request_id] = _Running(request, listener, self.script)
            self._change.notify_all()

    def abort(self, request_id: str) -> None:
        with self._change:
            if request_id in self._running and not self._running[request_id].aborted:
                self._running[request_id].aborted = True
                self.aborted.append(request_id)
                self._change.notify_all()

    def progress(self, request_id: str) -> PrefillProgress | None:
        """None while ``is_full``: then no request is admitted."""
        running = self._running.get(request_id)
        if running is None or self.is_full:
            return None
        prompt = len(running.request.prompt_token_ids)
        return PrefillProgress(prompt if running.said else prompt // 2, prompt)

    def stats(self) -> EngineStats:
        return self.engine_stats

    @property
    def running(self) -> int:
        with self._change:
            return len(self._running)

    def resume(self) -> None:
        """Let requests that wait at ``pause_after`` go on."""
        with self._change:
            for running in self._running.values():
                if running.is_paused():
                    running.script = Script(**{**vars(running.script), "pause_after": None})
            self._change.notify_all()

    def stop(self) -> None:
        with self._change:
            self._stopping = True
            for running in self._running.values():
                running.aborted = True
            self._change.notify_all()
        self._thread.join(DEADLINE)

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._stopping or self._runnable())
                if self._stopping and not self._running:
                    return
                for running in self._runnable():
                    output = running.step()
                    if output.finish_reason is not None:
                        del self._running[output.request_id]
                    running.listener(output)

    def _runnable(self) -> list[_Running]:
        return [running for running in self._running.values() if not running.is_paused()]
