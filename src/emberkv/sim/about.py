"""What a simulation computed: model, hardware and replicas, and which of them were defaults."""

from dataclasses import dataclass
from typing import Any

from emberkv import __version__
from emberkv.sim.build import Machine
from emberkv.sim.config import SimulationConfig
from emberkv.sim.words import count_words, size_words


@dataclass(frozen=True, slots=True)
class About:
    """model, hardware: None where three times (``rates``) stand for both. kv_bytes, kv_blocks: of one replica.

    defaults: which of model and hardware neither a file, an option nor a recording gave.
    """

    version: str
    model: str | None
    weights: str | None
    hardware: str | None
    devices: int
    replicas: int
    routing: str
    kv_bytes: int
    kv_blocks: int
    block_size: int
    defaults: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__} | {"defaults": list(self.defaults)}

    @property
    def machine_words(self) -> str:
        """One replica: model and devices."""
        if self.model is None:
            return "a machine given by its rates"
        devices = self.hardware if self.devices == 1 else f"{self.devices} x {self.hardware}"
        return f"{self.model} ({self.weights}) on {devices}"

    @property
    def memory_words(self) -> str:
        return (
            f"{size_words(self.kv_bytes)} of KV memory, {self.kv_blocks:,} blocks of "
            f"{count_words(self.block_size, 'token')}"
        )

    @property
    def words(self) -> str:
        """One sentence."""
        routed = f", routed by {self.routing}" if self.replicas > 1 else ""
        each = ", each with " if self.replicas > 1 else " with "
        return f"{self.machine_words}: {count_words(self.replicas, 'replica')}{routed}{each}{self.memory_words}."

    @property
    def defaults_words(self) -> str | None:
        """One sentence; None where all was chosen."""
        if not self.defaults:
            return None
        names = " and ".join(self.defaults)
        options = " and ".join(f"--{name}" for name in self.defaults)
        is_default = "is the default" if len(self.defaults) == 1 else "are defaults"
        return f"{names.capitalize()} {is_default}; {options} or the file's key simulation say otherwise."


def about(config: SimulationConfig, machine: Machine) -> About:
    model, profile = machine.model, machine.profile
    chosen = config.model_fields_set
    return About(
        version=__version__,
        model=None if model is None else model.name,
        weights=None if model is None else model.weights_dtype,
        hardware=None if profile is None else profile.name,
        devices=config.tensor_parallel,
        replicas=config.replicas,
        routing=config.routing,
        kv_bytes=machine.num_blocks * machine.block_bytes,
        kv_blocks=machine.num_blocks,
        block_size=machine.block_size,
        defaults=tuple(name for name in ("model", "hardware") if name not in chosen and model is not None),
    )
