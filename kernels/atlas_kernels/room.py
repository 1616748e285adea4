"""How much one call may hold for its backward: a share of the memory that is free when it is made.

A trainer holds the graphs of all its layers at once. Each call looks at what is left, so earlier layers hold and, when
memory fills, later ones recompute: L calls of a share s leave at least (1 - s)^L of what was free, a fifth after 24 of
them on a GPU and after 12 on a CPU. A GPU's share is the smaller one, because its first step has yet to make the
optimizer's state. In torch both ways give equal bits for windows up to a chunk, so a rerun that finds other memory free
does not differ (a test).
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

SHARES = {"cuda": 1 / 16, "cpu": 1 / 8}
# A call whose graph is smaller than this holds it without asking.
ALWAYS = 256 << 20


def may_hold(graph: float, device: torch.device, limit: float | None = None) -> bool:
    """Whether a call on `device` may hold a graph of so many bytes; limit: bytes that are allowed, in place of asking.

    Neither waits for a GPU nor calls its driver after the first time, which a CUDA graph would forbid.
    """
    if limit is not None:
        return graph <= limit
    return graph <= ALWAYS or device.type == "meta" or graph <= SHARES.get(device.type, 0.0) * _free(device)


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        return _room_of_gpu(device) - torch.cuda.memory_allocated(device)
    # Ranks that torchrun starts beside this one ask at the same time.
    return _free_of_host() / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 0.0


@functools.cache
def _room_of_gpu(device: torch.device) -> int:
    """Bytes that this process can allocate on a GPU in all; asked once, for a capture may not ask the driver."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _free_of_host() -> float:
    """Bytes that a CPU's process can take without swapping, as Linux estimates them; half of all elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0.5 * _all_of_host()
    return min([free, *(limit - used for limit, used in _control_groups())])


def _all_of_host() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 0.0


def _control_groups() -> list[tuple[float, float]]:
    """(limit, used) of this process's container, in bytes, where it has one: of the second and the first version."""
    found = []
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            found.append((float(Path(limit).read_text()), float(Path(used).read_text())))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return found
