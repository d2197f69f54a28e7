"""A self-check that was passed is remembered, and never for another model, machine, version or setting."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emberkv.engine.assembly import EngineConfig
from emberkv.engine.torch.assembly import checked_executor
from emberkv.engine.torch.model.loader import LoadedModel
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.passed_checks import FILE_NAME, PassedChecks, check_key
from emberkv.engine.torch.self_check import Findings
from emberkv.errors import UnsupportedModelError
from tests.engine.conftest import ModelFactory

FINDINGS = Findings(one_pass=True, batch_invariant=True, decoder=True)
CONFIG = EngineConfig(cache_bytes=2**21, block_size=16, prefill_chunk=64)


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return replace(CONFIG, self_checks=tmp_path / "machine")


def key_of(
    loaded: LoadedModel,
    kernels: Kernels | None,
    *,
    cache_bytes: int = CONFIG.cache_bytes,
    block_size: int = CONFIG.block_size,
    prefill_chunk: int = CONFIG.prefill_chunk,
    machine: str | None = None,
) -> str:
    return check_key(
        loaded, kernels, cache_bytes=cache_bytes, block_size=block_size, prefill_chunk=prefill_chunk, machine=machine
    )


def stages(paged: ModelFactory, config: EngineConfig, kernels: Kernels | None) -> list[str]:
    """The stages of a start that has to do with self-checks. The engine is the one that a start with a check gives."""
    shown: list[str] = []
    engine = checked_executor(paged("llama"), config, kernels=kernels, progress=shown.append)
    assert engine.findings == Findings(one_pass=True, batch_invariant=kernels is not None, decoder=kernels is not None)
    assert engine.alignment == (config.block_size if kernels is not None else 32)
    return [line.partition(":")[0] for line in shown if "self-check" in line]


ALL_STAGES = [f"self-check {number} of 4" for number in (1, 2, 3, 4)]


@pytest.mark.parametrize("native", [True, False])
def test_the_second_start_makes_none(paged: ModelFactory, config: EngineConfig, kernels: Kernels, native: bool) -> None:
    used = kernels if native else None
    assert stages(paged, config, used) == ALL_STAGES
    assert stages(paged, config, used) == ["self-check"]
    assert stages(paged, replace(config, self_checks=None), used) == ALL_STAGES


def test_one_that_fails_is_not_remembered(paged: ModelFactory, config: EngineConfig, kernels: Kernels) -> None:
    loaded = paged("llama")
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="differ from the model's own"):
        checked_executor(loaded, config, kernels=kernels)
    assert stages(paged, config, kernels) == ALL_STAGES


def test_whatever_differs_makes_another_key(paged: ModelFactory, kernels: Kernels) -> None:
    loaded = paged("llama")
    keys = [
        key_of(loaded, kernels),
        key_of(loaded, None),
        key_of(paged("llama", "bfloat16"), kernels),
        key_of(paged("llama", seed=1), kernels),
        key_of(loaded, kernels, block_size=32),
        key_of(loaded, kernels, prefill_chunk=128),
        key_of(loaded, kernels, cache_bytes=2**16),
        key_of(loaded, kernels, machine="another"),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    keys.append(key_of(loaded, kernels))
    torch.set_num_threads(threads)
    assert len(set(keys)) == len(keys)


def test_more_room_than_all_trials_need_makes_no_other_key(paged: ModelFactory, kernels: Kernels) -> None:
    loaded = paged("llama")
    larger = key_of(loaded, kernels, cache_bytes=2**23)
    assert larger == key_of(loaded, kernels)


def test_the_oldest_of_many_are_forgotten(tmp_path: Path) -> None:
    passed = PassedChecks(tmp_path)
    for number in range(70):
        passed.keep(str(number), FINDINGS)
    assert [number for number in range(70) if passed.find(str(number))] == list(range(6, 70))
    assert passed.find("69") == FINDINGS


@pytest.mark.parametrize("content", ["", "[]", '{"key": {"one_pass": true}}', "\0"])
def test_a_damaged_file_is_none_and_is_replaced(tmp_path: Path, content: str) -> None:
    passed = PassedChecks(tmp_path)
    (tmp_path / FILE_NAME).write_text(content)
    assert passed.find("key") is None
    passed.keep("key", FINDINGS)
    assert list(json.loads((tmp_path / FILE_NAME).read_text())) == ["key"]


def test_a_file_that_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    passed = PassedChecks(tmp_path)
    passed.keep("key", FINDINGS)
    (tmp_path / FILE_NAME).chmod(0o666)
    assert passed.find("key") is None
