"""The inner gradients of an mlp memory at one chunk's anchor, forward and backward, in tensors that are given.

    z = x W2^T,  h = act(z),  o = h W1,  e = the inner loss's gradient at o,  back = e W1^T,  d = back act'(z)

so that the gradients are h e^T of W1 and d x^T of W2, as in memories.py. What is large and short-lived is written where
the chunk before wrote its own: it is then still in a CPU's cache.

Dims: G = B x H memories, C tokens of a chunk, I sources, D lifted key, V value, F hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gelu import first_derivative, second_derivative, sigmoid_of
from .layer_norm import jacobian_times, normalised, pull_backward
from .memories import Matrices
from .rule import MemoryRule


class How(NamedTuple):
    """What of the rule the scan asks for."""

    l2: bool
    norm: bool
    share: float  # of the outer gradient, through each anchor

    @classmethod
    def of(cls, rule: MemoryRule) -> How:
        return cls(rule.loss == "l2", rule.norm == "layer", float(rule.anchor_gradient))

    @property
    def reads_output(self) -> bool:
        """Whether the inner gradient depends on the memory's output."""
        return self.l2 or self.norm


class Sources(NamedTuple):
    """The sources of a chunk, or with N in front of each chunk."""

    x: Tensor  # [G, I, D]
    v: Tensor  # [G, I, V]
    r: Tensor  # [G, I, V]


class Inner(NamedTuple):
    """What the backward takes from the forward; with N in front, of each chunk."""

    z: Tensor  # [G, I, F]
    o: Tensor  # [G, I, V]
    e: Tensor  # [G, I, V]
    back: Tensor  # [G, I, F]

    @classmethod
    def empty(cls, x: Tensor, count: int, hidden: int, value: int) -> Inner:
        """Of `count` chunks of x [N, G, I, D]."""
        widths = (hidden, value, value, hidden)
        return cls(*(x.new_empty(count, *x.shape[1:3], width) for width in widths))


class Spare(NamedTuple):
    """Where the forward writes what is not held: [G, I, F], and of the queries [G, C, F]."""

    s: Tensor
    h: Tensor
    d: Tensor
    hq: Tensor

    @classmethod
    def like(cls, z: Tensor, zq: Tensor) -> Spare:
        return cls(*(torch.empty_like(t) for t in (z, z, z, zq)))


class Work(NamedTuple):
    """The same in the backward."""

    s: Tensor
    h: Tensor
    d: Tensor
    hq: Tensor
    slope: Tensor
    of_h: Tensor
    of_d: Tensor
    sq: Tensor
    slope_q: Tensor
    of_zq: Tensor

    @classmethod
    def like(cls, z: Tensor, zq: Tensor) -> Work:
        return cls(*(torch.empty_like(t) for t in (z, z, z, zq, z, z, z, zq, zq, zq)))


def forward(how: How, sources: Sources, anchor: Matrices, inner: Inner, spare: Spare) -> None:
    """Fills `inner`, and h and d of `spare`. anchor: W1 [G, F, V], W2 [G, F, D]."""
    A1, A2 = anchor
    torch.bmm(sources.x, A2.mT, out=inner.z)
    torch.mul(inner.z, sigmoid_of(inner.z, spare.s), out=spare.h)
    if how.reads_output:
        torch.bmm(spare.h, A1, out=inner.o)
    _error(how, sources, inner.o, inner.e)
    torch.bmm(inner.e, A1.mT, out=inner.back)
    first_derivative(inner.z, spare.s, spare.d).mul_(inner.back)


def again(inner: Inner, zq: Tensor, work: Work) -> None:
    """What the forward did not hold, of the sources and of the queries: s, h, d, hq and slopes of `work`."""
    sigmoid_of(inner.z, work.s)
    torch.mul(inner.z, work.s, out=work.h)
    first_derivative(inner.z, work.s, work.slope)
    torch.mul(inner.back, work.slope, out=work.d)
    sigmoid_of(zq, work.sq)
    torch.mul(zq, work.sq, out=work.hq)
    first_derivative(zq, work.sq, work.slope_q)


