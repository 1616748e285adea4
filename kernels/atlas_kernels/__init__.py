"""The ATLAS memory: a deep neural memory that learns, at test time, from a sliding window of the context."""

from atlas_kernels.features import FEATURE_MAPS, initial_coefficients, lift
from atlas_kernels.newton_schulz import newton_schulz
from atlas_kernels.op import omega_memory
from atlas_kernels.rule import Gates, MemoryRule, MemoryState

__all__ = [
    "FEATURE_MAPS",
    "Gates",
    "MemoryRule",
    "MemoryState",
    "initial_coefficients",
    "lift",
    "newton_schulz",
    "omega_memory",
]
