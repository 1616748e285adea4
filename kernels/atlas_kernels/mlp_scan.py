"""All chunks of a segment of an mlp memory without Newton-Schulz, as one function with its gradients.

The map of `chunked._chunk_by_chunk` for these rules. By hand, because a CPU spends half of that loop's time on what
stands between the products: here few operators are left, and what needs no weights is computed for all chunks at once.
The weights and the momentum of a matrix lie side by side, so that one product meets both:

    P = [W | S],  P' = [a W + k S | t S] + wide^T [to_w narrow | to_s narrow]

Dims: N chunks, G = B x H memories, C tokens of a chunk, I sources, D lifted key, V value, F hidden; K = 2 with
momentum, 1 without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import mlp_sources
from .autocast import unrounded_backward
from .gelu import sigmoid_of
from .layer_norm import jacobian_times, normalised
from .memories import Matrices
from .mlp_sources import How, Inner, Sources, Spare, Work, begun, beside, each, met, summed, whole
from .rule import MemoryRule
from .writes import Coefficients

if TYPE_CHECKING:
    from .chunked import Tokens


class Given(NamedTuple):
    """What a segment is given beside its sources; of one chunk: the same without N."""

    reads: Tensor  # [N, G, C, K]: what a read takes of the weights and of the momentum
    sources: Tensor  # [N, G, I, C]: what it takes of each source
    last: Tensor  # [N, G, 3 or 1, 1] = (a, k, t) or (a)
    leaving: Tensor  # [N, G, I, K] = (to_w, to_s)
    xs: Tensor  # [N, G, I, K D]: x leaving
    qs: Tensor  # [N, G, C, K D]: q reads
    met: Tensor  # [N, G, I, C]: sources (x . q)


class Held(NamedTuple):
    """What the backward takes from the forward's reads; without a backward, of one chunk."""

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

    x: Tensor  # [N, G, I, D]
    e: Tensor  # [N, G, I, V]: r - v
    qs: Tensor  # [N, G, C, K D]
    xs: Tensor  # [N, G, I, K D]
    es: Tensor  # [N, G, I, K V]
    scores: Tensor  # [N, G, I, C]: sources scores
    met: Tensor  # [N, G, I, C]
    last: Tensor  # [N, G, 3 or 1, 1]


def mlp_scan(
    rule: MemoryRule, of: Coefficients, tokens: Tokens, weights: Matrices, momentum: Matrices, anchor: Matrices
) -> tuple[Tensor, Matrices, Matrices]:
    """A `SegmentScan` for memory = "mlp" and ns_steps = 0."""
    reads, leaving, pairs = of.alphas, of.to_weights, weights
    if of.kappas is not None and of.to_momentum is not None:
        reads, leaving = torch.cat([reads, of.kappas], -1), torch.cat([leaving, of.to_momentum], -1)
        pairs = tuple(torch.cat(both, -1) for both in zip(weights, momentum, strict=True))
    given = (tokens.q, tokens.read_residual, tokens.x, tokens.v, tokens.r, reads, of.sources, of.last, leaving)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (*given, *pairs, *anchor))
    y, *after = _MlpScan.apply(How.of(rule), keep, *given, *pairs, *anchor)
    if not rule.momentum:
        return y, tuple(after), momentum
    left = [pair.chunk(2, -1) for pair in after]
    return y, tuple(W for W, _ in left), tuple(S for _, S in left)


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
    of_w, of_s = grad.chunk(2, -1)
    own = (grad * P).sum(1).unflatten(-1, (2, -1)).sum(-1)
    crossed = (of_w * P.chunk(2, -1)[1]).sum((1, 2))
    of_s.mul_(t).addcmul_(of_w, k)
    of_w.mul_(a)
    return torch.stack([own[:, 0], crossed, own[:, 1]], 1).unsqueeze(-1)


