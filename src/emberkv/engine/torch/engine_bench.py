"""An engine on the measuring bench: a model's, loaded as a server loads it, and how long its parts take here."""

import statistics
from collections import defaultdict

import torch

from emberkv.engine.assembly import EngineConfig
from emberkv.engine.torch.assembly import assemble
from emberkv.engine.torch.calibration import (
    LinearTime,
    PrefillBench,
    TransferTime,
    device_memory,
    prefill_grid,
    time_linears,
    time_tier,
)
from emberkv.engine.torch.configured import CacheSizes, ModelOptions, ProgressCallback, load_configured
from emberkv.engine.torch.engine import TorchEngine
from emberkv.tiers.base import Tier

DEFAULT_CACHE_BYTES = 256 * 2**20
"""Of the KV pool while times are measured, where its size is not given."""


class EngineBench:
    """Loads the model of ``options`` and times its linear layers at once, as ``linears``.

    config: the engine's settings.

    On CPU, make it on a thread that ends: as long as the thread of an OpenMP team lives, the team counts, and with more
    of them than cores, those of other threads sleep between operations. The engine's steps then take twice as long.
    """

    def __init__(self, options: ModelOptions, config: EngineConfig, on_progress: ProgressCallback) -> None:
        self.loaded, kernels = load_configured(options, CacheSizes(config.cache_bytes), on_progress)
        self._config = config
        self._engine = assemble(self.loaded, config, kernels=kernels)
        assert isinstance(self._engine.executor, TorchEngine)
        self._executor = self._engine.executor
        on_progress("matrix products")
        self.linears: list[LinearTime] = time_linears(self.loaded.model)

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    @property
    def memory(self) -> int:
        """Bytes of it where the model is."""
        return device_memory(self.device)

    @property
    def alignment(self) -> int:
        """Tokens of the unit in which state can be reused."""
        return self._executor.alignment

    @property
    def one_pass(self) -> bool:
        """Whether a step is one forward pass."""
        return self._executor.one_pass

    @property
    def last_layer_spares(self) -> bool:
        """Whether the last layer attends, and goes on, only for rows whose logits are wanted."""
        return self._executor.kernels is not None

    def prefills(self, rounds: int, on_progress: ProgressCallback) -> dict[tuple[int, int], float]:
        """Seconds of prefills of the tokens ``[start, stop)``, those before being cached; the engine runs meanwhile.

        The median of rounds over all: a machine's pace changes, for seconds at a time.
        """
        config, loop = self._config, self._engine.loop
        budget = config.max_step_tokens if self.one_pass else config.prefill_chunk
        grid = list(prefill_grid(loop.context_length, self.alignment, budget))
        bench = PrefillBench(loop, self.loaded.geometry.vocab_size)
        found: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
        loop.start()
        try:
            for number in range(1, rounds + 1):
                on_progress(f"first tokens, round {number} of {rounds}")
                for start, stop in grid:
                    found[start, stop].append(bench.prefill(start, stop))
        finally:
            loop.stop()
        return {prefill: statistics.median(seconds) for prefill, seconds in found.items()}

    def tier(self, tier: Tier) -> TransferTime:
        """The transfers of blocks of this engine's size to and from ``tier``."""
        return time_tier(tier, self._executor.pool.block_bytes, self._config.block_size)
