"""What a chunk leaves where its tokens read the weights of its start (`read = "chunk"`): nothing of size [C, C].

The same W' and S' as in writes.py, whose coefficients of the last token are all that is needed:

    W' = alphas_C W - kappa S - sum_i w_i u_i x_i^T      w = Gm^T TT^T (eta TA[C])      (ns_steps = 0, momentum)
    S' = thetas_C S + sum_i m_i u_i x_i^T                m = Gm^T TT[C]

A row of a decay matrix costs C times a block of about sqrt(C) tokens; the window's gates are applied where they lie. So
a chunk of 2,048 tokens costs little more than the gradients' factors of its tokens.

Dims: N chunks, G = B x H memories, C tokens of a chunk, W window, I = C + W - 1 sources, K writes, J rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .decays import decay_matrix
from .layout import Layout
from .rule import Gates, Inputs, MemoryRule
from .writes import (
    Coefficients,
    OrthogonalCoefficients,
    OrthogonalWrites,
    RawWrites,
    SumWrites,
    Writes,
    places_of_writes,
)


def leaving_writes(rule: MemoryRule, offset: int, gates: Gates, tokens: int, sources: Tensor | None) -> Writes:
    """How chunks of so many tokens are left; no token reads through what `Writes.advance` gives.

    gates [B, N*C, H, ...]; sources: source gates in their chunks [N, G, I], None with pair gates; offset: the first
    token's place in its chunk.
    """
    by_chunk = Layout(gates.alpha.shape[1] // tokens, tokens).by_chunk
    alpha, eta, theta = (by_chunk(gate).unsqueeze(-2) for gate in (gates.alpha, gates.eta, gates.theta))  # [N, G, 1, C]
    pair = None if sources is not None else by_chunk(gates.gamma)
    theta = theta if rule.momentum else torch.zeros_like(theta)
    last = F.pad(torch.ones_like(alpha[..., :1]), (tokens - 1, 0))  # a row that counts the last token alone
    kept = discounted(last, alpha)
    if rule.ns_steps:
        return _orthogonal(rule, places_of_writes(rule, offset, tokens), (alpha, eta, theta), kept, (pair, sources))
    alphas = kept[..., :1] * alpha[..., :1]
    steps = kept * -eta
    none = alpha.new_zeros(*alpha.shape[:2], 0, 1)
    if not rule.momentum:
        to_weights = by_source(steps, pair, sources, rule.window)
        return SumWrites(Coefficients(none, None, none, alphas, to_weights.mT, None))
    moved, stepped = discounted(last, theta), discounted(steps, theta)
    kappa, thetas = stepped[..., :1] * theta[..., :1], moved[..., :1] * theta[..., :1]
    to_weights, to_momentum = (by_source(rows, pair, sources, rule.window).mT for rows in (stepped, moved))
    return RawWrites(
        Coefficients(none, none, none, torch.cat([alphas, kappa, thetas], -2), to_weights, to_momentum)
    )


class _Unread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, *unread):
        ctx.shapes = [t.shape for t in unread]
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        return grad, *(grad.new_zeros(()).expand(shape) for shape in ctx.shapes)


def with_unread(y: Tensor, given: Inputs) -> Tensor:
    """The same y, which gives zeros to the gradients of the keys, values and gates of `given`.

    No token of a call reads what its last chunk writes: of a call of one chunk they would have no gradient, and data
    parallelism waits for one of every parameter. A traced graph has none, and goes without.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return y
    return _Unread.apply(y, given.k, given.v, *vars(given.gates).values())


def _orthogonal(
    rule: MemoryRule,
    writes: range,
    gates: tuple[Tensor, Tensor, Tensor],
    kept: Tensor,
    gamma: tuple[Tensor | None, Tensor | None],
) -> OrthogonalWrites:
    """gates [N, G, 1, C]; kept [N, G, 1, C]: what the last token keeps of each; gamma: pair gates, or source gates."""
    alpha, eta, theta = gates
    tokens = alpha.shape[-1]
    formed = [*writes] if writes and writes[-1] == tokens - 1 else [*writes, tokens - 1]
    rows = F.one_hot(torch.tensor(formed, device=alpha.device), tokens).to(alpha.dtype)
    moved = discounted(rows.expand(*alpha.shape[:2], -1, -1), theta)
    at = slice(writes.start, None, writes.step)
    of = OrthogonalCoefficients(
        alphas=(kept[..., :1] * alpha[..., :1]).squeeze(-2),
        of_writes=(kept * -eta)[..., at].mT,
        thetas=(moved[..., :1] * theta[..., :1]).squeeze(-1),
        sums=by_source(moved, *gamma, rule.window),
    )
    return OrthogonalWrites(rule, of, writes)


def discounted(steps: Tensor, gate: Tensor) -> Tensor:
    """u[r] = sum_{t >= r} steps[t] prod_{r < j <= t} gate[j]: steps times a decay matrix that is never formed.

    steps [..., J, C]; gate [..., 1, C] in [0, 1], where 0 gives 0; returns [..., J, C].
    """
    tokens = gate.shape[-1]
    block = max(1, math.isqrt(tokens))
    spare = -tokens % block
    # What fills up the last block keeps all and adds nothing.
    steps = F.pad(steps, (0, spare)).unflatten(-1, (-1, block))  # [..., J, n, b]
    gate = F.pad(gate, (0, spare), value=1.0).unflatten(-1, (-1, block))  # [..., 1, n, b]
    within = decay_matrix(gate)  # [..., 1, n, b, b]
    own = (steps.unsqueeze(-2) @ within).squeeze(-2)
    # What a block and those after it give to the last token before it, in units of the gates between.
    arriving = own[..., 0] * gate[..., 0]  # [..., J, n]
    whole = within[..., -1, 0] * gate[..., 0]  # prod of a block's gates [..., 1, n]
    # later[m] counts block m and all after it, each through the gates of the blocks from m on before it.
    later = (arriving.unsqueeze(-2) @ decay_matrix(F.pad(whole[..., :-1], (1, 0), value=1.0))).squeeze(-2)
    carried = F.pad(later[..., 1:], (0, 1)).unsqueeze(-1) * within[..., -1, :]
    return (own + carried).flatten(-2)[..., :tokens]


def by_source(rows: Tensor, pair: Tensor | None, sources: Tensor | None, window: int) -> Tensor:
    """rows Gm: of each row and source the sum over the tokens that see it. rows [N, G, J, C] -> [N, G, J, I].

    pair [N, G, C, W]: entry j is of the source j tokens back; or sources [N, G, I]: a gate for each source.
    """
    tokens = rows.shape[-1]
    total = rows.new_zeros(*rows.shape[:-1], tokens + window - 1)
    for back in range(window):
        seen = rows if pair is None else rows * pair[..., back].unsqueeze(-2)
        total = total + F.pad(seen, (window - 1 - back, back))
    return total if sources is None else total * sources.unsqueeze(-2)
