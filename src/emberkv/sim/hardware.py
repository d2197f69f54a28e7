"""Hardware profiles: what a device can do, read from a data file that gives the source of every number."""

from bisect import bisect_right
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, NonNegativeFloat, PositiveFloat, ValidationError, model_validator

from emberkv.errors import ConfigError
from emberkv.validation import Strict, describe
from emberkv.yaml_files import parse_yaml

GB = 1e9
GIB = 2**30
TERA = 1e12
MICROSECOND = 1e-6

_WIDER = {
    "fp8": ("fp8", "bf16", "fp16", "fp32"),
    "bf16": ("bf16", "fp16", "fp32"),
    "fp16": ("fp16", "bf16", "fp32"),
    "fp32": ("fp32",),
}
"""The types in which a number type can be computed; the first one that the device has units for is taken."""

_NO_SOURCE = ("name", "description", "measured_with", "sources")
"""The fields of a profile for which ``sources`` need not say where they come from."""

Share = Annotated[float, Field(gt=0, le=1)]
Points = Annotated[list[Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)]], Field(min_length=1)]
"""[size, share of the peak that is reached there], sizes rising."""


class Curve:
    """A share of a peak by size: linear between its points on logarithmic axes, constant outside them.

    >>> curve = Curve([(1, 0.25), (16, 1.0)])
    >>> curve.at(0.5), round(curve.at(4), 6), curve.at(100)
    (0.25, 0.5, 1.0)
    """

    __slots__ = ("_first", "_high", "_last", "_log_shares", "_log_sizes", "_low")

    def __init__(self, points: Sequence[Sequence[float]]) -> None:
        self._log_sizes = [log(size) for size, _ in points]
        self._log_shares = [log(share) for _, share in points]
        (self._low, self._first), (self._high, self._last) = points[0], points[-1]

    def at(self, size: float) -> float:
        if size <= self._low:
            return self._first
        if size >= self._high:
            return self._last
        where = log(size)
        index = bisect_right(self._log_sizes, where, 1, len(self._log_sizes) - 1)
        left, right = self._log_sizes[index - 1], self._log_sizes[index]
        weight = (where - left) / (right - left)
        shares = self._log_shares
        return exp(shares[index - 1] + weight * (shares[index] - shares[index - 1]))


class Overheads(Strict):
    """Time besides the kernels, in microseconds.

    step: each step. launch: each forward pass of a step. layer: each layer of each pass. sequence: each decoding
    sequence. chunk: each prefill chunk. token: each prefilled token. all_reduce: each exchange between the devices of
    a tensor-parallel group, of which a layer makes two.

    >>> overheads = Overheads(step=150.0, sequence=2.5)
    >>> overheads.step + 64 * overheads.sequence
    310.0
    """

    step: NonNegativeFloat = 0.0
    launch: NonNegativeFloat = 0.0
    layer: NonNegativeFloat = 0.0
    sequence: NonNegativeFloat = 0.0
    chunk: NonNegativeFloat = 0.0
    token: NonNegativeFloat = 0.0
    all_reduce: NonNegativeFloat = 0.0


class TierRates(Strict):
    """How fast blocks come from a lower tier: the latency of one transfer, and bytes a second after that.

    >>> disk = TierRates(latency_us=100.0, read_gb_per_s=2.0, write_gb_per_s=1.0)
    >>> disk.latency_us * MICROSECOND + 4e6 / (disk.read_gb_per_s * GB)  # seconds for 4 MB
    0.0021
    """

    latency_us: NonNegativeFloat
    read_gb_per_s: PositiveFloat
    write_gb_per_s: PositiveFloat


class MeasuredWith(Strict):
    """What computed while a profile was measured: number types of weights and KV, and "native" or "torch" kernels.

    >>> str(MeasuredWith(weights="int8", kv="bf16", kernels="native"))
    'int8 weights, bf16 KV and native kernels'
    """

    weights: str
    kv: str
    kernels: str

    def __str__(self) -> str:
        return f"{self.weights} weights, {self.kv} KV and {self.kernels} kernels"