def _forward(
    given: Given, held: Held, inner: Inner, pairs: Matrices, after: Matrices, spare: Spare, out: Tensor
) -> None:
    """One chunk, its inner gradients known: the pairs `after` it, its reads `held`, the outputs `out` [G, C, V]."""
    P1, P2 = pairs
    _decay(P1, given.last, after[0]).baddbmm_(spare.h.mT, beside(inner.e, given.leaving))
    _decay(P2, given.last, after[1]).baddbmm_(spare.d.mT, given.xs)
    zq = torch.bmm(given.qs, P2.mT, out=held.zq).baddbmm_(given.met.mT, spare.d)
    hq = sigmoid_of(zq, spare.hq).mul_(zq)
    scores = torch.bmm(spare.h, hq.mT, out=held.scores)
    summed(torch.bmm(hq, P1, out=held.p), given.reads, out)
    out.baddbmm_((scores * given.sources).mT, inner.e)


def _writes_backward(given: Given, taken: Taken, pairs: Matrices, grad: Matrices, into: Found, work: Work) -> Tensor:
    """Back through what leaves: `grad` becomes the pairs' share. Begins of_h and of_d, returns e's."""
    torch.bmm(taken.es, grad[0].mT, out=work.of_h)
    torch.bmm(given.xs, grad[1].mT, out=work.of_d)
    torch.bmm(work.h, grad[0], out=into.es)
    torch.bmm(work.d, grad[1], out=into.xs)
    of_last = [_decay_backward(P, given.last, g) for P, g in zip(pairs, grad, strict=True)]
    torch.add(*of_last, out=into.last)
    return summed(into.es, given.leaving)


def _reads_backward(
    given: Given, taken: Taken, e: Tensor, pairs: Matrices, grad: Matrices, into: Found, work: Work, of_e: Tensor
) -> None:
    """Back through the reads; adds to all that is begun."""
    (P1, P2), (of_p1, of_p2) = pairs, grad
    of_scores = torch.bmm(e, taken.o.mT, out=into.scores) * given.sources
    of_e.baddbmm_(taken.scored, taken.o)
    work.of_h.baddbmm_(of_scores, work.hq)
    of_p1.baddbmm_(work.hq.mT, taken.p)
    of_zq = torch.bmm(taken.p, P1.mT, out=work.of_zq).baddbmm_(of_scores.mT, work.h).mul_(work.slope_q)
    of_p2.baddbmm_(of_zq.mT, given.qs)
    torch.bmm(of_zq, P2, out=into.qs)
    torch.bmm(work.d, of_zq.mT, out=into.met)
    work.of_d.baddbmm_(given.met, of_zq)


