"""The memory's mathematics: the installed atlas_kernels, or, where there are none, the copies that travel with a model."""

try:
    from atlas_kernels import (
        DualState,
        Gates,
        MemoryRule,
        MemoryState,
        State,
        initial_coefficients,
        lift,
        lifted_width,
        omega_memory,
        read_memory,
    )
except ImportError:
    from .dual import DualState
    from .features import initial_coefficients, lift, lifted_width
    from .op import State, omega_memory, read_memory

    # transformers copies those siblings that a file names in this form; writes.py names this one in another.
    from .reads import widen  # noqa: F401
    from .rule import Gates, MemoryRule, MemoryState

__all__ = [
    "DualState",
    "Gates",
    "MemoryRule",
    "MemoryState",
    "State",
    "initial_coefficients",
    "lift",
    "lifted_width",
    "omega_memory",
    "read_memory",
]
