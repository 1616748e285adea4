"""A memory that begins anew every so many tokens (`rule.shard`): its whole shards lie side by side in the batch.

Shards do not wait for each other, so one call scans them all (TNT, arXiv 2511.07343 Eq 6). Shards lie on absolute
positions 0, S, 2S, ...; the rest of one that an earlier call began comes first, a begun one last.

Dims: B batch, T tokens, S tokens of a shard, n whole shards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .rule import Inputs, MemoryRule, MemoryState, initial_state

Scan = Callable[[MemoryRule, MemoryState[int], Inputs], tuple[Tensor, MemoryState[int]]]


def in_shards(
    scan: Scan, rule: MemoryRule, state: MemoryState[int], inputs: Inputs, start: tuple[Tensor, ...]
) -> tuple[Tensor, MemoryState[int]]:
    """`scan` with a memory at its `start` weights [H, rows, cols] at every shard's first token; the rest as in `scan`.

    The state after a shard's last token is that shard's: what it is asked before the next token, it still answers.
    """
    size, length = rule.shard, inputs.q.shape[1]
    endless = replace(rule, shard=0)
    begun = state.position % size
    head = min(-begun % size, length)
    count, tail = divmod(length - head, size)
    parts = iter(inputs.split([n for n in (head, count * size, tail) if n]))
    kept = {"residuals": state.residuals is not None, "source_gates": not inputs.gates.pair}
    fresh = lambda own: initial_state(rule, start, own.k, own.v, **kept)  # noqa: E731
    outputs, after = [], state
    if head:
        y, after = scan(endless, state.at(begun), next(parts))
        outputs.append(y)
    if count:
        # [B, n S, ...] -> [B n, S, ...]: a view.
        own = next(parts).map(lambda t: t.unflatten(1, (count, size)).flatten(0, 1))
        y, last = scan(endless, fresh(own), own)
        outputs.append(y.unflatten(0, (-1, count)).flatten(1, 2))
        after = last.map(lambda t: t.unflatten(0, (-1, count))[:, -1])
    if tail:
        own = next(parts)
        y, after = scan(endless, fresh(own), own)
        outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return y, after.at(state.position + length)
