"""Loaded models, shared by all engine tests: each architecture and dtype is read once a session."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from emberkv.engine.torch.attention.paged_attention import ATTENTION_NAME
from emberkv.engine.torch.model.loader import LoadedModel, load_model
from emberkv.engine.torch.native.kernels import Kernels
from tests.conftest import CheckpointFactory
from tests.engine.driver import Driver, Engines
from tests.machine import MACHINE_CACHE

ModelFactory = Callable[..., LoadedModel]
DriverFactory = Callable[..., Driver]


@pytest.fixture(scope="session")
def paged(checkpoint: CheckpointFactory) -> ModelFactory:
    """``paged(arch, dtype="float32", seed=0)``: a tiny model on the CPU for one engine, which may rebuild it.

    dtype: of all values; or of weights and others, as in "int8 bfloat16". KV of another type is behind a stroke, as in
    "bfloat16/int8".
    """
    models: dict[tuple[str, str, int], LoadedModel] = {}

    def get(arch: str, dtype: str = "float32", seed: int = 0) -> LoadedModel:
        key = (arch, dtype, seed)
        if key not in models:
            folder = str(checkpoint(arch, seed=seed))
            *quantize, kind = dtype.split()
            kind, _, kv = kind.partition("/")
            models[key] = load_model(
                folder,
                dtype=kind,  # type: ignore[arg-type]  # a name, as text
                kv_dtype=kv or "auto",  # type: ignore[arg-type]  # a name, as text
                quantize=quantize[0] if quantize else "none",  # type: ignore[arg-type]  # a name, as text
                device="cpu",
                attn_implementation=ATTENTION_NAME,
            )
        return replace(models[key], model=copy.deepcopy(models[key].model))

    return get


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    return Kernels.built(MACHINE_CACHE)


@pytest.fixture(params=["torch", "native"])
def driver(request: pytest.FixtureRequest, kernels: Kernels) -> DriverFactory:
    """``driver(loaded, ...)``: a `Driver` by torch's own operations, and by the C++ kernels."""
    return partial(Driver, kernels=kernels if request.param == "native" else None)


@pytest.fixture(scope="module")
def engines(request: pytest.FixtureRequest, paged: ModelFactory, kernels: Kernels) -> Engines:
    """Of the backend, the architecture and the type that are a test's parameters, by `paged` and `driver`'s names."""
    backend, arch, dtype = request.param
    return Engines(arch, dtype, paged, kernels if backend == "native" else None)
