"""One gate for writing and forgetting, which can be exactly zero: what is not worth a write leaves all as it was.

    w_t = clamp((1 + 2 s) sigmoid(x_t) - s, 0, 1)      s = STRETCH: 0 and 1 are reached where the sigmoid is near them
    eta_t = bound w_t                                  the step (and of a normalised write each gradient's weight)
    alpha_t = a_t^{w_t}                                retention: a token that writes nothing forgets nothing

A retention a hair under 1 forgets over a million tokens whatever was learned in a thousand; a gate that has learned
zeros does not. Nothing in a short context asks for them, so training adds a budget: weight x mean of sqrt(w + FLOOR),
whose slope grows towards zero and leaves no small values behind.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STRETCH = 0.1
FLOOR = 1e-4


def write_gate(logits: Tensor) -> Tensor:
    """w of the logits x, same shape and dtype, in [0, 1]."""
    return ((1 + 2 * STRETCH) * logits.sigmoid() - STRETCH).clamp(0, 1)


def write_logit(start: float) -> float:
    """The logit at which the write gate is `start`, between 0 and 1."""
    share = (start + STRETCH) / (1 + 2 * STRETCH)
    return math.log(share / (1 - share))


def retained(retention: Tensor, write: Tensor) -> Tensor:
    """a^w for the logits of a; exactly 1 where w is 0."""
    return (write * torch.nn.functional.logsigmoid(retention)).exp()


def budgeted(write: Tensor, weight: float) -> Tensor:
    """The same w; its gradient has that of weight x sum of sqrt(w + FLOOR) besides."""
    return _Budgeted.apply(write, weight) if weight and write.requires_grad else write


class _Budgeted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, write: Tensor, weight: float) -> Tensor:
        ctx.save_for_backward(write)
        ctx.weight = weight
        return write.view_as(write)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (write,) = ctx.saved_tensors
        return grad + 0.5 * ctx.weight * (write + FLOOR).rsqrt(), None
