"""Log-probabilities of a prompt's own tokens: as transformers computes them, whatever is cached, chunk by chunk."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from emberkv.core.sequence import FinishReason
from emberkv.engine.assembly import AssembledEngine, EngineConfig
from emberkv.engine.request import GenerationRequest, SamplingParams, TokenOutput
from emberkv.engine.torch.assembly import assemble
from emberkv.engine.torch.model.loader import LoadedModel
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.sampling import prompt_logprobs
from tests.conftest import CheckpointFactory
from tests.engine.conftest import ModelFactory
from tests.engine.loop_harness import Inbox
from tests.models import VOCAB_SIZE
from tests.waiting import DEADLINE

PROMPT = [(7 * i * i + 3) % VOCAB_SIZE for i in range(150)]
"""Three chunks of 64, the last one not full."""


@contextmanager
def engine(loaded: LoadedModel, kernels: Kernels | None, **change: int) -> Iterator[AssembledEngine]:
    sizes = {"cache_bytes": 2**21, "block_size": 16, "prefill_chunk": 64, **change}
    made = assemble(loaded, EngineConfig(**sizes), kernels=kernels)
    made.loop.start()
    try:
        yield made
    finally:
        made.close(DEADLINE)
        made.scheduler.cache.pool.check_integrity(holders=[])


def ask(made: AssembledEngine, name: str, prompt: list[int], top: int | None, new: int = 1) -> Inbox:
    inbox = Inbox()
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, prompt_logprobs=top)
    made.loop.submit(GenerationRequest(name, prompt, params), inbox)
    return inbox


def first_output(inbox: Inbox) -> TokenOutput:
    assert inbox.reason is FinishReason.LENGTH
    return inbox.outputs[0]


@pytest.mark.parametrize("native", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_they_are_transformers_own(
    paged: ModelFactory, checkpoint: CheckpointFactory, kernels: Kernels, arch: str, native: bool
) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(checkpoint(arch), attn_implementation="eager").eval()
    with torch.inference_mode():
        logits = plain(torch.tensor([PROMPT])).logits[0, :-1].float()
    expected = torch.log_softmax(logits, dim=-1)
    with engine(paged(arch), kernels if native else None) as made:
        found = first_output(ask(made, "a", PROMPT, top=3)).prompt_logprobs
    assert [each.token_id for each in found] == PROMPT
    assert (found[0].logprob, found[0].top) == (None, ())
    ours = torch.tensor([each.logprob for each in found[1:]])
    torch.testing.assert_close(ours, expected.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0], atol=2e-4, rtol=0)
    values = torch.tensor([[value for _, value in each.top] for each in found[1:]])
    torch.testing.assert_close(values, expected.topk(3).values, atol=2e-4, rtol=0)


def test_the_cache_is_not_read_but_filled(paged: ModelFactory, kernels: Kernels) -> None:
    with engine(paged("llama"), kernels) as made:
        cold = first_output(ask(made, "a", PROMPT, top=2))
        again = first_output(ask(made, "b", PROMPT, top=2))
        plain = first_output(ask(made, "c", PROMPT, top=None))
    stats = made.scheduler.stats
    assert again.prompt_logprobs == cold.prompt_logprobs  # bit by bit
    assert plain.prompt_logprobs == ()
    assert [each.usage and each.usage.cached_tokens for each in (cold, again, plain)] == [0, 0, 149]
    assert (stats.bypass_tokens, stats.query_tokens) == (300, 150)


def test_a_preempted_prompt_gives_each_token_once(paged: ModelFactory, kernels: Kernels) -> None:
    """Two prompts whose answers do not fit side by side: one is computed again."""
    loaded = paged("llama")
    pool = 24 * 16 * loaded.geometry.bytes_per_token(loaded.dtypes.kv)
    with engine(loaded, kernels, cache_bytes=pool) as made:
        inboxes = [ask(made, name, PROMPT[start:], top=1, new=100) for start, name in enumerate("ab")]
        outputs = [first_output(inbox) for inbox in inboxes]
    assert made.scheduler.stats.preemptions > 0
    for start, output in enumerate(outputs):
        assert [each.token_id for each in output.prompt_logprobs] == PROMPT[start:]


def test_an_aborted_request_gives_none(paged: ModelFactory, kernels: Kernels) -> None:
    with engine(paged("llama"), kernels) as made:
        inbox = ask(made, "a", PROMPT, top=1, new=1000)
        made.loop.abort("a")
        inbox.wait()
        assert len(inbox.outputs[-1].prompt_logprobs) in (0, 150)


def test_a_prompt_of_one_token(paged: ModelFactory, kernels: Kernels) -> None:
    with engine(paged("llama"), kernels) as made:
        (only,) = first_output(ask(made, "a", [5], top=0)).prompt_logprobs
    assert (only.token_id, only.logprob) == (5, None)


def test_scores_that_are_no_numbers_give_none() -> None:
    logits = torch.zeros(40, 8)
    assert prompt_logprobs(logits, [1] * 40, 2) is not None
    logits[35, 3] = float("nan")
    assert prompt_logprobs(logits, [1] * 40, 2) is None
