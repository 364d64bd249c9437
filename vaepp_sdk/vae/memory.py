"""Memory: how much there is, when it was not enough, and how to get it back."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import torch

__all__ = ["host_room", "is_out_of_memory", "release", "room"]

# What says so without a class of its own: the CPU's allocator, and libraries that allocate beside torch.
_WORDS = re.compile(
    r"DefaultCPUAllocator: (can't|not enough) (allocate )?memory|CUDA error: out of memory|"
    r"CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED"
)
_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that this rank's memory was not enough."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_WORDS.search(str(error)))


def release(device: torch.device) -> None:
    """Give back what nothing holds any more. Inside an `except` block the traceback still holds much."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def room(device: torch.device, sharers: int) -> int | None:
    """Bytes that a rank could still allocate, or None where nobody can tell.

    Args:
        device: where it computes.
        sharers: ranks that share the host's memory, for a rank that computes on the CPU.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = host_room()
    return None if found is None else found // sharers


def host_room() -> int | None:
    """Bytes of host memory that are free or easily freed, within the limits of its control groups."""
    found = [value for value in (_meminfo("MemAvailable"), _cgroup_room()) if value is not None]
    return min(found, default=None)


def _meminfo(name: str) -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_room() -> int | None:
    """The least room of this process's control group and those around it, whose limits hold too."""
    own = next((line[3:] for line in _lines(_OWN_CGROUP) if line.startswith("0::")), "/")
    inner = _CGROUP / own.strip("/")
    found = [_room_in(group) for group in (inner, *inner.parents) if group.is_relative_to(_CGROUP)]
    return min((room for room in found if room is not None), default=None)


def _room_in(group: Path) -> int | None:
    limit, used = _lines(group / "memory.max"), _lines(group / "memory.current")
    if not limit or not used or not limit[0].isdigit():
        return None
    # File pages that have not been used of late count as used, and go when memory is asked for.
    idle = [line.split()[1] for line in _lines(group / "memory.stat") if line.startswith("inactive_file ")]
    return max(0, int(limit[0]) - int(used[0]) + int(idle[0] if idle else 0))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
