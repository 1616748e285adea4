"""All chunks of a segment of an mlp memory whose last token alone writes, orthogonalised, as one function.

The map of `chunked._chunk_by_chunk` where ns_period = chunk and all chunks are whole; by hand as in mlp_scan.py:

    S' = t S + wide^T (to narrow),  O = NS(S'),  W' = a W + c O

Token t < C reads alphas_t W, the last one W'. Both matrices go through Newton-Schulz at once where their shapes allow.

Dims: N chunks, G = B x H memories, C tokens of a chunk, I sources, D lifted key, V value, F hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import mlp_sources
from .autocast import unrounded_backward
from .decays import decay_matrix
from .gelu import sigmoid_of
from .layer_norm import jacobian_times, normalised
from .memories import Matrices
from .mlp_sources import How, Inner, Sources, Spare, Work, begun, each
from .newton_schulz import (
    EPSILON,
    applied,
    frobenius,
    normalised_backward,
    on_gram,
    on_gram_backward,
    parts_of,
    schedule,
    takes_gram_form,
)
from .rule import MemoryRule

if TYPE_CHECKING:
    from .chunked import Tokens

Steps = list[tuple[float, float, float]]
States = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class OnceCoefficients:
    """All that the gates say of the N chunks of a segment; differentiable in the gates.

    alphas [N, G, C, 1]: how token t reads the weights, 0 for the last one; last [N, G, 3, 1] = (a, c, t);
    to_momentum [N, G, I, 1]: of each source's outer product.
    """

    alphas: Tensor
    last: Tensor
    to_momentum: Tensor


class Given(NamedTuple):
    """What a segment is given beside its sources; of one chunk: the same without N."""

    alphas: Tensor  # [N, G, C, 1]
    last: Tensor  # [N, G, 3, 1]
    to: Tensor  # [N, G, I, 1]
    xs: Tensor  # [N, G, I, D]: x to
    q: Tensor  # [N, G, C, D]
    qs: Tensor  # [N, G, C, D]: q alphas


class Held(NamedTuple):
    """What the backward takes from the forward's reads; without a backward, of one chunk."""

    zq: Tensor  # [N, G, C, F]
    p: Tensor  # [N, G, C, V] = hq W1


class Taken(NamedTuple):
    """What the backward takes from before its loop."""

    o: Tensor  # [N, G, C, V], the gradient of the outputs
    p: Tensor  # [N, G, C, V]: o alphas
    es: Tensor  # [N, G, I, V]: e to


class Found(NamedTuple):
    """What the backward's loop leaves: gradients of ..."""

    x: Tensor  # [N, G, I, D]
    e: Tensor  # [N, G, I, V]: r - v
    qs: Tensor  # [N, G, C, D]
    q: Tensor  # [N, G, 1, D]: the last token's, of its own read
    xs: Tensor  # [N, G, I, D]
    es: Tensor  # [N, G, I, V]
    last: Tensor  # [N, G, 3, 1]


def writes_once(rule: MemoryRule, weights: Matrices, tokens: int) -> bool:
    """Whether `mlp_once` computes chunks of so many tokens; weights [G, wide, narrow] as they enter."""
    whole = rule.ns_period == rule.chunk == tokens
    return rule.memory == "mlp" and rule.ns_steps > 0 and whole and all(takes_gram_form(*w.shape[1:]) for w in weights)


def once_coefficients(
    rule: MemoryRule, alpha: Tensor, eta: Tensor, theta: Tensor, band: Tensor
) -> OnceCoefficients:
    """alpha, eta, theta [N, G, C]; band [N, G, C, I], the Omega gates Gm."""
    alphas = decay_matrix(alpha)[..., :1] * alpha[..., :1, None]
    of_last = decay_matrix(theta if rule.momentum else torch.zeros_like(theta))[..., -1:, :]
    kept = of_last[..., 0, :1] * theta[..., :1] if rule.momentum else torch.zeros_like(eta[..., :1])
    last = torch.stack([alphas[..., -1, :], -eta[..., -1:], kept], -2)
    before = torch.cat([alphas[..., :-1, :], torch.zeros_like(alphas[..., -1:, :])], -2)
    return OnceCoefficients(before, last, (of_last @ band).mT)


