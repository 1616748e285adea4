"""The query-key projection of local memories (TNT, arXiv 2511.07343 Eqs 7, 15): a query is moved into the span of keys.

    Pi_t = sum of k_i k_i^T over the keys since the last reset, the token's own included;   q'_t = Pi_t q_t

Blocks of BLOCK tokens: a product of queries and keys inside, and a [K, K] sum for all blocks before. Keys have length
1, so the paper's division by |k|^2 is none. FLOPs of a token and head: 4 K (BLOCK + K) + 2 T (K / BLOCK)^2.

Dims: B batch, T tokens, H heads, K head size, n blocks of b tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

BLOCK = 64


def project(q: Tensor, k: Tensor, begins: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pi_t q_t of every token [B, T, H, K], and the Pi that follows the last one [B, H, K, K].

    q, k [B, T, H, K], k of length 1; begins [B, T] bool: keys before this token are forgotten; before [B, H, K, K]: the
    Pi before the first token, None for zero. Float32, or float64 where q is.
    """
    batch, tokens, heads, width = q.shape
    block = min(BLOCK, tokens)
    spare = -tokens % block
    if spare:
        q, k = (F.pad(t, (0, 0, 0, 0, 0, spare)) for t in (q, k))
        begins = F.pad(begins, (0, spare))
    blocked = lambda t: t.unflatten(1, (-1, block)).movedim(3, 1)  # noqa: E731  [B, T, H, K] -> [B, H, n, b, K]
    queries, keys = blocked(q), blocked(k)
    # Which stretch a token lies in, counted from its block's first; 0 goes on with the block before.
    stretch = begins.unflatten(1, (-1, block)).cumsum(-1)  # [B, n, b]
    same = (stretch.unsqueeze(-1) == stretch.unsqueeze(-2)).tril().unsqueeze(1)  # [B, 1, n, b, b]
    out = (queries @ keys.mT * same) @ keys

    newest = (stretch == stretch[..., -1:]).to(q.dtype)  # not forgotten at the block's end
    sums = (keys * newest[:, None, ..., None]).mT @ keys  # [B, H, n, K, K]
    held = (stretch[..., -1] == 0).to(q.dtype)  # [B, n]: the block keeps what came before it
    start = q.new_zeros(batch, heads, width, width) if before is None else before.to(q.dtype)
    arriving = _before(sums, held, start)
    out = out + (queries @ arriving[:, :, :-1]) * (stretch == 0).to(q.dtype)[:, None, ..., None]
    return out.movedim(1, 3).flatten(1, 2)[:, :tokens], arriving[:, :, -1]


def _before(sums: Tensor, held: Tensor, start: Tensor) -> Tensor:
    """What stands before each block, and after the last: P_{j+1} = held_j P_j + sums_j, P_0 = start.

    sums [B, H, n, K, K]; held [B, n] of 0 and 1; start [B, H, K, K]. Returns [B, H, n + 1, K, K]. One product over all
    blocks: entry j, i says whether the sum of block i is still held before block j.
    """
    blocks = held.shape[1]
    counts = F.pad((1 - held).cumsum(1), (1, 0))  # blocks that forget, before each border
    still = (counts.unsqueeze(-1) == counts[:, None, 1:]).tril(-1)  # [B, n + 1, n]: no one after block i forgets
    started = (counts == 0).to(sums.dtype)  # [B, n + 1]
    mixed = still.to(sums.dtype).unsqueeze(1) @ sums.flatten(3)  # [B, H, n + 1, K K]
    assert mixed.shape[2] == blocks + 1
    return mixed.unflatten(3, sums.shape[3:]) + started[:, None, :, None, None] * start.unsqueeze(2)
