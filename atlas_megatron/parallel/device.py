"""The device that this process computes on."""

from __future__ import annotations

import ctypes

import torch

CPU = torch.device("cpu")
# Options of glibc's mallopt: how many allocations get pages of their own; what is left at the end and given back.
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1


def device() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def backend() -> str:
    """The torch.distributed backend for that device: nccl or gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def flush_denormals() -> None:
    """Let a CPU take numbers nearer to zero than float32's normal ones (1.2e-38) for zero.

    A memory that forgets decays through them: kept, they made a step of 4,096 tokens five times slower. Threads that
    are started later do the same, so this comes before the first large operation.
    """
    torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """Let the C library keep what a CPU's tensors free for the next ones, in place of giving it back to the system.

    Each step holds the same graph, and new pages come one by one and filled with zeros: a fifth of a step's time where
    the graph has a gigabyte. Only glibc is asked; the process then stays as large as it once was.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
        set_option(option, value)
