"""The ATLAS memory: a deep neural memory that learns, at test time, from a sliding window of the context."""

from .autocast import at_least_float32, unrounded
from .dual import DualState
from .features import FEATURE_MAPS, initial_coefficients, lift, lifted_width
from .gated_norm import SILU_IS_ONE, gated_norm
from .local_memories import LocalMemories, LocalParameters, LocalState
from .newton_schulz import newton_schulz
from .op import State, check_implementation, omega_memory, read_memory
from .rule import Gates, MemoryRule, MemoryState, initial_state
from .short_conv import copying, late_keys, short_convolution
from .write_gate import budgeted, retained, write_gate, write_logit

__all__ = [
    "FEATURE_MAPS",
    "SILU_IS_ONE",
    "DualState",
    "Gates",
    "LocalMemories",
    "LocalParameters",
    "LocalState",
    "MemoryRule",
    "MemoryState",
    "State",
    "at_least_float32",
    "budgeted",
    "check_implementation",
    "copying",
    "gated_norm",
    "initial_coefficients",
    "initial_state",
    "late_keys",
    "lift",
    "lifted_width",
    "newton_schulz",
    "omega_memory",
    "read_memory",
    "retained",
    "short_convolution",
    "unrounded",
    "write_gate",
    "write_logit",
]
