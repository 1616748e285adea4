"""All chunks of a segment of an mlp memory without Newton-Schulz, as one function with its gradients.

The map of `chunked._chunk_by_chunk` for these rules. By hand, because a CPU spends half of that loop's time on what
stands between the products: here few operators are left, and what is large and short-lived lies in memory that is used
again while it is in the cache. The weights and the momentum of a matrix lie side by side, so that one product meets both:

    P = [W | S],  P' = [a W + k S | t S] + wide^T [to_w narrow | to_s narrow]

Dims: N chunks, G = B x H memories, C tokens of a chunk, I sources, D lifted key, V value, F hidden; K = 2 with
momentum, 1 without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import unrounded_backward
from .gelu import first_derivative, second_derivative, sigmoid_of
from .layer_norm import jacobian_times, normalised, pull_backward
from .memories import Matrices
from .rule import MemoryRule
from .writes import Coefficients

if TYPE_CHECKING:
    from .chunked import Tokens


class How(NamedTuple):
    """What of the rule the scan asks for."""

    l2: bool
    norm: bool
    share: float  # of the outer gradient, through each anchor

    @property
    def reads_output(self) -> bool:
        """Whether the inner gradient depends on the memory's output."""
        return self.l2 or self.norm


class Given(NamedTuple):
    """What a segment is given, contiguous; of one chunk: the same without N. A pair stands beside its factors."""

    x: Tensor  # [N, G, I, D]
    v: Tensor  # [N, G, I, V]
    r: Tensor  # [N, G, I, V]
    reads: Tensor  # [N, G, C, K]: what a read takes of the weights and of the momentum
    sources: Tensor  # [N, G, I, C]: what it takes of each source
    last: Tensor  # [N, G, 3 or 1, 1] = (a, k, t) or (a)
    leaving: Tensor  # [N, G, I, K] = (to_w, to_s)
    xs: Tensor  # [N, G, I, K D]: x leaving
    qs: Tensor  # [N, G, C, K D]: q reads
    met: Tensor  # [N, G, I, C]: sources (x . q)


class Held(NamedTuple):
    """What the backward takes from the forward; without one, each is of one chunk."""

    z: Tensor  # [N, G, I, F] = x W2^T
    back: Tensor  # [N, G, I, F] = e W1
    o: Tensor  # [N, G, I, V] = W1 h
    e: Tensor  # [N, G, I, V], the inner gradient at o
    zq: Tensor  # [N, G, C, F]
    scores: Tensor  # [N, G, I, C] = h . hq
    p: Tensor  # [N, G, C, K V] = hq P1


class Taken(NamedTuple):
    """What the backward takes from before its loop."""

    o: Tensor  # [N, G, C, V], the gradient of the outputs
    p: Tensor  # [N, G, C, K V]: o reads
    es: Tensor  # [N, G, I, K V]: e leaving
    scored: Tensor  # [N, G, I, C]: sources scores


class Found(NamedTuple):
    """What the backward's loop leaves: gradients of ..."""

    qs: Tensor  # [N, G, C, K D]
    xs: Tensor  # [N, G, I, K D]
    es: Tensor  # [N, G, I, K V]
    x: Tensor  # [N, G, I, D]
    e: Tensor  # [N, G, I, V]: r - v
    scored: Tensor  # [N, G, I, C]
    met: Tensor  # [N, G, I, C]
    last: Tensor  # [N, G, 3 or 1, 1]


def covers(rule: MemoryRule) -> bool:
    """Whether `mlp_scan` computes this rule."""
    return rule.memory == "mlp" and rule.ns_steps == 0


def mlp_scan(
    rule: MemoryRule, of: Coefficients, tokens: Tokens, weights: Matrices, momentum: Matrices, anchor: Matrices
) -> tuple[Tensor, Matrices, Matrices]:
    """A `SegmentScan`."""
    reads, leaving, pairs = of.alphas, of.to_weights, weights
    if of.kappas is not None and of.to_momentum is not None:
        reads, leaving = torch.cat([reads, of.kappas], -1), torch.cat([leaving, of.to_momentum], -1)
        pairs = tuple(torch.cat(both, -1) for both in zip(weights, momentum, strict=True))
    how = How(rule.loss == "l2", rule.norm == "layer", float(rule.anchor_gradient))
    given = (tokens.q, tokens.read_residual, tokens.x, tokens.v, tokens.r, reads, of.sources, of.last, leaving)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (*given, *pairs, *anchor))
    y, *pairs = _MlpScan.apply(how, keep, *given, *pairs, *anchor)
    if not rule.momentum:
        return y, tuple(pairs), momentum
    weights, momentum = zip(*(p.chunk(2, -1) for p in pairs), strict=True)
    return y, weights, momentum


