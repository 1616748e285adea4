"""The exchanges of context parallelism alone, run in several processes by test_context.py: values and gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from atlas_kernels import MemoryState
from atlas_megatron.parallel.context import Chain, all_tokens, to_heads, to_sequence

LENGTH = 5  # tokens of a shard


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(ranks: int) -> Tensor:
    """[B, T, C]: the sequence that `ranks` ranks hold."""
    return drawn(2, ranks * LENGTH, 3)


def halos(rank: int, counts: list[int | None], first: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each count: what came before this rank, the gradient of its shard and that of `first`.

    The loss is the sum over ranks of a weighted sum of (halo, shard), weighted by the position in the whole.
    """
    chain = Chain(dist.group.WORLD)
    found = []
    for count in counts:
        x = whole(chain.size).chunk(chain.size, 1)[rank].clone().requires_grad_()
        held = drawn(2, 4, 3, seed=1).requires_grad_() if first else None
        before = chain.before(x, count, 1, held)
        assert before is not None
        seen = torch.cat([before, x], 1)
        (seen * weights(seen.shape[1], rank)).sum().backward()
        gradient = torch.zeros(()) if held is None or held.grad is None else held.grad
        assert x.grad is not None
        found.append((before.detach(), x.grad, gradient))
    return found


def weights(length: int, rank: int) -> Tensor:
    """[length, 1]: other ones for each rank."""
    return (torch.arange(length, dtype=torch.float64) + 1 + 10 * rank).unsqueeze(-1)


def heads_and_back(rank: int) -> dict[str, Tensor]:
    """[B, t, H, K] to a share of the heads, weighted there, and back."""
    size = dist.get_world_size()
    x = heads_input(size).chunk(size, 1)[rank].clone().requires_grad_()
    share = to_heads(x, dist.group.WORLD)
    back = to_sequence(share.square(), dist.group.WORLD)
    (back * (rank + 1)).sum().backward()
    places = all_tokens(torch.arange(LENGTH).expand(2, -1) + LENGTH * rank, dist.group.WORLD)
    assert x.grad is not None
    return {"share": share.detach(), "back": back.detach(), "gradient": x.grad, "places": places}


def heads_input(ranks: int) -> Tensor:
    return drawn(2, ranks * LENGTH, 2 * ranks, 3)


def handed_on(rank: int) -> dict[str, Tensor]:
    """A running product over the ranks: state_r = (state_{r-1} + 1) x_r, each rank's y its state; the start is 1."""
    chain = Chain(dist.group.WORLD)
    x = drawn(3, seed=rank).requires_grad_()
    like = (torch.empty(3, dtype=torch.float64), torch.empty(2, dtype=torch.float32))
    state, count = torch.ones(3, dtype=torch.float64), torch.zeros(2)
    if chain.rank > 0:
        state, count = chain.receive(like, x)
    state, count = (state + 1) * x, count + 1
    y = chain.pass_on(state.clone(), (state, count))
    (y * (rank + 1)).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "count": count.detach(), "gradient": x.grad}


def last_state(rank: int) -> dict[str, Any]:
    """The last rank's state on every rank, and what the sum of their uses gives it as a gradient."""
    chain = Chain(dist.group.WORLD)
    # Only the last rank knows the shapes.
    own = drawn(2, 3 if rank == chain.size - 1 else 1, seed=rank).requires_grad_()
    places = torch.tensor([rank])
    state = chain.from_last(MemoryState((own,), (), (own * 2,), own, own, None, None, rank))
    kept, position = chain.from_last((own, places))
    (state.weights[0] * (rank + 1) + 3 * state.anchor[0] + kept).sum().backward()
    gradient = torch.zeros_like(own) if own.grad is None else own.grad
    return {"weights": state.weights[0].detach(), "position": state.position, "places": position, "gradient": gradient}
