"""How much memory is free where a model computes, and what does not fit into it."""

from pathlib import Path

import psutil
import torch

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes free for allocation where ``device`` computes; of a CPU, at most what a container's limit leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    within = cgroup_free(_CGROUPS, _OWN_CGROUP)
    available = int(psutil.virtual_memory().available)
    return available if within is None else min(available, within)


def cgroup_free(mounted: Path, own: Path) -> int | None:
    """What this process' control group (version 2) and those above it leave; None where none has a limit.

    mounted: where groups are. own: the file that names this process'. What is only cached from files counts as free.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    inner = next((line[3:].strip("/") for line in lines if line.startswith("0::")), None)
    if inner is None:
        return None
    group = mounted / inner
    left = [_left_in(each) for each in (group, *group.parents) if each.is_relative_to(mounted)]
    return min((each for each in left if each is not None), default=None)


def _left_in(group: Path) -> int | None:
    limit, current, stat = group / "memory.max", group / "memory.current", group / "memory.stat"
    if not (limit.is_file() and current.is_file() and stat.is_file()) or limit.read_text().strip() == "max":
        return None
    figures = dict(line.split() for line in stat.read_text().splitlines())
    return max(0, int(limit.read_text()) - int(current.read_text()) + int(figures.get("inactive_file", 0)))


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