def _each(whole: Any, chunks: int) -> list[Any]:
    """Of each chunk: what lies of it in the tensors of `whole`; one alone is of every chunk."""
    parts = [t.unbind() if len(t) == chunks else t.unbind() * chunks for t in whole]
    return [type(whole)(*part) for part in zip(*parts, strict=True)]


def _beside(t: Tensor, factors: Tensor) -> Tensor:
    """[..., V] times each of its factors [..., K]: [..., K V]."""
    return (t.unsqueeze(-2) * factors.unsqueeze(-1)).flatten(-2)


def _summed(t: Tensor, factors: Tensor, out: Tensor | None = None) -> Tensor:
    """[..., K V] -> [..., V], the gradient of `_beside` in its first argument."""
    return torch.sum(t.unflatten(-1, (factors.shape[-1], -1)) * factors.unsqueeze(-1), -2, out=out)


def _met(t: Tensor, vectors: Tensor) -> Tensor:
    """[..., K V] and [..., V] -> [..., K], the gradient of `_beside` in its factors."""
    return torch.sum(t.unflatten(-1, (-1, vectors.shape[-1])) * vectors.unsqueeze(-2), -1)


def _decay(P: Tensor, last: Tensor, out: Tensor) -> Tensor:
    """[a W + k S | t S], or a W."""
    if last.shape[1] == 1:
        return torch.mul(P, last, out=out)
    a, k, t = last.unsqueeze(-1).unbind(1)
    (W, S), (to_w, to_s) = P.chunk(2, -1), out.chunk(2, -1)
    torch.mul(W, a, out=to_w).addcmul_(S, k)
    torch.mul(S, t, out=to_s)
    return out


