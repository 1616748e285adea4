"""GELU (tanh form) and its derivatives in few passes over memory: the element-wise cost of the chunk form.

h = z s,  s = sigmoid(u),  u = C (z + a z^3),  C = 2 sqrt(2 / pi),  a = 0.044715;  p = u' = C (1 + 3 a z^2):

    h'  = s + s (1 - s) z p
    h'' = s (1 - s) (p (4 - z p (2 s - 1)) - 2 C)

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


def sigmoid_of(z: Tensor, out: Tensor | None = None) -> Tensor:
    """s, of which act(z) = z s. out: a tensor of z's shape to write to, here and below."""
    return _even(z, SCALE, CUBIC * SCALE, out).mul_(z).sigmoid_()


def first_derivative(z: Tensor, s: Tensor, out: Tensor | None = None) -> Tensor:
    """act'(z)."""
    along = _even(z, SCALE, 3.0 * CUBIC * SCALE, out).mul_(z)
    return _bent(along, s).add_(s)


def second_derivative(z: Tensor, s: Tensor, times: Tensor, out: Tensor | None = None) -> Tensor:
    """act''(z) `times` a tensor of z's shape."""
    p = _even(z, SCALE, 3.0 * CUBIC * SCALE)
    along = torch.mul(z, p, out=out)
    bend = along.addcmul_(along, s, value=-2.0).add_(4.0)
    bend = torch.addcmul(z.new_full((), -2.0 * SCALE), p, bend, out=bend).mul_(times)
    return _bent(bend, s)


def _even(z: Tensor, constant: float, square: float, out: Tensor | None = None) -> Tensor:
    """constant + square z^2, in one pass."""
    return torch.addcmul(z.new_full((), constant), z, z, value=square, out=out)


def _bent(t: Tensor, s: Tensor) -> Tensor:
    """t s (1 - s), in t."""
    return torch.ops.aten.sigmoid_backward.grad_input(t, s, grad_input=t)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        s = sigmoid_of(z)
        ctx.save_for_backward(z, s)
        return z * s

    @staticmethod
    @unrounded_backward
    def backward(ctx, grad: Tensor) -> Tensor:
        return first_derivative(*ctx.saved_tensors).mul_(grad)


class _GeluWithDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> tuple[Tensor, Tensor]:
        s = sigmoid_of(z)
        first = first_derivative(z, s)
        ctx.save_for_backward(z, s, first)
        return z * s, first

    @staticmethod
    @unrounded_backward
    def backward(ctx, grad_h: Tensor, grad_first: Tensor) -> Tensor:
        z, s, first = ctx.saved_tensors
        return second_derivative(z, s, grad_first).addcmul_(grad_h, first)
