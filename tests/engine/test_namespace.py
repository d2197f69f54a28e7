"""What a model stores in the tiers is found only by what would compute the same bytes."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from emberkv.engine.namespace import tier_namespace
from tests.conftest import CheckpointFactory

CPU = torch.device("cpu")
ROOT = b"r" * 32
NAME = "namespace_layers"
SOURCE = """
from torch import nn
from transformers.activations import ACT2FN

class Layer(nn.Module):
    factor = {factor}
"""


@pytest.fixture
def layers() -> Iterator[None]:
    yield
    sys.modules.pop(NAME, None)


def layer(folder: Path, factor: float) -> nn.Module:
    path = folder / f"{NAME}.py"
    path.write_text(SOURCE.format(factor=factor))
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    made: nn.Module = module.Layer()
    return made


def test_the_same_model_has_one_name_in_every_process(checkpoint: CheckpointFactory) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    first, second = (tier_namespace(ROOT, load(checkpoint("llama")), CPU) for _ in range(2))
    assert (len(first), second) == (32, first)
    assert tier_namespace(b"o" * 32, load(checkpoint("llama")), CPU) != first


def test_another_number_of_threads_is_another_name() -> None:
    name = tier_namespace(ROOT, nn.Linear(2, 2), CPU)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert tier_namespace(ROOT, nn.Linear(2, 2), CPU) != name
    finally:
        torch.set_num_threads(threads)


def test_another_version_of_transformers_is_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = tier_namespace(ROOT, nn.Linear(2, 2), CPU)
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    assert tier_namespace(ROOT, nn.Linear(2, 2), CPU) != name


@pytest.mark.usefixtures("layers")
def test_other_code_of_the_layers_is_another_name(tmp_path: Path) -> None:
    name = tier_namespace(ROOT, layer(tmp_path, 1.0), CPU)
    assert tier_namespace(ROOT, layer(tmp_path, 1.03), CPU) != name
    assert tier_namespace(ROOT, layer(tmp_path, 1.0), CPU) == name
