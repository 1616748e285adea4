"""DeltaNet (arXiv 2406.06484) and Gated DeltaNet (arXiv 2412.06464) as a memory's rule: their gates, and the call.

    DeltaNet          S_t = S_{t-1} - beta_t (S_{t-1} k_t - v_t) k_t^T
    Gated DeltaNet    S_t = alpha_t S_{t-1} - beta_t (alpha_t S_{t-1} k_t - v_t) k_t^T          y_t = S_t q_t,  S_0 = 0

Dims: B batch, T tokens, H heads, K = V head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import at_least_float32
from .op import State, omega_memory
from .rule import Gates, MemoryRule

RULE = MemoryRule(memory="linear", window=1, chunk=1, momentum=False, ns_steps=0)
# What a decay of e^-30 leaves is below the last digit of float32; a smaller one is taken as this.
LEAST_LOG_DECAY = -30.0
# Start ranges of Gated DeltaNet's decay exp(-rate x step), those of Mamba2: over 10 to 1000 tokens for a rate of 1.
RATES = (1.0, 16.0)
STEPS = (0.001, 0.1)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_alpha: Tensor | None = None,
    positions: Tensor | None = None,
    memory: State | None = None,
) -> tuple[Tensor, State]:
    """Write every token by the (gated) delta rule, and read it back: y [B, T, H, K], and the memory after.

    q, k of length 1, v [B, T, H, K]; beta [B, T, H] in [0, 1]; log_alpha [B, T, H], from LEAST_LOG_DECAY to 0, or None:
    nothing decays. positions, memory: `positions` and `state` of `omega_memory`. Raises ValueError as it does.

    The step of `omega_memory` is taken before the decay: M_t = alpha M_{t-1} - eta (M_{t-1} k - v') k^T. Gated
    DeltaNet's is that of eta = alpha beta and v' = v / alpha, whose product is beta v again: to the rounding of beta v,
    whatever alpha is, as long as v / alpha stays in range; LEAST_LOG_DECAY keeps it below 1.1e13 v. Its part of the
    derivative by log alpha is a difference of two equal terms, each of the size of the derivative by v: zero to their
    rounding.
    """
    one, step = torch.ones_like(beta), beta
    alpha = one if log_alpha is None else log_alpha.exp()
    if log_alpha is not None:
        step, v = alpha * beta, v * log_alpha.neg().exp().unsqueeze(-1)
    gates = Gates(alpha=alpha, eta=step, theta=torch.zeros_like(one), gamma=one)
    empty = v.new_zeros(v.shape[2], v.shape[3], k.shape[3])
    return omega_memory(q, k, v, gates, (empty,), RULE, state=memory, positions=positions)


def log_decay(logits: Tensor, rate_log: Tensor, bias: Tensor) -> Tensor:
    """log alpha = -exp(rate_log) softplus(logits + bias), and LEAST_LOG_DECAY at least; at least float32.

    logits [B, T, H]; rate_log, bias [H]. Returns [B, T, H].
    """
    step = F.softplus(logits + at_least_float32(bias))
    return (-at_least_float32(rate_log).exp() * step).clamp(min=LEAST_LOG_DECAY)


def initial_decay(heads: int) -> tuple[Tensor, Tensor]:
    """Where `rate_log` and `bias` of `log_decay` start, [H] float32: rates of RATES, steps of STEPS evenly in their
    logarithm, with softplus(bias) = step."""
    low, high = (math.log(step) for step in STEPS)
    step = torch.empty(heads).uniform_(low, high).exp()
    rate = torch.empty(heads).uniform_(*RATES)
    return rate.log(), step.expm1().log()
