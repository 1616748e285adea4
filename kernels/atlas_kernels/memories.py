"""The memories in factored form, for the chunk form: what each one gives to a sum of rank-one gradients.

A memory's matrices meet its hidden width (wide, F) and its input or output (narrow, D or V). The chunk form keeps each
as [G, wide, narrow], W1 transposed, so that one code serves them all; `factors` gives the gradient of the inner loss
at the anchor as one pair a matrix, gradient = sum_i wide_i narrow_i^T, never formed; `read` is the memory's output,
written over the two ways to multiply by a matrix as it stands after token t's write.

Dims: G = B x H memories side by side, I tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from atlas_kernels.gelu import gelu, gelu_with_derivative
from atlas_kernels.layer_norm import layer_norm, pull_through_layer_norm
from atlas_kernels.products import times_transpose
from atlas_kernels.rule import MemoryRule

Matrices = tuple[Tensor, ...]
Factors = tuple[tuple[Tensor, Tensor], ...]


class Reader(Protocol):
    """Multiplies each token's vector by matrix j after that token's write, without forming the matrix."""

    def widen(self, j: int, x: Tensor) -> Tensor:
        """[G, C, narrow] -> [G, C, wide]: M_t x_t."""

    def narrow(self, j: int, h: Tensor) -> Tensor:
        """[G, C, wide] -> [G, C, narrow]: M_t^T h_t."""


class Memory(Protocol):
    """One row of MATH's table of memories."""

    @property
    def transposed(self) -> tuple[bool, ...]:
        """For each matrix: whether the chunk form keeps its transpose."""

    def factors(self, anchor: Matrices, x: Tensor, v: Tensor, r: Tensor) -> Factors:
        """anchor [G, wide, narrow] each; x [G, I, D], v, r [G, I, V] -> ([G, I, wide], [G, I, narrow]) a matrix."""

    def read(self, reader: Reader, x: Tensor, r: Tensor) -> Tensor:
        """x [G, C, D], r [G, C, V] -> [G, C, V]."""


class Linear:
    """M(x) = W x; V counts as the wide side."""

    transposed = (False,)

    def factors(self, anchor: Matrices, x: Tensor, v: Tensor, r: Tensor) -> Factors:
        return ((times_transpose(x, anchor[0]) - v, x),)

    def read(self, reader: Reader, x: Tensor, r: Tensor) -> Tensor:
        return reader.widen(0, x)


class Mlp:
    """M(x) = r + W1 gelu(W2 x), or r + LN(W1 gelu(W2 x)) (paper Eq 42)."""

    transposed = (True, False)

    def __init__(self, output_norm: bool) -> None:
        self.output_norm = output_norm

    def factors(self, anchor: Matrices, x: Tensor, v: Tensor, r: Tensor) -> Factors:
        W1, W2 = anchor
        h, slope = gelu_with_derivative(times_transpose(x, W2))
        o = torch.bmm(h, W1)
        e = (r - v) + (layer_norm(o) if self.output_norm else o)
        if self.output_norm:
            e = pull_through_layer_norm(o, e)
        return (h, e), (times_transpose(e, W1) * slope, x)

    def read(self, reader: Reader, x: Tensor, r: Tensor) -> Tensor:
        o = reader.narrow(0, gelu(reader.widen(1, x)))
        return r + (layer_norm(o) if self.output_norm else o)


def memory_of(rule: MemoryRule) -> Memory:
    """The factored form of `rule.memory`."""
    return Linear() if rule.memory == "linear" else Mlp(output_norm=rule.norm == "layer")
