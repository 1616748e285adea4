"""GELU (tanh form) and its derivatives in few passes over memory: the element-wise cost of the chunk form.

h = z s,  s = sigmoid(u),  u = C (z + a z^3),  C = 2 sqrt(2 / pi),  a = 0.044715;  p = u' = C (1 + 3 a z^2):

    h'  = s (1 + z (1 - s) p)
    h'' = s (1 - s) (p (4 + z p (1 - 2 s)) - 2 C)

The same function as with a tanh, and a vectorised sigmoid is several times cheaper on a CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_C = 2.0 * math.sqrt(2.0 / math.pi)
_A = 0.044715


def gelu(z: Tensor) -> Tensor:
    """act(z), any shape; differentiable once."""
    return _Gelu.apply(z)


def gelu_with_derivative(z: Tensor) -> tuple[Tensor, Tensor]:
    """(act(z), act'(z)), any shape; differentiable once."""
    return _GeluWithDerivative.apply(z)


def _sigmoid(z: Tensor) -> Tensor:
    return (z * z).mul_(_A * _C).add_(_C).mul_(z).sigmoid_()


def _slope(z: Tensor) -> Tensor:
    return (z * z).mul_(3.0 * _A * _C).add_(_C)


def _first(z: Tensor, s: Tensor) -> Tensor:
    return _slope(z).mul_(z).mul_(1.0 - s).add_(1.0).mul_(s)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        s = _sigmoid(z)
        ctx.save_for_backward(z, s)
        return z * s

    @staticmethod
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
    def backward(ctx, grad_h: Tensor, grad_first: Tensor) -> Tensor:
        z, s, first = ctx.saved_tensors
        p = _slope(z)
        second = (1.0 - 2.0 * s).mul_(z).mul_(p).add_(4.0).mul_(p).sub_(2.0 * _C).mul_(s).mul_(1.0 - s)
        return second.mul_(grad_first).addcmul_(grad_h, first)
