"""How the devices of a replica share a model."""

from dataclasses import dataclass

from emberkv.errors import ConfigError
from emberkv.sim.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Layout:
    """Beside tensor parallelism, which divides every matrix and the heads among the devices.

    expert_parallel: a device has whole experts instead of a part of each. data_parallel_attention: a device computes
    the attention of its own sequences with all heads, and keeps their KV cache alone. peer_access: whether devices
    reach each other's memory directly; None: as the profile says.
    """

    expert_parallel: bool = False
    data_parallel_attention: bool = False
    peer_access: bool | None = None

    def check(self, model: ModelSpec, devices: int) -> None:
        """Raises ConfigError where so many devices cannot share the model like this."""
        if self.expert_parallel and not 1 < devices <= model.experts:
            raise ConfigError(
                f"expert_parallel with {devices} devices; {model.name} has {model.experts} experts to divide, "
                "and --tensor-parallel says among how many devices (at least 2)"
            )
        if self.data_parallel_attention and devices < 2:
            raise ConfigError("data_parallel_attention needs at least 2 devices; --tensor-parallel says how many")
        if not self.data_parallel_attention and (devices < 1 or model.heads % devices):
            raise ConfigError(f"tensor_parallel is {devices}; {model.name} has {model.heads} heads to share")


TENSOR_PARALLEL = Layout()
"""Nothing beside it, and links as the profile says."""
