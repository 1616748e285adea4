"""Where every random stream of this process stands: read, set, and kept through what must not move it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from megatron.core import tensor_parallel


def random_state() -> dict[str, Any]:
    """Of Python, numpy, torch, this GPU and Megatron's streams; as a checkpoint holds it."""
    kind, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from what `random_state` gave."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.cuda.set_rng_state(state["cuda"])
    torch.set_rng_state(state["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])


@contextmanager
def kept() -> Iterator[None]:
    """Afterwards every stream stands where it stood, whatever was drawn within."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
