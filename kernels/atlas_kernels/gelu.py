"""GELU (tanh form) and its derivatives in few passes over memory: the element-wise cost of the chunk form.

h = z s,  s = sigmoid(u),  u = C (z + a z^3),  C = 2 sqrt(2 / pi),  a = 0.044715;  p = u' = C (1 + 3 a z^2):

    h'  = s + s (1 - s) z p
    h'' = s (1 - s) (4 p - 2 C + z p^2 (1 - 2 s))

The same function as with a tanh, and a vectorised sigmoid is several times cheaper on a CPU. Its derivative s (1 - s)
times something is one pass of torch's, `sigmoid_backward`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .autocast import unrounded_backward

SCALE = 2.0 * math.sqrt(2.0 / math.pi)
CUBIC = 0.044715


def gelu(z: Tensor) -> Tensor:
    """act(z), any shape; differentiable once."""
    return _Gelu.apply(z)


def gelu_with_derivative(z: Tensor) -> tuple[Tensor, Tensor]:
    """(act(z), act'(z)), any shape; differentiable once."""
    return _GeluWithDerivative.apply(z)


def _even(z: Tensor, constant: float, square: float) -> Tensor:
    """constant + square z^2, in one pass."""
    return torch.addcmul(z.new_full((), constant), z, z, value=square)


def _sigmoid(z: Tensor) -> Tensor:
    return _even(z, SCALE, CUBIC * SCALE).mul_(z).sigmoid_()


def _slope(z: Tensor) -> Tensor:
    return _even(z, SCALE, 3.0 * CUBIC * SCALE)


def _first(z: Tensor, s: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward(_slope(z).mul_(z), s).add_(s)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        s = _sigmoid(z)
        ctx.save_for_backward(z, s)
        return z * s

    @staticmethod
    @unrounded_backward
    def backward(ctx, grad: Tensor) -> Tensor:
        return _first(*ctx.saved_tensors).mul_(grad)


class _GeluWithDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> tuple[Tensor, Tensor]:
        s = _sigmoid(z)
        first = _first(z, s)
        ctx.save_for_backward(z, s, first)
        return z * s, first

    @staticmethod
    @unrounded_backward
    def backward(ctx, grad_h: Tensor, grad_first: Tensor) -> Tensor:
        z, s, first = ctx.saved_tensors
        p = _slope(z)
        bend = torch.rsub(s, 1, alpha=2).mul_(z).mul_(p).mul_(p)
        bend.add_(_even(z, 2.0 * SCALE, 12.0 * CUBIC * SCALE)).mul_(grad_first)
        return torch.ops.aten.sigmoid_backward(bend, s).addcmul_(grad_h, first)
