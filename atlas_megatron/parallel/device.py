"""The device that this process computes on."""

from __future__ import annotations

import torch

CPU = torch.device("cpu")


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
