"""The memories in factored form, for the chunk form: what each one gives to a sum of rank-one gradients.

A memory is its number of matrices and two functions. `factors`: the gradient of the inner loss at the anchor as
one (left, right) pair a matrix, gradient = sum_i left_i right_i^T, never formed. `read`: the memory's output,
written over `apply(j, x)`, which multiplies token t's vector by matrix j as it stands after token t's write.

Dims: G = B x H memories side by side, I tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_kernels.reference import LAYER_NORM_EPSILON
from atlas_kernels.rule import MemoryRule

Apply = Callable[[int, Tensor], Tensor]
Factors = tuple[tuple[Tensor, Tensor], ...]


class Memory(Protocol):
    """One row of MATH's table of memories."""

    matrices: int

    def factors(self, anchor: tuple[Tensor, ...], x: Tensor, v: Tensor, r: Tensor | None) -> Factors:
        """anchor: [G, rows, cols] each; x [G, I, D], v and r [G, I, V] -> ([G, I, rows], [G, I, cols]) a matrix."""

    def read(self, apply: Apply, x: Tensor, r: Tensor | None) -> Tensor:
        """x [G, I, D], r [G, I, V] -> [G, I, V]."""


class Linear:
    """M(x) = W x."""

    matrices = 1

    def factors(self, anchor: tuple[Tensor, ...], x: Tensor, v: Tensor, r: Tensor | None) -> Factors:
        return ((torch.baddbmm(v, x, anchor[0].mT, beta=-1), x),)

    def read(self, apply: Apply, x: Tensor, r: Tensor | None) -> Tensor:
        return apply(0, x)


class Mlp:
    """M(x) = r + W1 gelu(W2 x), or r + LN(W1 gelu(W2 x)) (paper Eq 42)."""

    matrices = 2

    def __init__(self, output_norm: bool) -> None:
        self.output_norm = output_norm

    def factors(self, anchor: tuple[Tensor, ...], x: Tensor, v: Tensor, r: Tensor | None) -> Factors:
        W1, W2 = anchor
        z = torch.bmm(x, W2.mT)
        h = F.gelu(z, approximate="tanh")
        o = torch.bmm(h, W1.mT)
        e = (r - v) + _normalise(o) if self.output_norm else (r - v) + o
        if self.output_norm:
            e = _normalise_backward(e, o)
        # gelu_backward(g, z) = g * act'(z) in one pass; torch differentiates it again.
        d = torch.ops.aten.gelu_backward(torch.bmm(e, W1), z, approximate="tanh")
        return (e, h), (d, x)

    def read(self, apply: Apply, x: Tensor, r: Tensor | None) -> Tensor:
        o = apply(0, F.gelu(apply(1, x), approximate="tanh"))
        return r + (_normalise(o) if self.output_norm else o)


def _normalise(o: Tensor) -> Tensor:
    return F.layer_norm(o, o.shape[-1:], eps=LAYER_NORM_EPSILON)


def _normalise_backward(e: Tensor, o: Tensor) -> Tensor:
    """J^T e, J the Jacobian of the layer norm at o: what autograd's own layer norm computes."""
    _, mean, rstd = torch.native_layer_norm(o, o.shape[-1:], None, None, LAYER_NORM_EPSILON)
    only_input = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(e, o, o.shape[-1:], mean, rstd, None, None, only_input)[0]


def memory_of(rule: MemoryRule) -> Memory:
    """The factored form of `rule.memory`."""
    return Linear() if rule.memory == "linear" else Mlp(output_norm=rule.norm == "layer")
