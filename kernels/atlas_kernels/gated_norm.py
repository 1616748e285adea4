"""What a memory's reads go out through: a norm by head, a gain and an output gate (paper Fig 3); and MAG's joint.

Dims: B batch, T tokens, H heads, K head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .short_conv import gpu_edges

SILU_IS_ONE = 1.2784645  # where SiLU is 1


def gated_norm(y: Tensor, gate: Tensor, gain: Tensor, epsilon: float, impl: str = "auto") -> Tensor:
    """RMS norm of every head's read, times its gain and the output gate's SiLU:

        y / sqrt(mean(y^2) + epsilon) * gain * silu(gate)

    y, gate [B, T, H, K]; gain [H, K]; impl: as for `short_convolution`. Returns [B, T, H, K] in the gate's dtype.
    """
    if gpu := gpu_edges(y, impl):
        return gpu.gated_norm(y, gate, gain, epsilon)
    return head_norm(y, gain, epsilon).to(gate.dtype) * F.silu(gate)


def head_norm(y: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """RMS norm of every head on its own, times its gain: y / sqrt(mean(y^2) + epsilon) * gain.

    y [..., H, K]; gain [H, K]. Returns [..., H, K] in y's dtype.
    """
    return F.rms_norm(y, y.shape[-1:], eps=epsilon) * gain.to(y.dtype)


def open_gate(heads: int, head_dim: int) -> Tensor:
    """The start [H, K], float32, of the output gate's bias, at which SiLU is one."""
    return torch.full((heads, head_dim), SILU_IS_ONE)


def memory_as_gate(
    attention: Tensor, memory: Tensor, attention_gain: Tensor, memory_gain: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The factors of MAG's output, y = norm(attention) * silu(norm(memory)) (Titans, arXiv 2501.00663, section 4.2).

    attention, memory [..., hidden]: what the two branches give; attention_gain, memory_gain [hidden]: of their RMS
    norms. Returns (norm(attention), silu(norm(memory))), [..., hidden] each in the branch's dtype.
    """
    # Under autocast the gains are wider than what they scale.
    gate = F.silu(F.rms_norm(memory, memory_gain.shape, memory_gain.to(memory.dtype), epsilon))
    return F.rms_norm(attention, attention_gain.shape, attention_gain.to(attention.dtype), epsilon), gate
