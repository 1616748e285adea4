"""Which GPU a launch is planned for: warps and blocks are not the same on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Without a GPU kernels are planned as for this one.
DEFAULT = 90

_planned: list[int] = []


def arch_of(device: torch.device) -> int:
    """90 of a GPU of compute capability 9.0, and so on."""
    if _planned:
        return _planned[-1]
    if device.type != "cuda":
        return DEFAULT
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextmanager
def planned_for(arch: int) -> Iterator[None]:
    """The launches of its block are planned for sm_<arch>, wherever their tensors are: to record what is compiled."""
    _planned.append(arch)
    try:
        yield
    finally:
        _planned.pop()
