"""What tests keep of this machine from run to run: compiled kernels, hashes of weight files."""

from pathlib import Path

MACHINE_CACHE = Path(__file__).parents[1] / "build" / "machine"
