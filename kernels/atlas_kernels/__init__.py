"""The ATLAS memory: a deep neural memory that learns, at test time, from a sliding window of the context."""

from .autocast import unrounded
from .dual import DualState
from .edges import SILU_IS_ONE, copying, gated_norm, late_keys, short_convolution
from .features import FEATURE_MAPS, initial_coefficients, lift, lifted_width
from .newton_schulz import newton_schulz
from .op import State, check_implementation, omega_memory, read_memory
from .rule import Gates, MemoryRule, MemoryState, initial_state
from .write_gate import budgeted, retained, write_gate, write_logit

__all__ = [
    "FEATURE_MAPS",
    "SILU_IS_ONE",
    "DualState",
    "Gates",
    "MemoryRule",
    "MemoryState",
    "State",
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
