"""Projections from and to latents: what the layer from latents to keys and values computes, each row by itself."""

import pytest
import torch

from emberkv.engine.torch.model.latent import TorchLatentProjection
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.native.layers import NativeLatentProjection

HEADS, NOPE, VALUES, RANK, ROTATED, TOKENS = 3, 6, 10, 16, 4, 40


@pytest.mark.parametrize("native", [False, True], ids=["torch", "native"])
def test_scores_and_outputs_over_latents_are_those_over_keys_and_values(kernels: Kernels, native: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(HEADS * (NOPE + VALUES), RANK, generator=generator)
    latents = torch.randn(TOKENS, RANK, generator=generator)
    queries = torch.randn(HEADS, TOKENS, NOPE + ROTATED, generator=generator)
    shares = torch.rand(HEADS, TOKENS, TOKENS, generator=generator)
    plain = TorchLatentProjection(weight, HEADS, NOPE)
    projection = NativeLatentProjection(kernels, plain) if native else plain

    keys, values = (latents @ weight.t()).view(TOKENS, HEADS, -1).transpose(0, 1).split([NOPE, VALUES], dim=-1)
    scores = projection.queries(queries[..., :NOPE]) @ latents.t()
    torch.testing.assert_close(scores, queries[..., :NOPE] @ keys.transpose(1, 2), rtol=1e-4, atol=1e-3)
    seen = torch.nn.functional.pad(shares @ latents, (0, ROTATED)).transpose(0, 1).contiguous()
    expected = (shares @ values).transpose(0, 1)
    torch.testing.assert_close(projection.outputs(seen), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_kernels_a_token_depends_on_itself_alone(kernels: Kernels, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(HEADS * (NOPE + VALUES), RANK, generator=generator).to(dtype)
    projection = NativeLatentProjection(kernels, TorchLatentProjection(weight, HEADS, NOPE))
    queries = torch.randn(HEADS, TOKENS, NOPE, generator=generator).to(dtype)
    latents = torch.randn(TOKENS, HEADS, RANK, generator=generator).to(dtype)
    whole = projection.queries(queries), projection.outputs(latents)
    for start, stop in [(0, 1), (39, 40), (3, 10), (1, 40)]:
        assert torch.equal(projection.queries(queries[:, start:stop]), whole[0][:, start:stop])
        assert torch.equal(projection.outputs(latents[start:stop]), whole[1][start:stop])