class HardwareProfile(Strict):
    """One device, and how its kernels fall short of its peaks.

    peak_tflops: by number type (bf16, fp16, fp8, fp32), dense. link_gb_per_s: one direction, to the other devices of
    a tensor-parallel group, with direct access to their memory; None: alone. host_link_gb_per_s: the same through the
    host's memory, without direct access. peer_access: whether there is direct access by default. gemm_bandwidth: share
    of the memory bandwidth that matrix products of few rows reach. gemm_compute: share of the peak by rows.
    prefill_attention: share of the peak by tokens. decode_attention: share of the bandwidth by megabytes of keys and
    values read in one layer; it never takes less than attention_floor_us. passes: whether a step is one forward pass,
    or the decodes are one and each prefill chunk another. last_layer: whether its attention and what follows, experts
    apart, are computed for all rows, or for those alone whose logits are wanted. runtime_gib: memory that the runtime
    itself takes. request_us, request_token_us: what a request and each token of its prompt cost beside its steps.
    tiers: rates of the lower tiers. price_per_hour: dollars for one device with its share of the machine.
    measured_with: of a profile that `calibrate` wrote. sources: where each of these comes from, by its name.

    >>> profile = load_profile("h100")
    >>> profile.name, profile.memory_gib, profile.flops("bf16") / 1e12
    ('H100 SXM', 80.0, 989.4)
    """

    name: str
    description: str = ""
    memory_gib: PositiveFloat
    memory_gb_per_s: PositiveFloat
    peak_tflops: Annotated[dict[str, PositiveFloat], Field(min_length=1)]
    link_gb_per_s: PositiveFloat | None = None
    host_link_gb_per_s: PositiveFloat | None = None
    peer_access: bool = True
    gemm_bandwidth: Share
    gemm_compute: Points
    prefill_attention: Points
    decode_attention: Points
    attention_floor_us: NonNegativeFloat = 0.0
    overheads_us: Overheads
    passes: Literal["one", "each"] = "one"
    last_layer: Literal["all", "wanted"] = "all"
    runtime_gib: NonNegativeFloat = 0.0
    request_us: NonNegativeFloat = 0.0
    request_token_us: NonNegativeFloat = 0.0
    tiers: dict[str, TierRates] = Field(default_factory=dict)
    price_per_hour: PositiveFloat | None = None
    measured_with: MeasuredWith | None = None
    sources: dict[str, str]

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if unknown := set(self.peak_tflops) - set(_WIDER):
            raise ValueError(f"peak_tflops: {', '.join(sorted(unknown))} is not among {', '.join(_WIDER)}")
        for name, power in (("gemm_compute", 1), ("decode_attention", 1), ("prefill_attention", 2)):
            _check_points(name, getattr(self, name), power)
        given = {name for name in self.model_fields_set if name not in _NO_SOURCE}
        if missing := given - set(self.sources):
            raise ValueError(f"sources does not say where {', '.join(sorted(missing))} comes from")
        return self

    @property
    def memory_bytes(self) -> int:
        return round(self.memory_gib * GIB)

    @property
    def bytes_per_second(self) -> float:
        return self.memory_gb_per_s * GB

    def link(self, peer_access: bool | None = None) -> float:
        """GB a second to the other devices, with or without direct access; by default as the device has it.

        Raises ConfigError where the profile has no such rate.
        """
        direct = self.peer_access if peer_access is None else peer_access
        rate = self.link_gb_per_s if direct else self.host_link_gb_per_s
        if rate is None:
            raise ConfigError(
                f"{self.name} has no link to others {'with' if direct else 'without'} direct access: its profile has "
                f"no {'link_gb_per_s' if direct else 'host_link_gb_per_s'}"
            )
        return rate

    def flops(self, dtype: str) -> float:
        """Operations a second in ``dtype``; in the nearest wider type where the device has no units for it."""
        for name in _WIDER[dtype]:
            if name in self.peak_tflops:
                return self.peak_tflops[name] * TERA
        raise ConfigError(f"{self.name} has no peak for {dtype}; it has {', '.join(self.peak_tflops)}")


def _check_points(name: str, points: list[list[float]], power: int) -> None:
    """Sizes rise, and more work never takes less time: size^power / share does not fall."""
    for (size, share), (larger, other) in pairwise(points):
        if larger <= size:
            raise ValueError(f"{name}: size {larger:g} comes after {size:g}; sizes must rise")
        if larger**power / other < size**power / share:
            raise ValueError(f"{name}: {larger:g} at {other:g} would take less time than {size:g} at {share:g}")
    if any(share > 1 for _, share in points):
        raise ValueError(f"{name}: shares must be at most 1")


def profile_names() -> list[str]:
    return sorted(each.name.removesuffix(".yaml") for each in (files("emberkv.sim") / "profiles").iterdir())


def load_profile(hardware: str) -> HardwareProfile:
    """A named profile, or a YAML file. Raises ConfigError naming what is accepted."""
    path = Path(hardware)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        source: Any = path
    elif hardware.lower() in profile_names():
        source = files("emberkv.sim") / "profiles" / f"{hardware.lower()}.yaml"
    else:
        known = ", ".join(profile_names())
        raise ConfigError(f"no hardware {hardware!r}; give a .yaml file or one of {known}")
    try:
        return parse_profile(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{source}: {error}") from error


def parse_profile(text: str) -> HardwareProfile:
    """A profile from YAML. Raises ConfigError naming each key at fault."""
    try:
        return HardwareProfile.model_validate(parse_yaml(text, ConfigError))
    except ValidationError as error:
        raise ConfigError(describe(error)) from error


def dump_profile(profile: HardwareProfile) -> str:
    """The YAML that `parse_profile` reads back as the same profile."""
    values = profile.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(values, sort_keys=False, width=120, allow_unicode=True, default_flow_style=None)