def _decay_backward(P: Tensor, last: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `last`; `grad`, that of what `_decay` gives, becomes that of P."""
    if last.shape[1] == 1:
        of_last = (grad * P).sum((1, 2)).view_as(last)
        grad.mul_(last)
        return of_last
    a, k, t = last.unsqueeze(-1).unbind(1)
    (W, S), (of_w, of_s) = P.chunk(2, -1), grad.chunk(2, -1)
    of_last = torch.stack([(g * m).sum((1, 2)) for g, m in ((of_w, W), (of_w, S), (of_s, S))], 1)
    of_s.mul_(t).addcmul_(of_w, k)
    of_w.mul_(a)
    return of_last.unsqueeze(-1)


def _forward(
    how: How, given: Given, held: Held, pairs: Matrices, after: Matrices, anchor: Matrices, spare: Matrices, out: Tensor
) -> None:
    """One chunk: its part of `held`, the pairs `after` it, and the memory's outputs `out` [G, C, V]."""
    (A1, A2), (P1, P2) = anchor, pairs
    h, d, s, hq = spare
    z, e, back = torch.bmm(given.x, A2.mT, out=held.z), held.e, held.back
    torch.mul(z, sigmoid_of(z, s), out=h)
    _error(how, given, torch.bmm(h, A1, out=held.o) if how.reads_output else held.o, e)
    torch.bmm(e, A1.mT, out=back)
    first_derivative(z, s, d).mul_(back)
    _decay(P1, given.last, after[0]).baddbmm_(h.mT, _beside(e, given.leaving))
    _decay(P2, given.last, after[1]).baddbmm_(d.mT, given.xs)
    zq = torch.bmm(given.qs, P2.mT, out=held.zq).baddbmm_(given.met.mT, d)
    sigmoid_of(zq, hq).mul_(zq)
    scores = torch.bmm(h, hq.mT, out=held.scores)
    _summed(torch.bmm(hq, P1, out=held.p), given.reads, out)
    out.baddbmm_((scores * given.sources).mT, e)


def _error(how: How, given: Given, o: Tensor, e: Tensor) -> None:
    """The inner loss's gradient at o, in e."""
    if how.l2:
        torch.sub(given.r, given.v, out=e)
    else:
        torch.neg(given.v, out=e)
    if how.norm:
        of = normalised(o)
        e.copy_(jacobian_times(of, e.add_(of.n) if how.l2 else e))
    elif how.l2:
        e.add_(o)


def _error_backward(how: How, given: Given, o: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor]:
    """From the gradient of e those of o and of r - v (l2) or -v (dot)."""
    if how.norm:
        of = normalised(o)
        e = (given.r - given.v).add_(of.n) if how.l2 else -given.v
        return pull_backward(of, e, grad, how.l2)
    return grad if how.l2 else None, grad


class Work(NamedTuple):
    """Large tensors of one chunk's backward, [G, I, F] and (of the queries) [G, C, F] each."""

    s: Tensor
    h: Tensor
    slope: Tensor
    d: Tensor
    of_h: Tensor
    of_d: Tensor
    sq: Tensor
    hq: Tensor
    slope_q: Tensor
    of_zq: Tensor


def _again(held: Held, work: Work) -> None:
    """What the forward did not hold."""
    sigmoid_of(held.z, work.s)
    torch.mul(held.z, work.s, out=work.h)
    first_derivative(held.z, work.s, work.slope)
    torch.mul(held.back, work.slope, out=work.d)
    sigmoid_of(held.zq, work.sq)
    torch.mul(held.zq, work.sq, out=work.hq)
    first_derivative(held.zq, work.sq, work.slope_q)


def _writes_backward(
    given: Given, taken: Taken, pairs: Matrices, grad: Matrices, into: Found, work: Work
) -> Tensor:
    """Back through what leaves: `grad` becomes the pairs' share. Begins of_h and of_d, returns e's."""
    torch.bmm(taken.es, grad[0].mT, out=work.of_h)
    torch.bmm(given.xs, grad[1].mT, out=work.of_d)
    torch.bmm(work.h, grad[0], out=into.es)
    torch.bmm(work.d, grad[1], out=into.xs)
    of_last = [_decay_backward(P, given.last, g) for P, g in zip(pairs, grad, strict=True)]
    torch.add(*of_last, out=into.last)
    return _summed(into.es, given.leaving)


def _reads_backward(
    given: Given, held: Held, taken: Taken, pairs: Matrices, grad: Matrices, into: Found, work: Work, of_e: Tensor
) -> None:
    """Back through the reads; adds to all that is begun."""
    (P1, P2), (of_p1, of_p2) = pairs, grad
    of_scores = torch.bmm(held.e, taken.o.mT, out=into.scored) * given.sources
    of_e.baddbmm_(taken.scored, taken.o)
    work.of_h.baddbmm_(of_scores, work.hq)
    of_p1.baddbmm_(work.hq.mT, taken.p)
    of_zq = torch.bmm(taken.p, P1.mT, out=work.of_zq).baddbmm_(of_scores.mT, work.h).mul_(work.slope_q)
    of_p2.baddbmm_(of_zq.mT, given.qs)
    torch.bmm(of_zq, P2, out=into.qs)
    torch.bmm(work.d, of_zq.mT, out=into.met)
    work.of_d.baddbmm_(given.met, of_zq)


def _anchor_backward(
    how: How, given: Given, held: Held, anchor: Matrices, into: Found, work: Work, of_e: Tensor
) -> Matrices:
    """Back through the sources at the anchor, whose gradients it returns."""
    A1, A2 = anchor
    of_slope = torch.mul(work.of_d, held.back, out=work.d)
    of_back = work.of_d.mul_(work.slope)
    of_e.baddbmm_(of_back, A1)
    of_o, of_error = _error_backward(how, given, held.o, of_e)
    into.e.copy_(of_error)
    of_a1 = torch.bmm(of_back.mT, held.e)
    if of_o is not None:
        work.of_h.baddbmm_(of_o, A1.mT)
        of_a1.baddbmm_(work.h.mT, of_o)
    of_z = second_derivative(held.z, work.s, of_slope, work.h).addcmul_(work.of_h, work.slope)
    torch.bmm(of_z, A2, out=into.x)
    return of_a1, torch.bmm(of_z.mT, given.x)


class _MlpScan(torch.autograd.Function):
    """(y, P1, P2 that leave)."""

    @staticmethod
    def forward(
        ctx: Any, how: How, keep: bool, q: Tensor, read_residual: Tensor, x: Tensor, v: Tensor, r: Tensor,
        reads: Tensor, sources: Tensor, last: Tensor, leaving: Tensor, P1: Tensor, P2: Tensor, A1: Tensor, A2: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        own = tuple(t.contiguous() for t in (x, v, r, reads, sources.mT, last, leaving))
        met = _whole(x, q.mT)
        given = Given(*own, _beside(x, leaving), _beside(q, reads), met * own[4])
        N, G, I, C = met.shape  # noqa: E741
        F, (V, D), K = A1.shape[1], (A1.shape[2], A2.shape[2]), reads.shape[-1]
        count = N if keep else 1
        of_held = ((I, F), (I, F), (I, V), (I, V), (C, F), (I, C), (C, K * V))
        held = Held(*(q.new_empty(count, G, *shape) for shape in of_held))
        states = tuple(q.new_empty(count + 1, G, F, K * width) for width in (V, D))
        for state, P in zip(states, (P1, P2), strict=True):
            state[0] = P
        o = q.new_empty(N, G, C, V)
        spare = (*(torch.empty_like(held.z[0]) for _ in range(3)), torch.empty_like(held.zq[0]))
        pairs = list(zip(*(s.unbind() for s in states), strict=True))
        anchors = [(A1, A2), *zip(*(s[..., :w].unbind()[1:] for s, w in zip(states, (V, D), strict=True)), strict=True)]
        for n, (chunk, kept, out) in enumerate(zip(_each(given, N), _each(held, N), o.unbind(), strict=True)):
            now, after = (pairs[i % (count + 1)] for i in (n, n + 1))
            _forward(how, chunk, kept, now, after, anchors[n % (count + 1) if n else 0], spare, out)
        left = [m.clone() for m in pairs[N % (count + 1)]]
        y = read_residual + (normalised(o).n if how.norm else o)
        if keep:
            ctx.how = how
            ctx.save_for_backward(q, met, *given, *held, *states, A1, A2, o)
        return y, *left

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, of_y: Tensor, *of_left: Tensor) -> tuple[Tensor | None, ...]:
        how, (q, met, *saved) = ctx.how, ctx.saved_tensors
        given, held = Given(*saved[: len(Given._fields)]), Held(*saved[len(Given._fields) : -5])
        *states, A1, A2, o = saved[-5:]
        of_o = jacobian_times(normalised(o), of_y.contiguous()) if how.norm else of_y.contiguous()
        of_es = _beside(held.e, given.leaving)
        taken = Taken(of_o, _beside(of_o, given.reads), of_es, held.scores * given.sources)
        shapes = (given.qs, given.xs, of_es, given.x, held.e, met, met, given.last)
        found = Found(*(torch.empty_like(t) for t in shapes))
        grad = tuple(g.clone(memory_format=torch.contiguous_format) for g in of_left)
        of_anchor = _chunks_backward(how, given, held, taken, found, states, (A1, A2), grad)
        of_reads = _met(held.p, of_o).add_(_met(found.qs, q))
        of_sources = torch.mul(found.scored, held.scores).addcmul_(found.met, met)
        of_met = found.met.mul_(given.sources)
        of_q = _summed(found.qs, given.reads).add_(_whole(of_met.mT, given.x))
        of_x = _summed(found.xs, given.leaving).add_(_whole(of_met, q)).add_(found.x)
        of_leaving = _met(found.es, held.e).add_(_met(found.xs, given.x))
        return (
            None, None, of_q, of_y, of_x, -found.e, found.e if how.l2 else None, of_reads, of_sources.mT, found.last,
            of_leaving, *grad, *of_anchor,
        )  # fmt: skip


def _chunks_backward(
    how: How, given: Given, held: Held, taken: Taken, found: Found, states: Matrices, first: Matrices, grad: Matrices
) -> Matrices:
    """The loop, from the last chunk to the first, whose anchor's gradients it returns; `grad` becomes P1's, P2's."""
    N = len(given.x)
    z, zq = held.z[0], held.zq[0]
    work = Work(*(torch.empty_like(t) for t in [z] * 6 + [zq] * 4))
    pairs = list(zip(*(s.unbind() for s in states), strict=True))
    widths = [a.shape[-1] for a in first]
    weights = [g[..., :width] for g, width in zip(grad, widths, strict=True)]
    parts = [_each(whole, N) for whole in (given, held, taken, found)]
    for n in range(N - 1, -1, -1):
        own, kept, to, into = (part[n] for part in parts)
        _again(kept, work)
        of_e = _writes_backward(own, to, pairs[n], grad, into, work)
        _reads_backward(own, kept, to, pairs[n], grad, into, work, of_e)
        anchor = tuple(p[..., :width] for p, width in zip(pairs[n], widths, strict=True)) if n else first
        of_anchor = _anchor_backward(how, own, kept, anchor, into, work, of_e)
        if n:
            for g, a in zip(weights, of_anchor, strict=True):
                g.add_(a, alpha=how.share)
    return tuple(a.mul_(how.share) for a in of_anchor)


def _whole(a: Tensor, b: Tensor) -> Tensor:
    """a b of all chunks at once."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])
