"""A device for calculations by hand: everything reaches its peak, nothing costs extra."""

from emberkv.sim.hardware import HardwareProfile, Overheads
from emberkv.sim.model_spec import ModelSpec

FLAT = HardwareProfile(
    name="flat",
    memory_gib=1.0,
    memory_gb_per_s=1.0,
    peak_tflops={"bf16": 0.001},
    link_gb_per_s=0.5,
    gemm_bandwidth=1.0,
    gemm_compute=[[1, 1.0]],
    prefill_attention=[[1, 1.0]],
    decode_attention=[[1, 1.0]],
    overheads_us=Overheads(),
    sources=dict.fromkeys(
        (
            "memory_gib", "memory_gb_per_s", "peak_tflops", "link_gb_per_s", "gemm_bandwidth", "gemm_compute",
            "prefill_attention", "decode_attention", "overheads_us",
        ),
        "made up",
    ),
)  # fmt: skip
"""10^9 bytes and 10^9 operations a second: a byte or an operation is a nanosecond."""

TINY = ModelSpec(
    name="tiny", layers=2, hidden=8, heads=4, kv_heads=2, head_dim=2, intermediate=16, vocab=32, context=4096
)  # fmt: skip


def with_overheads(**microseconds: float) -> HardwareProfile:
    return FLAT.model_copy(update={"overheads_us": Overheads(**microseconds)})
