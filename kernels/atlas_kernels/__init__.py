"""The ATLAS memory: a deep neural memory that learns, at test time, from a sliding window of the context."""

from atlas_kernels.dual import DualState
from atlas_kernels.features import FEATURE_MAPS, initial_coefficients, lift, lifted_width
from atlas_kernels.newton_schulz import newton_schulz
from atlas_kernels.op import State, omega_memory, read_memory
from atlas_kernels.rule import Gates, MemoryRule, MemoryState, initial_state

__all__ = [
    "FEATURE_MAPS",
    "DualState",
    "Gates",
    "MemoryRule",
    "MemoryState",
    "State",
    "initial_coefficients",
    "initial_state",
    "lift",
    "lifted_width",
    "newton_schulz",
    "omega_memory",
    "read_memory",
]
