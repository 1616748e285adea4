"""The memory's mathematics: the installed atlas_kernels, or, without them, the copies that travel with a model."""

import functools
from collections.abc import Callable

import torch

from .place_atlas import exporting

try:
    from atlas_kernels import (
        SILU_IS_ONE,
        DualState,
        Gates,
        MemoryRule,
        MemoryState,
        State,
        budgeted,
        copying,
        gated_norm,
        initial_coefficients,
        late_keys,
        lift,
        lifted_width,
        omega_memory,
        read_memory,
        retained,
        short_convolution,
        unrounded,
        write_gate,
        write_logit,
    )
except ImportError:
    from .autocast import unrounded  # type: ignore[no-redef]
    from .dual import DualState  # type: ignore[no-redef]
    from .edges import SILU_IS_ONE, copying, gated_norm, late_keys, short_convolution  # type: ignore[no-redef]
    from .features import initial_coefficients, lift, lifted_width  # type: ignore[no-redef]
    from .op import State, omega_memory, read_memory  # type: ignore[no-redef]

    # transformers copies those siblings that a file names in this form; writes.py names this one in another.
    from .reads import widen  # noqa: F401
    from .rule import Gates, MemoryRule, MemoryState  # type: ignore[no-redef]
    from .write_gate import budgeted, retained, write_gate, write_logit  # type: ignore[no-redef]



def uncompiled[**Given, Found](scan: Callable[Given, Found]) -> Callable[Given, Found]:
    """torch.compile leaves the inner loop as it is: its shapes follow documents and cuts, and the GPU has kernels for
    it. An exported graph takes it up, unrolled over the tokens."""
    left = torch.compiler.disable(scan)

    @functools.wraps(scan)
    def called(*given: Given.args, **named: Given.kwargs) -> Found:
        return scan(*given, **named) if exporting() else left(*given, **named)

    return called


omega_memory = uncompiled(omega_memory)
read_memory = uncompiled(read_memory)

__all__ = [
    "SILU_IS_ONE",
    "DualState",
    "Gates",
    "MemoryRule",
    "MemoryState",
    "State",
    "budgeted",
    "copying",
    "gated_norm",
    "initial_coefficients",
    "late_keys",
    "lift",
    "lifted_width",
    "omega_memory",
    "read_memory",
    "retained",
    "short_convolution",
    "unrounded",
    "write_gate",
    "write_logit",
]
