"""The delta rule in matrix products: a linear memory whose every token is its own chunk.

    M_t = alpha_t M_{t-1} - eta_t gamma_t (M_{t-1} x_t - v_t) x_t^T = alpha_t M_{t-1} + u_t x_t^T

Over a block of tokens that starts at M_0, with P_t the product of alpha up to t and T[t,s] that from s+1 to t, the u_t
solve a unit lower triangular system (the WY form of DeltaNet, arXiv 2406.06484, with decay):

    u_t + b_t sum_{s<t} T[t-1,s] (x_t . x_s) u_s = b_t (v_t - P_{t-1} M_0 x_t)          b = eta gamma

so U = U_0 - Q M_0^T, with U_0 and Q of all blocks solved at once, and only M_0 goes from block to block.

Packed documents need no padding. Where one begins, at token b of a block, the start weights S take the place of
M_{b-1}: alpha_b counts as 0, which cuts T and P, row b of T[t-1,s] and P_{b-1} are 0, and the share of S in M_t is
c_t = alpha_b T[t,b], with 1 for c_{b-1} and 0 before. So v_t becomes v_t - c_{t-1} S x_t, y_t gains c_t S q_t, and the
M after the block c S.

Dims: B batch, T tokens, H heads, G = B x H, N blocks, L tokens of a block, D lifted key, V value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .decays import decay_matrix
from .products import times_transpose
from .rule import Gates, Inputs, MemoryRule, MemoryState

BLOCK = 64
# Blocks between two states that are held for the backward.
HELD_EVERY = 16


def delta_rule(state: MemoryState[int], inputs: Inputs) -> tuple[Tensor, MemoryState[int]]:
    """Inputs as in `omega_memory` for a rule with `rule.delta`."""
    y, weights = _pieces(inputs, state.weights[0], None, None)
    return y, replace(state, weights=(weights,), anchor=(weights,), position=state.position + inputs.q.shape[1])


def delta_rule_packed(
    rule: MemoryRule, state: MemoryState, inputs: Inputs, start: tuple[Tensor, ...], positions: Tensor
) -> tuple[Tensor, MemoryState[Tensor]]:
    """As `delta_rule`, at the `start` weights [H, V, D] where a document of `positions` [B, T], or a shard, begins."""
    begins = (positions % rule.shard if rule.shard else positions) == 0
    y, weights = _pieces(inputs, state.weights[0], begins, start[0])
    return y, replace(state.at(positions[:, -1] + 1), weights=(weights,), anchor=(weights,))


def _steps(gates: Gates) -> Tensor:
    """eta gamma [B, T, H, 1]."""
    return (gates.eta * (gates.gamma.squeeze(-1) if gates.pair else gates.gamma)).unsqueeze(-1)


@dataclass(frozen=True)
class _Documents:
    """Where documents begin in a piece: begins [G, N, L] 0 or 1, the blocks that have such a token, S [G, V, D]."""

    begins: Tensor
    blocks: list[int]
    start: Tensor


def _pieces(inputs: Inputs, M: Tensor, begins: Tensor | None, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], M after). M [B, H, V, D]; begins [B, T] bool; start [H, V, D]."""
    batch, tokens, heads, _ = inputs.q.shape
    recompute = torch.is_grad_enabled() and tokens > BLOCK * HELD_EVERY
    parts, M = [], M.flatten(0, 1)
    whole = (inputs.q, inputs.k, inputs.v, _steps(inputs.gates), inputs.gates.alpha.unsqueeze(-1))
    for number, piece in enumerate(zip(*(t.split(BLOCK * HELD_EVERY, 1) for t in whole), strict=True)):
        documents = None
        if begins is not None and start is not None:
            own = begins[:, number * BLOCK * HELD_EVERY :][:, : piece[0].shape[1]]
            documents = _documents(own, start.expand(batch, *start.shape).flatten(0, 1), heads)
        if recompute:
            y, M = checkpoint(_scan, piece, M, documents, use_reentrant=False, preserve_rng_state=False)
        else:
            y, M = _scan(piece, M, documents)
        parts.append(y.unflatten(0, (batch, heads)).transpose(1, 2))
    return torch.cat(parts, 1), M.unflatten(0, (batch, heads))


