"""What is free, and what does not fit."""

from pathlib import Path

import pytest
import torch

from emberkv.engine.torch.assembly import DEFAULT_CONTEXTS, CacheSizes
from emberkv.engine.torch.model.loader import cgroup_free, check_memory, free_memory, gib, load_model
from emberkv.errors import ConfigError, ModelError
from emberkv.serving.engine_setup import cache_sizes
from emberkv.settings import serve_config
from tests.conftest import CheckpointFactory

CPU = torch.device("cpu")


def group(folder: Path, limit: str, current: int, cached: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    return folder


def test_free_memory_is_counted() -> None:
    assert free_memory(CPU) > 0


def test_a_containers_limit_counts_and_so_do_those_above_it(tmp_path: Path) -> None:
    own, mounted = tmp_path / "own", tmp_path / "cgroup"
    assert cgroup_free(mounted, own) is None
    own.write_text("1:name=systemd:/old\n0::/pods/one\n")
    group(mounted / "pods" / "one", "max", 300)
    assert cgroup_free(mounted, own) is None
    group(mounted / "pods", "1000", 700, cached=200)
    assert cgroup_free(mounted, own) == 500
    group(mounted / "pods" / "one", "400", 300)
    assert cgroup_free(mounted, own) == 100
    group(mounted / "pods" / "one", "200", 300)
    assert cgroup_free(mounted, own) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache_ram": "100TiB"}, r"^--cache-ram is 102,400.0 GiB; [\d.,]+ [GM]iB are free$"),
        ({"ram_tier": "9999TiB"}, r"^--ram-tier is 10,238,976.0 GiB; [\d.,]+ [GM]iB are free$"),
        ({"cache_ram": "1MiB", "ram_tier": "9TiB"}, r"^--ram-tier is .* are free beside --cache-ram$"),
    ],
)
def test_sizes_that_no_machine_has(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cache_sizes(serve_config(given, {})).check(CPU)


def test_weights_that_no_machine_holds() -> None:
    with pytest.raises(ModelError, match=r"the weights in m take 65,536.0 GiB as bfloat16; .* are free on cpu"):
        check_memory(Path("m"), 2**46, torch.bfloat16, CPU)


def test_the_pool_of_a_small_model_is_some_contexts(checkpoint: CheckpointFactory) -> None:
    loaded = load_model(str(checkpoint("llama")), device="cpu")
    one = loaded.context_length * loaded.geometry.bytes_per_token(loaded.dtypes.kv)
    assert CacheSizes().pool_bytes(loaded) == DEFAULT_CONTEXTS * one
    assert CacheSizes(3 * 2**20).pool_bytes(loaded) == 3 * 2**20
    blocks = -(-loaded.context_length // 48)
    assert loaded.context_length % 48
    given = CacheSizes(block_size=48).pool_bytes(loaded)
    assert given == DEFAULT_CONTEXTS * blocks * loaded.geometry.block_bytes(loaded.dtypes.kv, 48)


def test_sizes_are_written_for_people() -> None:
    assert [gib(number) for number in (3 * 2**20, 2**30 - 1, 3 * 2**29)] == ["3.0 MiB", "1,024.0 MiB", "1.5 GiB"]