def backward(
    how: How, sources: Sources, anchor: Matrices, inner: Inner, work: Work, of_e: Tensor, into: tuple[Tensor, Tensor]
) -> Matrices:
    """The share of the anchor's gradients (none: nothing), from those of e and, in `work`, of h and d, all changed.

    into: for the gradients of x as far as it comes from here, and of r - v (l2) or -v (dot).
    """
    A1, A2 = anchor
    of_slope = torch.mul(work.of_d, inner.back, out=work.d)
    of_back = work.of_d.mul_(work.slope)
    of_e.baddbmm_(of_back, A1)
    of_o, of_error = _error_backward(how, sources, inner.o, of_e)
    into[1].copy_(of_error)
    found = [torch.bmm(of_back.mT, inner.e)] if how.share else []
    if of_o is not None:
        work.of_h.baddbmm_(of_o, A1.mT)
        for of_a1 in found:
            of_a1.baddbmm_(work.h.mT, of_o)
    of_z = second_derivative(inner.z, work.s, of_slope, work.h).addcmul_(work.of_h, work.slope)
    torch.bmm(of_z, A2, out=into[0])
    if not found:
        return ()
    found.append(torch.bmm(of_z.mT, sources.x))
    # Not in the sum that follows: a segment's first anchor is added up elsewhere, and shall give equal bits.
    return tuple(a.mul_(how.share) if how.share != 1 else a for a in found)


def _error(how: How, sources: Sources, o: Tensor, e: Tensor) -> None:
    """The inner loss's gradient at o, in e."""
    if how.l2:
        torch.sub(sources.r, sources.v, out=e)
    else:
        torch.neg(sources.v, out=e)
    if how.norm:
        of = normalised(o)
        e.copy_(jacobian_times(of, e.add_(of.n) if how.l2 else e))
    elif how.l2:
        e.add_(o)


def _error_backward(how: How, sources: Sources, o: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor]:
    """From the gradient of e those of o and of r - v (l2) or -v (dot)."""
    if how.norm:
        of = normalised(o)
        e = (sources.r - sources.v).add_(of.n) if how.l2 else -sources.v
        return pull_backward(of, e, grad, how.l2)
    return grad if how.l2 else None, grad


def each(whole: Any, chunks: int) -> list[Any]:
    """Of each chunk: what lies of it in the tensors of `whole`; one alone is of every chunk."""
    parts = [t.unbind() if len(t) == chunks else t.unbind() * chunks for t in whole]
    return [type(whole)(*part) for part in zip(*parts, strict=True)]


def whole(a: Tensor, b: Tensor) -> Tensor:
    """a b of all chunks at once."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def begun(first: Tensor, count: int) -> Tensor:
    """Room for `count` tensors behind the `first` one."""
    states = first.new_empty(count + 1, *first.shape)
    states[0] = first
    return states


def beside(t: Tensor, factors: Tensor) -> Tensor:
    """[..., V] times each of its factors [..., K]: [..., K V]."""
    return (t.unsqueeze(-2) * factors.unsqueeze(-1)).flatten(-2)


def summed(t: Tensor, factors: Tensor, out: Tensor | None = None) -> Tensor:
    """[..., K V] -> [..., V], the gradient of `beside` in its first argument."""
    first, *others = zip(t.chunk(factors.shape[-1], -1), factors.split(1, -1), strict=True)
    total = torch.mul(*first, out=out)
    for part, factor in others:
        total.addcmul_(part, factor)
    return total


def met(t: Tensor, vectors: Tensor) -> Tensor:
    """[..., K V] and [..., V] -> [..., K], the gradient of `beside` in its factors."""
    return torch.sum(t.unflatten(-1, (-1, vectors.shape[-1])) * vectors.unsqueeze(-2), -1)
