"""Chooses the next token of each sequence in a batch; no row's choice depends on the other rows."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from emberkv.engine.executor import NOT_NUMBERS, SampledToken, SamplingState
from emberkv.engine.request import SamplingParams, TokenLogprobs
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.errors import SamplingError

_log = logging.getLogger(__name__)

_NUCLEUS_GUESS = 1024  # most nuclei are smaller, and finding the top 1,024 is far cheaper than sorting a vocabulary


@dataclass(frozen=True, slots=True)
class SamplingFailure:
    """Why no token could be chosen for one row; it ends that row's request and no other."""

    reason: str


class Sampler:
    """Turns logits into tokens, in the order that `SamplingState` gives.

    kernels: find the likeliest tokens of logits on the CPU; None leaves that to torch.
    """

    def __init__(self, kernels: Kernels | None = None) -> None:
        self._kernels = kernels
        self._changes: WeakKeyDictionary[SamplingState, list[_LogitsChange]] = WeakKeyDictionary()

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> list[SampledToken | SamplingFailure]:
        """One result for each row of ``logits`` [n, vocab], whose requests are ``states`` (n of them).

        A row that cannot be sampled gets a failure and leaves the other rows as they are.
        """
        places, values = self._likeliest(logits)
        return [
            self._sampled(row, state, token_id) if math.isfinite(value) else SamplingFailure(NOT_NUMBERS)
            for token_id, value, row, state in zip(places, values, logits, states, strict=True)
        ]

    def _likeliest(self, logits: torch.Tensor) -> tuple[list[int], list[float]]:
        """The first of each row's largest logits, or a NaN where it has one: its place and its value."""
        if self._kernels is not None and logits.is_contiguous():
            return self._kernels.likeliest(logits)
        scores = logits.float()  # over bf16 as it is, torch's argmax takes five times as long
        greedy = scores.argmax(dim=-1, keepdim=True)
        return greedy.squeeze(-1).tolist(), scores.gather(-1, greedy).squeeze(-1).tolist()

    def _sampled(self, logits: torch.Tensor, state: SamplingState, likeliest: int) -> SampledToken | SamplingFailure:
        if state.is_plain_greedy:
            return SampledToken(likeliest, None)
        try:
            return self._sample_row(logits.float(), state)
        except SamplingError as error:
            return SamplingFailure(str(error))
        except Exception as error:  # noqa: BLE001 - the request ends with it; the other requests of the step do not
            _log.exception("sampling failed for one request")
            return SamplingFailure(f"sampling failed: {type(error).__name__}")

    def _sample_row(self, logits: torch.Tensor, state: SamplingState) -> SampledToken:
        changed = self._changed(logits, state) if state.changes_logits else logits
        if not bool(changed.max().isfinite()):
            raise SamplingError(_no_finite_maximum(changed))
        greedy = state.params.is_greedy
        token_id = int(changed.argmax()) if greedy else _draw(changed, state.params, state.draw())
        logprobs = None if state.params.logprobs is None else _logprobs(logits, token_id, state.params.logprobs)
        return SampledToken(token_id, logprobs)

    def _changed(self, logits: torch.Tensor, state: SamplingState) -> torch.Tensor:
        """float32 [vocab] after all that the request changes; the argument is left as it is."""
        changes = self._changes.get(state)
        if changes is None:
            changes = self._changes[state] = list(_make_changes(state.params, state.prompt_token_ids, logits))
        for change in changes:
            logits = change.apply(logits, state.answer)
        allowed = state.allowed_tokens(logits.numel())
        if allowed is not None:
            logits = logits.where(torch.from_numpy(allowed).to(logits.device), -math.inf)
        return logits


def _no_finite_maximum(changed: torch.Tensor) -> str:
    if bool(changed.max() == -math.inf):
        return "no token that the request allows can follow by the model's scores; allow others"
    return "the penalties make the scores for the next token overflow; use weaker ones"


_PROMPT_ROWS = 32  # of a vocabulary each, in float32 at a time: 32 times 150,000 are 19 MB


