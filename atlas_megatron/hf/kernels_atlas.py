"""The layers' mathematics: the installed atlas_kernels, or, without them, the copies that travel with a model."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from .place_atlas import exporting

try:
    from atlas_kernels import (
        DualState,
        Gates,
        LocalMemories,
        LocalParameters,
        LocalState,
        MemoryRule,
        MemoryState,
        State,
        at_least_float32,
        attention,
        cells,
        copying,
        gated_delta,
        gated_norm,
        late_keys,
        layer_start,
        local_memories,
        omega_memory,
        read_memory,
        short_convolution,
        unrounded,
    )
    from atlas_kernels.gated_norm import head_norm, memory_as_gate, open_gate
    from atlas_kernels.short_conv import initial_taps
except ImportError:
    from . import attention, cells, gated_delta, layer_start, local_memories  # type: ignore[attr-defined, no-redef]
    from .autocast import at_least_float32, unrounded  # type: ignore[no-redef]
    from .dual import DualState  # type: ignore[no-redef]
    from .gated_norm import gated_norm, head_norm, memory_as_gate, open_gate  # type: ignore[no-redef]
    from .local_memories import LocalMemories, LocalParameters, LocalState  # type: ignore[no-redef]
    from .op import State, omega_memory, read_memory  # type: ignore[no-redef]

    # transformers copies those siblings that a file names in this form; writes.py names this one in another.
    from .reads import widen  # noqa: F401
    from .rule import Gates, MemoryRule, MemoryState  # type: ignore[no-redef]
    from .short_conv import copying, initial_taps, late_keys, short_convolution  # type: ignore[no-redef]


Given = ParamSpec("Given")
Found = TypeVar("Found")


def uncompiled(scan: Callable[Given, Found]) -> Callable[Given, Found]:
    """torch.compile leaves the inner loop as it is: its shapes follow documents and cuts, and the GPU has kernels for
    it. An exported graph takes it up, unrolled over the tokens."""
    left = torch.compiler.disable(scan)

    @functools.wraps(scan)
    def called(*given: Given.args, **named: Given.kwargs) -> Found:
        return scan(*given, **named) if exporting() else left(*given, **named)

    return called


omega_memory = uncompiled(omega_memory)
read_memory = uncompiled(read_memory)
read_locals = uncompiled(LocalMemories.__call__)
gated_delta_rule = uncompiled(gated_delta.gated_delta_rule)

__all__ = [
    "DualState",
    "Gates",
    "LocalMemories",
    "LocalParameters",
    "LocalState",
    "MemoryRule",
    "MemoryState",
    "State",
    "at_least_float32",
    "attention",
    "cells",
    "copying",
    "gated_delta",
    "gated_delta_rule",
    "gated_norm",
    "head_norm",
    "initial_taps",
    "late_keys",
    "layer_start",
    "local_memories",
    "memory_as_gate",
    "omega_memory",
    "open_gate",
    "read_locals",
    "read_memory",
    "short_convolution",
    "unrounded",
]