def _documents(begins: Tensor, start: Tensor, heads: int) -> _Documents | None:
    """Of a piece's tokens [B, T] and S [G, V, D]; None where no document begins."""
    placed = _by_block(begins[..., None, None].to(start.dtype)).squeeze(-1)
    blocks = placed.any(-1).any(0).nonzero().flatten().tolist()
    return _Documents(placed.repeat_interleave(heads, 0), blocks, start) if blocks else None


def _by_block(t: Tensor, fill: float = 0.0) -> Tensor:
    """[B, T, H, ...] -> [G, N, L, ...], the last block filled up."""
    tokens = t.shape[1]
    length = min(BLOCK, tokens)
    t = F.pad(t, (0, 0, 0, 0, 0, -tokens % length), value=fill)
    return t.unflatten(1, (-1, length)).movedim(3, 1).flatten(0, 1)


def _scan(inputs: tuple[Tensor, ...], M: Tensor, documents: _Documents | None) -> tuple[Tensor, Tensor]:
    """q, k, v, step, alpha [B, T, H, ...] and M [G, V, D] -> y [G, T, V] and the M after."""
    q, k, v, step, alpha = inputs
    tokens = q.shape[1]
    # A token that is not there: no step, no decay.
    x, q, v, step, alpha = _by_block(k), _by_block(q), _by_block(v), _by_block(step), _by_block(alpha, 1.0).squeeze(-1)
    if documents is not None:
        begun = documents.begins * alpha
        alpha = alpha - begun
    decay = decay_matrix(alpha)
    upto = decay[..., :1] * alpha[..., :1, None]  # P_t
    before = torch.cat([torch.ones_like(upto[..., :1, :]), upto[..., :-1, :]], -2)  # P_{t-1}
    # T[t-1, s], zero for s >= t.
    earlier = F.pad(decay[..., :-1, :], (0, 0, 1, 0))
    if documents is not None:
        share = decay @ begun.unsqueeze(-1)  # c_t
        before, earlier, v = _begun(before, earlier, v, x, share, documents)
    system = step * earlier * (x @ x.mT)
    solved = torch.linalg.solve_triangular(
        system, torch.cat([step * v, step * before * x], -1), upper=False, unitriangular=True
    )
    own, through = solved.split([v.shape[-1], x.shape[-1]], -1)
    seen = decay * (q @ x.mT)
    carried = upto * q
    leaving = decay[..., -1, :].unsqueeze(-1) * x
    outputs = []
    for n in range(x.shape[1]):
        u = own[:, n] - times_transpose(through[:, n], M)
        y = times_transpose(carried[:, n], M).baddbmm_(seen[:, n], u)
        M = torch.baddbmm(upto[:, n, -1:] * M, u.mT, leaving[:, n])
        if documents is not None and n in documents.blocks:
            y = y + share[:, n] * times_transpose(q[:, n], documents.start)
            M = M + share[:, n, -1:] * documents.start
        outputs.append(y)
    return torch.cat(outputs, 1)[:, :tokens], M


def _begun(
    before: Tensor, earlier: Tensor, v: Tensor, x: Tensor, share: Tensor, documents: _Documents
) -> tuple[Tensor, Tensor, Tensor]:
    """P_{t-1} and T[t-1, s], zero where a document begins, and v_t - c_{t-1} S x_t, in the blocks where one does."""
    begins = documents.begins.unsqueeze(-1)
    places = torch.tensor(documents.blocks, device=v.device)
    seen = times_transpose(x[:, places].flatten(1, 2), documents.start).unflatten(1, (len(places), -1))
    goes_on = 1 - begins
    share = F.pad(share[:, places, :-1], (0, 0, 1, 0)) * goes_on[:, places] + begins[:, places]
    return before * goes_on, earlier * goes_on, v.index_add(1, places, share * seen, alpha=-1)