@torch.inference_mode()
def prompt_logprobs(logits: torch.Tensor, token_ids: Sequence[int], alternatives: int) -> list[TokenLogprobs] | None:
    """Of each of the tokens [n] that follow the positions of ``logits`` [n, vocab]; None where these are no numbers."""
    found: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), _PROMPT_ROWS):
        targets = token_ids[start : start + _PROMPT_ROWS]
        logprobs = torch.log_softmax(logits[start : start + len(targets)].float(), dim=-1)
        if bool(logprobs.isnan().any()):
            return None
        chosen = logprobs.gather(1, torch.tensor(targets, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
        values, ids = logprobs.topk(min(alternatives, logprobs.shape[1]))
        rows = zip(targets, chosen, ids.tolist(), values.tolist(), strict=True)
        found += [TokenLogprobs(token, value, tuple(zip(*top, strict=True))) for token, value, *top in rows]
    return found


class _LogitsChange(Protocol):
    def apply(self, logits: torch.Tensor, answer: Sequence[int]) -> torch.Tensor:
        """float32 [vocab]; the argument is left as it is. answer: the tokens so far."""
        ...


def _make_changes(
    params: SamplingParams, prompt_token_ids: Sequence[int], like: torch.Tensor
) -> Iterator[_LogitsChange]:
    """like: float32 [vocab], on the device where the logits will be."""
    if params.has_penalties:
        yield _Penalties(params, prompt_token_ids, like)
    if params.logit_bias:
        yield _Biases(params.logit_bias, like)


class _Biases:
    def __init__(self, biases: Mapping[int, float], like: torch.Tensor) -> None:
        self._token_ids = torch.tensor(list(biases), dtype=torch.long, device=like.device)
        self._values = torch.tensor(list(biases.values()), dtype=like.dtype, device=like.device)

    def apply(self, logits: torch.Tensor, answer: Sequence[int]) -> torch.Tensor:
        return logits.index_add(0, self._token_ids, self._values)


class _Penalties:
    """Counts over the vocabulary, made for a request's first token and brought up to date with each further one."""

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int], like: torch.Tensor) -> None:
        self._params = params
        self._counted = 0  # leading tokens of the answer that are in the counts
        self._counts = torch.zeros_like(like)  # float32 [vocab]: how often the answer has each token
        self._seen = torch.zeros_like(like, dtype=torch.bool)  # [vocab]: which tokens the prompt or the answer has
        self._seen[torch.tensor(list(prompt_token_ids), dtype=torch.long, device=like.device)] = True

    def apply(self, logits: torch.Tensor, answer: Sequence[int]) -> torch.Tensor:
        for token_id in answer[self._counted :]:
            self._counts[token_id] += 1
            self._seen[token_id] = True
        self._counted = len(answer)
        factor = self._params.repetition_penalty
        scaled = torch.where(logits > 0, logits / factor, logits * factor)
        penalized = torch.where(self._seen, scaled, logits)
        penalized -= self._params.frequency_penalty * self._counts
        penalized -= self._params.presence_penalty * (self._counts > 0)
        return penalized


def _draw(logits: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    """The token at ``uniform`` of the way through the distribution that remains; one random number a token."""
    # In double precision on the CPU, because a float32 sum over a large vocabulary is off by more than rare tokens
    # weigh, and so that a seed means the same on every device.
    scores = logits.to("cpu", torch.float64)
    probabilities = torch.softmax((scores - scores.max()) / params.temperature, dim=-1)
    kept, token_ids = _truncate(probabilities, params)
    cumulative = kept.cumsum(dim=-1)
    total = float(cumulative[-1])
    # Just below the total at most, where rounding would otherwise reach beyond the last token.
    place = torch.searchsorted(cumulative, min(uniform * total, math.nextafter(total, 0.0)), right=True)
    return int(token_ids[place])


def _truncate(probabilities: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The probabilities [k], k >= 1, that top_k, top_p and min_p leave, not normalized again, and their token ids [k].

    The likeliest token is always among them.
    """
    vocabulary = probabilities.numel()
    mass = 1.0
    if 0 < params.top_k < vocabulary:
        kept, token_ids = probabilities.topk(params.top_k)
        mass = float(kept.sum())
    elif params.top_p < 1.0:
        kept, token_ids = _likeliest(probabilities, params.top_p)
    else:
        kept, token_ids = probabilities, torch.arange(vocabulary)
    if params.top_p < 1.0:
        before = kept.cumsum(dim=-1) - kept
        # The likeliest token is kept even where a tiny top_p times the mass rounds to 0.
        size = max(1, int((before < params.top_p * mass).sum()))
        kept, token_ids = kept[:size], token_ids[:size]
    if params.min_p > 0.0:
        likely = kept >= params.min_p * kept.max()
        kept, token_ids = kept[likely], token_ids[likely]
    return kept, token_ids


def _likeliest(probabilities: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Enough of the most likely tokens to hold ``mass``, most likely first."""
    kept, token_ids = probabilities.topk(min(_NUCLEUS_GUESS, probabilities.numel()))
    if float(kept.sum()) < mass:
        kept, token_ids = probabilities.sort(descending=True)
    return kept, token_ids


def _logprobs(logits: torch.Tensor, token_id: int, alternatives: int) -> TokenLogprobs:
    """Of the model's own distribution, before penalties and temperature."""
    logprobs = torch.log_softmax(logits, dim=-1)
    values, token_ids = logprobs.topk(min(alternatives, logprobs.numel()))
    top = zip(token_ids.tolist(), values.tolist(), strict=True)
    return TokenLogprobs(token_id, float(logprobs[token_id]), tuple(top))
