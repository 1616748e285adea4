"""The memories in factored form, for the chunk form: what each one gives to a sum of rank-one gradients.

A memory's matrices meet its hidden width (wide, F) and its input or output (narrow, D or V). The chunk form keeps each
as [G, wide, narrow], W1 transposed, so that one code serves them all; `factors` gives the gradient of the inner loss
at the anchor as one pair a matrix, gradient = sum_i wide_i narrow_i^T, never formed; `read` is the memory's output,
written over the two ways to multiply by a matrix as it stands after token t's write. Both meet the matrices through a
`WeightView` alone, so a layer may be kept in another form than its matrix (see dual.py).

Dims: G = B x H memories side by side, I tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .gelu import gelu, gelu_with_derivative
from .layer_norm import layer_norm, pull_through_layer_norm
from .products import times_transpose
from .rule import MemoryRule

Matrices = tuple[Tensor, ...]
Factors = tuple[tuple[Tensor, Tensor], ...]


class WeightView(Protocol):
    """Multiplies each token's vector by matrix j after that token's write, without forming the matrix."""

    def widen(self, j: int, x: Tensor) -> Tensor:
        """[G, C, narrow] -> [G, C, wide]: M_t x_t."""

    def narrow(self, j: int, h: Tensor) -> Tensor:
        """[G, C, wide] -> [G, C, narrow]: M_t^T h_t."""


class ActivatingView:
    """A `WeightView` that multiplies and activates at once."""

    def act(self, j: int, x: Tensor) -> Tensor:
        """gelu(M_t x_t)."""
        raise NotImplementedError

    def act_with_slope(self, j: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """gelu and its derivative at M_t x_t."""
        raise NotImplementedError


def act(view: WeightView, j: int, x: Tensor) -> Tensor:
    """gelu(M_t x_t)."""
    return view.act(j, x) if isinstance(view, ActivatingView) else gelu(view.widen(j, x))


def act_with_slope(view: WeightView, j: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """gelu and its derivative at M_t x_t."""
    if isinstance(view, ActivatingView):
        return view.act_with_slope(j, x)
    return gelu_with_derivative(view.widen(j, x))


class MatrixView:
    """Every token sees the same matrices, [G, wide, narrow] each: those of the chunk's start."""

    def __init__(self, matrices: Matrices) -> None:
        self.matrices = matrices

    def widen(self, j: int, x: Tensor) -> Tensor:
        return times_transpose(x, self.matrices[j])

    def narrow(self, j: int, h: Tensor) -> Tensor:
        return torch.bmm(h, self.matrices[j])


class Memory(Protocol):
    """One row of MATH's table of memories."""

    @property
    def transposed(self) -> tuple[bool, ...]:
        """For each matrix: whether the chunk form keeps its transpose."""

    def factors(self, anchor: WeightView, x: Tensor, v: Tensor, r: Tensor) -> Factors:
        """x [G, I, D], v, r [G, I, V] -> ([G, I, wide], [G, I, narrow]) a matrix."""

    def read(self, reader: WeightView, x: Tensor, r: Tensor) -> Tensor:
        """x [G, C, D], r [G, C, V] -> [G, C, V]."""


def oriented(memory: Memory, matrices: Matrices) -> Matrices:
    """Of [..., rows, cols] as `omega_memory` has them, [..., wide, narrow] as the chunk form keeps them; or back."""
    return tuple(m.mT if flip else m for m, flip in zip(matrices, memory.transposed, strict=True))


class Linear:
    """M(x) = W x; V counts as the wide side."""

    transposed: tuple[bool, ...] = (False,)

    def __init__(self, rule: MemoryRule) -> None:
        self.loss = rule.loss

    def factors(self, anchor: WeightView, x: Tensor, v: Tensor, r: Tensor) -> Factors:
        return ((-v if self.loss == "dot" else anchor.widen(0, x) - v, x),)

    def read(self, reader: WeightView, x: Tensor, r: Tensor) -> Tensor:
        return reader.widen(0, x)


class Mlp:
    """M(x) = r + W1 gelu(W2 x), or r + LN(W1 gelu(W2 x)) (paper Eq 42)."""

    transposed: tuple[bool, ...] = (True, False)

    def __init__(self, rule: MemoryRule) -> None:
        self.output_norm, self.loss = rule.norm == "layer", rule.loss

    def factors(self, anchor: WeightView, x: Tensor, v: Tensor, r: Tensor) -> Factors:
        h, slope = act_with_slope(anchor, 1, x)
        e = self.error(anchor, h, v, r)
        return (h, e), (anchor.widen(0, e) * slope, x)

    def error(self, anchor: WeightView, h: Tensor, v: Tensor, r: Tensor) -> Tensor:
        """The inner loss's gradient at W1's output, [G, I, V]."""
        l2 = self.loss == "l2"
        if self.output_norm:
            return pull_through_layer_norm(anchor.narrow(0, h), r - v if l2 else -v, plus_output=l2)
        return (r - v) + anchor.narrow(0, h) if l2 else -v

    def read(self, reader: WeightView, x: Tensor, r: Tensor) -> Tensor:
        return self.output(reader.narrow(0, act(reader, 1, x)), r)

    def output(self, o: Tensor, r: Tensor) -> Tensor:
        return r + (layer_norm(o) if self.output_norm else o)


class GatedMlp(Mlp):
    """M(x) = r + W1 (gelu(W2 x) * W3 x), or with the output norm (paper Eq 43)."""

    transposed = (True, False, False)

    def factors(self, anchor: WeightView, x: Tensor, v: Tensor, r: Tensor) -> Factors:
        activated, slope = act_with_slope(anchor, 1, x)
        u = anchor.widen(2, x)
        h = activated * u
        e = self.error(anchor, h, v, r)
        back = anchor.widen(0, e)
        return (h, e), (back * u * slope, x), (back * activated, x)

    def read(self, reader: WeightView, x: Tensor, r: Tensor) -> Tensor:
        h = act(reader, 1, x) * reader.widen(2, x)
        return self.output(reader.narrow(0, h), r)


FACTORED: dict[str, type[Linear] | type[Mlp]] = {"linear": Linear, "mlp": Mlp, "gated_mlp": GatedMlp}


def memory_of(rule: MemoryRule) -> Memory:
    """The factored form of `rule.memory`."""
    return FACTORED[rule.memory](rule)