def mlp_once(
    rule: MemoryRule, of: OnceCoefficients, tokens: Tokens, weights: Matrices, momentum: Matrices, anchor: Matrices
) -> tuple[Tensor, Matrices, Matrices]:
    """A `SegmentScan` where `writes_once`; without momentum, what leaves as such is the last sum of gradients."""
    given = (tokens.q, tokens.read_residual, tokens.x, tokens.v, tokens.r, *vars(of).values())
    matrices = (*anchor, *weights, *momentum)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (*given, *matrices))
    table = schedule(rule.ns_steps, rule.ns_coefficients)
    y, *after = _MlpOnce.apply(How.of(rule), table, keep, *given, *matrices)
    return y, tuple(after[:2]), tuple(after[2:])


def _orthogonal(S: Tensor, table: Steps) -> tuple[Tensor, list[Tensor]]:
    """NS(S) of [M, wide, narrow], and what its backward takes: |S|, then (X, A_i, Q_i) of each Gram matrix."""
    norm = frobenius(S)
    X = S / (norm + EPSILON)
    flip = S.shape[1] > S.shape[2]
    X, held = X.mT if flip else X, [norm]
    for part in parts_of(table):
        grams, products = on_gram(X, part)
        held += [X, *grams, *products]
        X = applied(products[-1], X)
    return X.mT if flip else X, held


