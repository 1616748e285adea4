"""The delta rule in matrix products: a linear memory whose every token is its own chunk.

    M_t = alpha_t M_{t-1} - eta_t gamma_t (M_{t-1} x_t - v_t) x_t^T = alpha_t M_{t-1} + u_t x_t^T

Over a block of tokens that starts at M_0, with P_t the product of alpha up to t and T[t,s] that from s+1 to t, the u_t
solve a unit lower triangular system (the WY form of DeltaNet, arXiv 2406.06484, with decay):

    u_t + b_t sum_{s<t} T[t-1,s] (x_t . x_s) u_s = b_t (v_t - P_{t-1} M_0 x_t)          b = eta gamma

so U = U_0 - Q M_0^T, with U_0 and Q of all blocks solved at once, and only M_0 goes from block to block.

Dims: B batch, T tokens, H heads, G = B x H, N blocks, L tokens of a block, D lifted key, V value.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .decays import decay_matrix
from .packing import Packing, pack
from .products import times_transpose
from .rule import Gates, MemoryState

BLOCK = 64
# Blocks between two states that are held for the backward.
HELD_EVERY = 16


def delta_rule(q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """Arguments as in `omega_memory` for a rule with `rule.delta`."""
    inputs = (q, k, v, _steps(gates), gates.alpha.unsqueeze(-1))
    y, weights = _pieces(inputs, state.weights[0], None, None)
    return y, replace(state, weights=(weights,), anchor=(weights,), position=state.position + q.shape[1])


def delta_rule_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    state: MemoryState,
    start: tuple[Tensor, ...],
    positions: Tensor,
) -> tuple[Tensor, MemoryState]:
    """As `delta_rule`, at the `start` weights [H, V, D] wherever `positions` [B, T] is 0."""
    packing = pack(positions, BLOCK)
    inputs = [packing.placed(t) for t in (q, k, v, _steps(gates))]
    inputs.append(packing.placed(gates.alpha.unsqueeze(-1), 1.0))
    y, weights = _pieces(tuple(inputs), state.weights[0], packing, start[0])
    after = replace(state, weights=(weights,), anchor=(weights,), position=positions[:, -1] + 1)
    return packing.taken(y), after


def _steps(gates: Gates) -> Tensor:
    """eta gamma [B, T, H, 1]."""
    return (gates.eta * (gates.gamma.squeeze(-1) if gates.pair else gates.gamma)).unsqueeze(-1)


def _pieces(
    inputs: tuple[Tensor, ...], M: Tensor, packing: Packing | None, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], M after) of q, k, v, step, alpha [B, T, H, ...]; M [B, H, V, D]."""
    batch, tokens, heads, _ = inputs[0].shape
    # As in chunked.py: what fills up the blocks of packed documents does not tip a batch into recomputation.
    given = max(packing.positions.shape[1], tokens // 2) if packing else tokens
    recompute = torch.is_grad_enabled() and given > BLOCK * HELD_EVERY
    parts, M = [], M.flatten(0, 1)
    for number, piece in enumerate(zip(*(t.split(BLOCK * HELD_EVERY, 1) for t in inputs), strict=True)):
        fresh = None
        if packing is not None and start is not None:
            blocks = slice(number * HELD_EVERY, (number + 1) * HELD_EVERY)
            rows = packing.resets[blocks].repeat_interleave(heads, 1)[..., None, None]
            fresh = (packing.resetting[blocks], rows, start.expand(batch, *start.shape).flatten(0, 1))
        if recompute:
            y, M = checkpoint(_scan, piece, M, fresh, use_reentrant=False, preserve_rng_state=False)
        else:
            y, M = _scan(piece, M, fresh)
        parts.append(y.unflatten(0, (batch, heads)).transpose(1, 2))
    return torch.cat(parts, 1), M.unflatten(0, (batch, heads))


def _scan(
    inputs: tuple[Tensor, ...], M: Tensor, fresh: tuple[tuple[bool, ...], Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """[B, T, H, ...] and M [G, V, D] -> y [G, T, V] and the M after.

    fresh: (the blocks in which any memory begins anew, which ones do [N, G, 1, 1], what they begin with).
    """
    q, k, v, step, alpha = inputs
    tokens = q.shape[1]
    length = min(BLOCK, tokens)
    blocks = -(-tokens // length)
    missing = blocks * length - tokens

    def by_block(t: Tensor, fill: float = 0.0) -> Tensor:
        t = F.pad(t, (0, 0, 0, 0, 0, missing), value=fill)
        return t.unflatten(1, (blocks, length)).movedim(3, 1).flatten(0, 1)  # [G, N, L, ...]

    # A token that is not there: no step, no decay.
    x, q, v, step, alpha = by_block(k), by_block(q), by_block(v), by_block(step), by_block(alpha, 1.0).squeeze(-1)
    decay = decay_matrix(alpha)
    upto = decay[..., :1] * alpha[..., :1, None]  # P_t
    before = torch.cat([torch.ones_like(upto[..., :1, :]), upto[..., :-1, :]], -2)  # P_{t-1}
    # T[t-1, s], zero for s >= t.
    earlier = F.pad(decay[..., :-1, :], (0, 0, 1, 0))
    system = step * earlier * (x @ x.mT)
    solved = torch.linalg.solve_triangular(
        system, torch.cat([step * v, step * before * x], -1), upper=False, unitriangular=True
    )
    own, through = solved.split([v.shape[-1], x.shape[-1]], -1)
    seen = decay * (q @ x.mT)
    carried = upto * q
    leaving = decay[..., -1, :].unsqueeze(-1) * x
    outputs = []
    for n in range(blocks):
        if fresh is not None and fresh[0][n]:
            M = torch.where(fresh[1][n], fresh[2], M)
        u = own[:, n] - times_transpose(through[:, n], M)
        outputs.append(times_transpose(carried[:, n], M).baddbmm_(seen[:, n], u))
        M = torch.baddbmm(upto[:, n, -1:] * M, u.mT, leaving[:, n])
    return torch.cat(outputs, 1)[:, :tokens], M
