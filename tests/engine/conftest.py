"""Loaded models, shared by all engine tests: each architecture and dtype is read once a session."""

from collections.abc import Callable

import pytest

from emberkv.engine.loader import LoadedModel, load_model
from emberkv.engine.paged_attention import ATTENTION_NAME
from tests.conftest import CheckpointFactory

ModelFactory = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def paged(checkpoint: CheckpointFactory) -> ModelFactory:
    """``paged(arch, dtype="float32", seed=0)``: a tiny model whose attention goes through the paged pool, on the CPU."""
    models: dict[tuple[str, str, int], LoadedModel] = {}

    def get(arch: str, dtype: str = "float32", seed: int = 0) -> LoadedModel:
        key = (arch, dtype, seed)
        if key not in models:
            folder = str(checkpoint(arch, seed=seed))
            models[key] = load_model(folder, dtype=dtype, device="cpu", attn_implementation=ATTENTION_NAME)
        return models[key]

    return get