class _MlpScan(torch.autograd.Function):
    """(y, P1, P2 that leave)."""

    @staticmethod
    def forward(
        ctx: Any, how: How, keep: bool, q: Tensor, read_residual: Tensor, x: Tensor, v: Tensor, r: Tensor,
        reads: Tensor, sources: Tensor, last: Tensor, leaving: Tensor, *matrices: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        pairs, anchor = matrices[:2], matrices[2:]
        tokens = Sources(*(t.contiguous() for t in (x, v, r)))
        scores, by_source = whole(x, q.mT), sources.mT.contiguous()
        given = Given(reads, by_source, last, leaving, beside(x, leaving), beside(q, reads), scores * by_source)
        N, G, I, C = scores.shape  # noqa: E741
        width, (V, D), K = anchor[0].shape[1], (a.shape[-1] for a in anchor), reads.shape[-1]
        count = N if keep else 1
        inner = Inner.empty(x, count, width, V)
        held = Held(*(q.new_empty(count, G, *shape) for shape in ((C, width), (I, C), (C, K * V))))
        states = tuple(begun(P, count) for P in pairs)
        o = q.new_empty(N, G, C, V)
        spare = Spare.like(inner.z[0], held.zq[0])
        now = list(zip(*(s.unbind() for s in states), strict=True))
        parts = (each(t, N) for t in (tokens, given, inner, held))
        for n, (source, own, kept, read, out) in enumerate(zip(*parts, o.unbind(), strict=True)):
            before, after = now[n % len(now)], now[(n + 1) % len(now)]
            first = tuple(p[..., :w] for p, w in zip(before, (V, D), strict=True)) if n else anchor
            mlp_sources.forward(how, source, first, kept, spare)
            _forward(own, read, kept, before, after, spare, out)
        left = tuple(m.clone() for m in now[N % len(now)])
        y = read_residual + (normalised(o).n if how.norm else o)
        if keep:
            ctx.how = how
            ctx.save_for_backward(q, scores, o, *anchor, *states, *tokens, *given, *inner, *held)
        return y, *left

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, of_y: Tensor, *of_left: Tensor) -> tuple[Tensor | None, ...]:
        how, (q, scores, o, *saved) = ctx.how, ctx.saved_tensors
        tokens, given = Sources(*saved[4:7]), Given(*saved[7:14])
        inner, held = Inner(*saved[14:18]), Held(*saved[18:])
        of_o = jacobian_times(normalised(o), of_y.contiguous()) if how.norm else of_y.contiguous()
        es = beside(inner.e, given.leaving)
        taken = Taken(of_o, beside(of_o, given.reads), es, held.scores * given.sources)
        shapes = (tokens.x, inner.e, given.qs, given.xs, es, scores, scores, given.last)
        found = Found(*(torch.empty_like(t) for t in shapes))
        grad = tuple(g.clone(memory_format=torch.contiguous_format) for g in of_left)
        of_anchor = _chunks_backward(how, (tokens, given, inner, held, taken, found), saved[:2], saved[2:4], grad)
        of_reads = met(held.p, of_o).add_(met(found.qs, q))
        of_sources = torch.mul(found.scores, held.scores).addcmul_(found.met, scores)
        of_scores = found.met.mul_(given.sources)
        of_q = summed(found.qs, given.reads).add_(whole(of_scores.mT, tokens.x))
        of_x = summed(found.xs, given.leaving).add_(whole(of_scores, q)).add_(found.x)
        of_leaving = met(found.es, inner.e).add_(met(found.xs, tokens.x))
        return (
            None, None, of_q, of_y, of_x, -found.e, found.e if how.l2 else None, of_reads, of_sources.mT, found.last,
            of_leaving, *grad, *of_anchor,
        )  # fmt: skip


def _chunks_backward(
    how: How, of: tuple[Any, ...], first: Matrices, states: Matrices, grad: Matrices
) -> Matrices | tuple[None, None]:
    """From the last chunk to the first, whose anchor's gradients it returns; `grad` becomes that of the first pairs.

    of: sources, given, inner, held, taken, found, all of the segment. first: the first chunk's anchor.
    """
    N, work = len(of[0].x), Work.like(of[2].z[0], of[3].zq[0])
    pairs = list(zip(*(s.unbind() for s in states), strict=True))
    widths = [a.shape[-1] for a in first]
    weights = [g[..., :width] for g, width in zip(grad, widths, strict=True)]
    parts = list(zip(*(each(t, N) for t in of), strict=True))
    of_anchor: Matrices = ()
    for n in range(N - 1, -1, -1):
        source, own, kept, read, taken, into = parts[n]
        mlp_sources.again(kept, read.zq, work)
        of_e = _writes_backward(own, taken, pairs[n], grad, into, work)
        _reads_backward(own, taken, kept.e, pairs[n], grad, into, work, of_e)
        anchor = tuple(p[..., :width] for p, width in zip(pairs[n], widths, strict=True)) if n else first
        of_anchor = mlp_sources.backward(how, source, anchor, kept, work, of_e, (into.x, into.e))
        if n:
            for of_weight, of_a in zip(weights, of_anchor):  # noqa: B905  no anchor's where the share is none
                of_weight.add_(of_a)
    return of_anchor or (None, None)
