"""Full and sliding-window attention with rotary positions and persistent tokens, and MAC's inside a segment.

Dims: B batch, T tokens, H heads, K head size, W window, L query block, P tokens kept from before, R keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Persistent:
    """Learned keys and values [H, 2, n, K] that every query sees besides, and the queries [B, H, T, K] that see them.

    They have no position, so these queries are not rotated: what a token sees of them does not depend on where it is.
    """

    learned: Tensor
    queries: Tensor


def persistent_of(learned: Tensor | None, queries: Tensor) -> Persistent | None:
    """The persistent tokens of a layer that may have none. queries [B, H, T, K]: not rotated."""
    return None if learned is None else Persistent(learned, queries)


def rotary(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin [..., T, K/2], float32, of the rotary angles t base^(-2i/K), i = 0 .. K/2 - 1 (arXiv 2104.09864).

    positions [..., T]: absolute, whole numbers.
    """
    # float64: ten million tokens into a sequence, a float32 angle is wrong by half a radian.
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angle = positions.double().unsqueeze(-1) * base ** (-pairs / head_dim)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i+K/2}) of x [..., T, K] by its angle; in float32 or wider, returned in x's dtype.

    rotation: cos and sin of `rotary`, which broadcast over what leads x.
    """
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, persistent: Persistent | None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the keys that `seen` allows, and over the persistent ones.

    q [..., H, T, K]; k, v [..., H, R, K]; seen, bool, broadcasts to [..., H, T, R]. Returns [..., H, T, K].
    """
    if persistent is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    keys, values = persistent.learned.to(q.dtype).unbind(1)
    scale, width = q.shape[-1] ** -0.5, q.shape[-1]
    # One attention over both kinds of keys: the rotated queries meet zeros in the persistent ones, and the other way.
    q = torch.cat([persistent.queries, q], -1)
    keys = F.pad(keys, (0, width)).expand(*k.shape[:-2], -1, -1)
    k = torch.cat([keys, F.pad(k, (width, 0))], -2)
    v = torch.cat([values.expand(*v.shape[:-2], -1, -1), v], -2)
    seen = F.pad(seen, (values.shape[-2], 0), value=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    persistent: Persistent | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of q [B, H, T, K] to all keys up to each query's own, with one mask over T x (P + T).

    k, v [B, H, P+T, K], the last T of which are the queries' own tokens. positions [B, T]: of the queries in packed
    documents, out of which none looks back; None: all is one document. window: how many keys a query sees, its own
    included; None: all. Returns [B, H, T, K].
    """
    tokens, total = q.shape[2], k.shape[2]
    if tokens == total and persistent is None and positions is None and window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    back = torch.arange(total - tokens, total, device=q.device)[:, None] - torch.arange(total, device=q.device)
    seen = back >= 0
    if window is not None:
        seen = seen & (back < window)
    if positions is not None:
        seen = seen & (back <= positions[:, None, :, None])
    return attend(q, k, v, seen, persistent)


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    persistent: Persistent | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """`causal_attention` to the `window` keys that end at each query's own, in blocks of queries.

    k, v [B, H, P+T, K], P < W. Blocks have L = min(W, T) queries: each needs only the W-1+L keys up to its end, so that
    masks and scores grow with T x W, not with T x T. Returns [B, H, T, K].
    """
    tokens, before = q.shape[2], k.shape[2] - q.shape[2]
    length = min(window, tokens)
    blocks = -(-tokens // length)
    # One block reads from the first key there is; several must all look back equally far.
    reach = before if blocks == 1 else window - 1
    front, back = reach - before, blocks * length - tokens
    q = _in_blocks(F.pad(q, (0, 0, 0, back)), length, length)
    k, v = (_in_blocks(F.pad(t, (0, 0, front, back)), reach + length, length) for t in (k, v))
    if persistent is not None:
        queries = _in_blocks(F.pad(persistent.queries, (0, 0, 0, back)), length, length)
        persistent = Persistent(persistent.learned, queries)

    query = torch.arange(length, device=q.device)[:, None]
    key = torch.arange(reach + length, device=q.device) - reach
    band = (key <= query) & (key > query - window)
    start = torch.arange(0, blocks * length, length, device=q.device)[:, None, None]
    seen = band & (start + key >= -before)  # no key before the first
    seen = seen[:, None, None]  # [blocks, B, H, L, reach + L]
    if positions is not None:
        own = F.pad(positions, (0, back)).unflatten(1, (blocks, length)).transpose(0, 1)
        seen = seen & (query - key <= own[:, :, None, :, None])
    y = attend(q, k, v, seen, persistent)
    return y.movedim(0, 2).flatten(2, 3)[:, :, :tokens]


def within_segment(
    q: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], persistent: Persistent | None = None
) -> Tensor:
    """MAC's attention in a segment, over [persistent tokens | what was read | the segment] (Titans, section 4.1).

    q [B, H, T, K]: of the last T of the segment's S tokens so far. keys, values: of these tokens, as they are and as
    the memory answers them, two of [B, H, S, K] each. A token sees itself and those before it, in both.
    Returns [B, H, T, K].
    """
    tokens, total = q.shape[2], keys[0].shape[2]
    before = torch.ones(tokens, total, dtype=torch.bool, device=q.device).tril(total - tokens)
    return attend(q, torch.cat(keys, 2), torch.cat(values, 2), before.repeat(1, len(keys)), persistent)


def _in_blocks(x: Tensor, size: int, step: int) -> Tensor:
    """[B, H, T, K] -> the blocks of `size` tokens that begin `step` apart, [blocks, B, H, size, K]."""
    return x.unfold(2, size, step).movedim(2, 0).mT