def _orthogonal_backward(held: list[Tensor], table: Steps, grad: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of NS(S) that of S, and the inner product of NS(S) and its gradient [M, 1, 1]."""
    norm, *rest = held
    flip = grad.shape[1] > grad.shape[2]
    grad, inner = grad.mT if flip else grad, norm
    for part in reversed(parts_of(table)):
        steps = len(part)
        X, *of_part = rest[-2 * steps - 1 :]
        rest = rest[: -2 * steps - 1]
        grad, own = on_gram_backward(X, of_part[:steps], of_part[steps:], part, grad)
        inner = own if inner is norm else inner
    grad = normalised_backward(X, norm, grad)
    return grad.mT if flip else grad, inner


class Stack(NamedTuple):
    """Matrices of one shape, M = 1 or 2 of them, [N + 1, M, G, wide, narrow]: entry n is what chunk n begins with."""

    weights: Tensor
    momentum: Tensor

    def at(self, n: int) -> States:
        """Weights and momentum before and after chunk n, [M, G, wide, narrow] each."""
        now, after = n % len(self.weights), (n + 1) % len(self.weights)
        return self.weights[now], self.momentum[now], self.weights[after], self.momentum[after]


def _stacked(matrices: Matrices) -> list[Tensor]:
    """Two matrices [G, wide, narrow] as one of [2, G, ...] where their shapes agree, or as two of [1, G, ...]."""
    first, second = matrices
    return [torch.stack(matrices)] if first.shape == second.shape else [first.unsqueeze(0), second.unsqueeze(0)]


def _apart(stacks: list[Tensor]) -> Matrices:
    """The two matrices [G, wide, narrow] again."""
    return tuple(m for stack in stacks for m in stack.unbind())


def _write(given: Given, stacks: list[Stack], n: int, e: Tensor, spare: Spare, table: Steps) -> list[Tensor]:
    """What chunk n leaves, in the stacks; what the backward takes of Newton-Schulz."""
    a, c, t = given.last.unsqueeze(-1).unbind(1)
    states = [stack.at(n) for stack in stacks]
    for _, S, _, moved in states:
        torch.mul(S, t, out=moved)
    of_1, of_2 = _apart([moved for *_, moved in states])
    of_1.baddbmm_(spare.h.mT, e * given.to)
    of_2.baddbmm_(spare.d.mT, given.xs)
    kept = []
    for W, _, written, moved in states:
        O, held = _orthogonal(moved.flatten(0, 1), table)  # noqa: E741
        torch.mul(W, a, out=written).addcmul_(O.view_as(W), c)
        kept += held
    return kept


def _read(given: Given, held: Held, weights: Matrices, written: Matrices, hq: Tensor, out: Tensor) -> None:
    """The chunk's outputs [G, C, V] before norm and residual."""
    zq = torch.bmm(given.qs, weights[1].mT, out=held.zq)
    zq[:, -1:] += torch.bmm(given.q[:, -1:], written[1].mT)
    sigmoid_of(zq, hq).mul_(zq)
    torch.mul(torch.bmm(hq, weights[0], out=held.p), given.alphas, out=out)
    out[:, -1:] += torch.bmm(hq[:, -1:], written[0])


def _read_backward(
    given: Given, taken: Taken, weights: Matrices, written: Matrices, of_written: Matrices, into: Found, work: Work
) -> None:
    """Back through the reads: adds the last token's to what leaves, makes hq's and zq's gradients."""
    of_zq = torch.bmm(taken.p, weights[0].mT, out=work.of_zq)
    of_zq[:, -1:] += torch.bmm(taken.o[:, -1:], written[0].mT)
    of_zq.mul_(work.slope_q)
    of_written[0].baddbmm_(work.hq[:, -1:].mT, taken.o[:, -1:])
    of_written[1].baddbmm_(of_zq[:, -1:].mT, given.q[:, -1:])
    torch.bmm(of_zq[:, -1:], written[1], out=into.q)
    torch.bmm(of_zq, weights[1], out=into.qs)


def _write_backward(
    given: Given, states: list[States], grad: list[Stack], kept: list[Tensor], table: Steps, into: Found
) -> None:
    """Back through Newton-Schulz: `grad` holds what weights and momentum take, but for `a` and `t` times theirs."""
    of_last, length = [], len(kept) // len(grad)
    for i, ((W, S, *_), (of_w, of_s)) in enumerate(zip(states, grad, strict=True)):
        of_moved, inner = _orthogonal_backward(kept[i * length : (i + 1) * length], table, of_w.flatten(0, 1))
        of_s.addcmul_(of_moved.view_as(of_s), given.last[:, 1:2])
        sums = ((of_w * W).sum((0, 2, 3)), inner.view(of_w.shape[:2]).sum(0), (of_s * S).sum((0, 2, 3)))
        of_last.append(torch.stack(sums, 1).unsqueeze(-1))
    torch.sum(torch.stack(of_last), 0, out=into.last)


def _sources_backward(given: Given, taken: Taken, grad: list[Stack], into: Found, work: Work) -> Tensor:
    """Back through what the momentum takes; begins of_h and of_d, returns e's. `grad` becomes what is left of it."""
    of_1, of_2 = _apart([of_s for _, of_s in grad])
    torch.bmm(taken.es, of_1.mT, out=work.of_h)
    torch.bmm(given.xs, of_2.mT, out=work.of_d)
    torch.bmm(work.h, of_1, out=into.es)
    torch.bmm(work.d, of_2, out=into.xs)
    for of_w, of_s in grad:
        of_w.mul_(given.last[:, 0:1])
        of_s.mul_(given.last[:, 2:3])
    of_1, of_2 = _apart([of_w for of_w, _ in grad])
    of_1.baddbmm_(work.hq.mT, taken.p)
    of_2.baddbmm_(work.of_zq.mT, given.qs)
    return into.es * given.to


class _MlpOnce(torch.autograd.Function):
    """(y, weights, momentum that leave). matrices: anchor, weights, momentum, two each."""

    @staticmethod
    def forward(
        ctx: Any, how: How, table: Steps, keep: bool, q: Tensor, read_residual: Tensor, x: Tensor, v: Tensor, r: Tensor,
        alphas: Tensor, last: Tensor, to: Tensor, *matrices: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        tokens = Sources(*(t.contiguous() for t in (x, v, r)))
        given = Given(alphas, last, to, x * to, q.contiguous(), q * alphas)
        anchor, weights, momentum = matrices[:2], _stacked(matrices[2:4]), _stacked(matrices[4:])
        N, G, C, _ = q.shape
        _, width, V = anchor[0].shape
        count = N if keep else 1
        inner = Inner.empty(x, count, width, V)
        held = Held(q.new_empty(count, G, C, width), q.new_empty(count, G, C, V))
        stacks = [Stack(begun(W, count), begun(S, count)) for W, S in zip(weights, momentum, strict=True)]
        o, kept = q.new_empty(N, G, C, V), []
        spare = Spare.like(inner.z[0], held.zq[0])
        parts = (each(t, N) for t in (tokens, given, inner, held))
        for n, (source, own, part, read, out) in enumerate(zip(*parts, o.unbind(), strict=True)):
            before = _apart([stack.at(n)[0] for stack in stacks])
            mlp_sources.forward(how, source, before if n else anchor, part, spare)
            of_writes = _write(own, stacks, n, part.e, spare, table)
            kept += of_writes if keep else []
            _read(own, read, before, _apart([stack.at(n)[2] for stack in stacks]), spare.hq, out)
        left = [stack.at(N - 1)[i] for i in (2, 3) for stack in stacks]
        y = read_residual + (normalised(o).n if how.norm else o)
        if keep:
            ctx.how, ctx.table = how, table
            flat = [t for stack in stacks for t in stack]
            ctx.save_for_backward(o, *anchor, *tokens, *given, *inner, *held, *flat, *kept)
        return y, *(m.clone() for m in _apart(left))

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, of_y: Tensor, *of_left: Tensor) -> tuple[Tensor | None, ...]:
        how, (o, *saved) = ctx.how, ctx.saved_tensors
        anchor, tokens, given = saved[:2], Sources(*saved[2:5]), Given(*saved[5:11])
        inner, held, rest = Inner(*saved[11:15]), Held(*saved[15:17]), saved[17:]
        count = 1 if anchor[0].shape == anchor[1].shape else 2
        stacks, kept = [Stack(*rest[2 * i : 2 * i + 2]) for i in range(count)], rest[2 * count :]
        of_o = jacobian_times(normalised(o), of_y.contiguous()) if how.norm else of_y.contiguous()
        taken = Taken(of_o, of_o * given.alphas, inner.e * given.to)
        shapes = (tokens.x, inner.e, given.q, given.q[:, :, -1:], given.xs, inner.e, given.last)
        found = Found(*(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in shapes))
        grad = [Stack(*both) for both in zip(_stacked(of_left[:2]), _stacked(of_left[2:]), strict=True)]
        if count == 2:  # not yet copies
            grad = [Stack(*(t.clone(memory_format=torch.contiguous_format) for t in both)) for both in grad]
        whole = (tokens, given, inner, held, taken, found)
        of_anchor = _chunks_backward(how, whole, anchor, stacks, grad, kept, ctx.table)
        of_alphas = (held.p * of_o).sum(-1, keepdim=True) + (found.qs * given.q).sum(-1, keepdim=True)
        of_q = found.qs * given.alphas
        of_q[:, :, -1:] += found.q
        of_x = torch.addcmul(found.x, found.xs, given.to)
        of_to = (found.es * inner.e).sum(-1, keepdim=True) + (found.xs * tokens.x).sum(-1, keepdim=True)
        of_matrices = (*_apart([of_w for of_w, _ in grad]), *_apart([of_s for _, of_s in grad]))
        return (
            None, None, None, of_q, of_y, of_x, -found.e, found.e if how.l2 else None, of_alphas, found.last, of_to,
            *of_anchor, *of_matrices,
        )  # fmt: skip


def _chunks_backward(
    how: How, whole: tuple[Any, ...], first: Matrices, stacks: list[Stack], grad: list[Stack], kept: list[Tensor],
    table: Steps,
) -> Matrices | tuple[None, None]:  # fmt: skip
    """From the last chunk to the first, whose anchor's gradients it returns; `grad` becomes that of what enters.

    whole: sources, given, inner, held, taken, found, all of the segment. first: the first chunk's anchor.
    """
    N, work = len(whole[0].x), Work.like(whole[2].z[0], whole[3].zq[0])
    parts = list(zip(*(each(t, N) for t in whole), strict=True))
    of_weights, length = _apart([of_w for of_w, _ in grad]), len(kept) // N
    of_anchor: Matrices = ()
    for n in range(N - 1, -1, -1):
        source, own, inner, held, taken, into = parts[n]
        states = [stack.at(n) for stack in stacks]
        weights, written = (_apart([state[i] for state in states]) for i in (0, 2))
        mlp_sources.again(inner, held.zq, work)
        _read_backward(own, taken, weights, written, of_weights, into, work)
        _write_backward(own, states, grad, kept[n * length : (n + 1) * length], table, into)
        of_e = _sources_backward(own, taken, grad, into, work)
        of_anchor = mlp_sources.backward(how, source, weights if n else first, inner, work, of_e, (into.x, into.e))
        if n:
            for of_weight, of_a in zip(of_weights, of_anchor):  # noqa: B905  no anchor's where the share is none
                of_weight.add_(of_a)
    return of_anchor or (None, None)
