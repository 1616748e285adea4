"""Context parallelism: a sequence in equal contiguous shards over a group of ranks, and what passes between them.

Three exchanges, each differentiable: the last tokens of the shards to the left (`Chain.before`), a state from the left
neighbour and on to the right one (`Chain.receive`, `Chain.pass_on`), and sequence shards against shards of the heads
(`to_heads`, `to_sequence`). In the forward all but the last flow to the right and nothing is waited for on the left, so
that the first rank may run ahead by whole layers; in the backward gradients flow to the left. A group of None is this
process alone: every exchange is then the identity.

Every rank must make the same calls in the same order. Dims: B batch, t tokens of a shard, H heads, N ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import reduce
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

# Messages that may be under way at once: beyond that a rank that has run ahead waits for its right neighbour.
UNDER_WAY = 64


@dataclass(frozen=True)
class Chain:
    """Ranks that hold consecutive stretches of a sequence, in the order of `group`."""

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @overload
    def before(self, x: Tensor, count: int | None, dim: int, first: Tensor) -> Tensor: ...

    @overload
    def before(self, x: Tensor, count: int | None, dim: int, first: None) -> Tensor | None: ...

    def before(self, x: Tensor, count: int | None, dim: int, first: Tensor | None) -> Tensor | None:
        """The `count` positions of `dim` that come before x, over as many ranks as hold them (None: all).

        first: what comes before the whole sequence, the same on every rank. Fewer than `count` where the sequence, with
        `first`, begins within reach. One rank alone answers with `first`, be it None.
        """
        length, reach = x.shape[dim], self.rank * x.shape[dim]
        if self.size == 1:
            return first
        needed = (self.size - 1) * length if count is None else count
        hops = min(-(-needed // length), self.size - 1)
        # What each hop brings is cut to what is still needed of it.
        parts = list(_Halo.apply(x, self, dim, [min(length, needed - hop * length) for hop in range(hops)]))
        if first is not None:
            kept = first.shape[dim] if count is None else min(max(0, count - reach), first.shape[dim])
            parts.insert(0, first.narrow(dim, first.shape[dim] - kept, kept))
        # The first rank's part has no position, but keeps the node in its graph, where its gradients arrive.
        return torch.cat(parts, dim)

    def receive(self, like: Sequence[Tensor], root: Tensor, unused: Any = None) -> tuple[Tensor, ...]:
        """What the left neighbour passed on: tensors of the shapes and dtypes of `like`; not for the first rank.

        root: any tensor that requires a gradient where the state shall. `like`, and the tensors of `unused`, get a
        gradient of zero: start weights then have one on every rank, as data parallelism expects, and so has a state
        from before the whole sequence, which only the first rank reads.
        """
        widest = reduce(torch.promote_types, (t.dtype for t in like))
        spared: list[Tensor] = []
        _framed(unused, spared)
        flat = _Receive.apply(self, sum(t.numel() for t in like), widest, root, *like, *spared)
        parts = flat.split([t.numel() for t in like])
        return tuple(part.view(t.shape).to(t.dtype) for part, t in zip(parts, like, strict=True))

    def pass_on(self, y: Tensor, state: Sequence[Tensor]) -> Tensor:
        """y itself, once the state is on its way to the right neighbour (the last rank has none).

        y stands for the message in the backward: its gradient is asked for when the state's arrives.
        """
        if self.rank == self.size - 1:
            return y
        return _PassOn.apply(y, self, torch.cat([t.flatten() for t in state]))

    def from_last(self, state: Any) -> Any:
        """The last rank's state, on every rank: dataclasses and tuples of tensors, numbers and None."""
        if self.size == 1:
            return state
        tensors: list[Tensor] = []
        frame = [_framed(state, tensors)]
        dist.broadcast_object_list(frame, self.global_rank(self.size - 1), self.group)
        return _filled(frame[0], iter(_FromLast.apply(self, frame[0], *tensors) if tensors else ()))

    def global_rank(self, rank: int) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, rank)

    def send(self, tensor: Tensor, rank: int) -> None:
        """Start sending; the tensor must not change any more."""
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self.global_rank(rank), self.group)
        _under_way.append((work, tensor))
        while len(_under_way) > UNDER_WAY:
            _under_way.popleft()[0].wait()

    def fetch(self, tensor: Tensor, rank: int) -> Tensor:
        """Receive into the tensor."""
        dist.recv(tensor, self.global_rank(rank), self.group)
        return tensor


ALONE = Chain()

_under_way: deque[tuple[Any, Tensor]] = deque()


def settle() -> None:
    """Wait until all that was sent has arrived: at the end of a step, and before groups are taken apart."""
    while _under_way:
        _under_way.popleft()[0].wait()


class _Halo(Function):
    """The ends of the shards to the left, the farthest first: lengths[h] positions from h + 1 ranks away."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Chain, dim: int, lengths: list[int]) -> tuple[Tensor, ...]:
        ctx.chain, ctx.dim, ctx.lengths, ctx.shape = chain, dim, lengths, x.shape
        for hop, length in enumerate(lengths, 1):
            if chain.rank + hop < chain.size:
                chain.send(x.narrow(dim, x.shape[dim] - length, length), chain.rank + hop)
        parts = []
        for hop, length in enumerate(lengths, 1):
            if chain.rank >= hop:
                parts.append(chain.fetch(_empty(x, dim, length), chain.rank - hop))
        return tuple(reversed(parts)) or (x.new_empty(_empty(x, dim, 0).shape),)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        chain, dim = ctx.chain, ctx.dim
        for hop in range(1, min(len(ctx.lengths), chain.rank) + 1):
            chain.send(gradients[-hop], chain.rank - hop)
        total = gradients[0].new_zeros(ctx.shape)
        for hop, length in enumerate(ctx.lengths, 1):
            if chain.rank + hop < chain.size:
                end = total.narrow(dim, ctx.shape[dim] - length, length)
                end += chain.fetch(_empty(total, dim, length), chain.rank + hop)
        return total, None, None, None


def _empty(x: Tensor, dim: int, length: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = length
    return x.new_empty(shape)


class _Receive(Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, numel: int, dtype: torch.dtype, root: Tensor, *unread: Tensor) -> Tensor:
        ctx.chain, ctx.shapes = chain, [t.shape for t in unread]
        return chain.fetch(torch.empty(numel, dtype=dtype, device=root.device), chain.rank - 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.chain.send(gradient, ctx.chain.rank - 1)
        return (None, None, None, None, *(gradient.new_zeros(()).expand(shape) for shape in ctx.shapes))


class _PassOn(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, chain: Chain, flat: Tensor) -> Tensor:
        ctx.chain, ctx.flat = chain, torch.empty_like(flat, device="meta")
        ctx.device = flat.device
        chain.send(flat.detach(), chain.rank + 1)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
        chain = ctx.chain
        return gradient, None, chain.fetch(torch.empty_like(ctx.flat, device=ctx.device), chain.rank + 1)


class _FromLast(Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, frame: Any, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.chain, ctx.own = chain, len(own)
        last = chain.rank == chain.size - 1
        ctx.holes = _holes(frame)
        tensors, device = [], own[0].device
        for number, hole in enumerate(ctx.holes):
            t = torch.empty(hole.shape, dtype=hole.dtype, device=device)
            if last:
                t.copy_(own[number])
            dist.broadcast(t, chain.global_rank(chain.size - 1), chain.group)
            tensors.append(t)
        ctx.mark_non_differentiable(*(t for t in tensors if not t.is_floating_point()))
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        chain = ctx.chain
        summed: list[Tensor | None] = [None] * len(gradients)
        for number, (hole, gradient) in enumerate(zip(ctx.holes, gradients, strict=True)):
            if hole.dtype.is_floating_point:
                summed[number] = total = gradient.clone(memory_format=torch.contiguous_format)
                dist.reduce(total, chain.global_rank(chain.size - 1), group=chain.group)
        last = chain.rank == chain.size - 1
        return (None, None, *(summed if last else [None] * ctx.own))


@dataclass(frozen=True)
class _Hole:
    """Where a tensor goes."""

    shape: torch.Size
    dtype: torch.dtype


def _framed(state: Any, tensors: list[Tensor]) -> Any:
    """The state with holes for its tensors, which are appended in their order."""
    if isinstance(state, Tensor):
        tensors.append(state)
        return _Hole(state.shape, state.dtype)
    if isinstance(state, tuple):
        return tuple(_framed(part, tensors) for part in state)
    if is_dataclass(state) and not isinstance(state, type):
        return replace(state, **{f.name: _framed(getattr(state, f.name), tensors) for f in fields(state)})
    return state


def _filled(frame: Any, tensors: Any) -> Any:
    if isinstance(frame, _Hole):
        return next(tensors)
    if isinstance(frame, tuple):
        return tuple(_filled(part, tensors) for part in frame)
    if is_dataclass(frame) and not isinstance(frame, type):
        return replace(frame, **{f.name: _filled(getattr(frame, f.name), tensors) for f in fields(frame)})
    return frame


def _holes(frame: Any) -> list[_Hole]:
    if isinstance(frame, _Hole):
        return [frame]
    if is_dataclass(frame) and not isinstance(frame, type):
        frame = tuple(getattr(frame, f.name) for f in fields(frame))
    return [hole for part in frame for hole in _holes(part)] if isinstance(frame, tuple) else []


def to_heads(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[B, t, H, ...] of this rank's tokens -> [B, N t, H/N, ...]: all the group's tokens, a share of the heads."""
    return x if group is None or group.size() == 1 else _ToHeads.apply(x, group)


def to_sequence(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The inverse of `to_heads`: [B, N t, H/N, ...] -> [B, t, H, ...]."""
    return x if group is None or group.size() == 1 else _ToSequence.apply(x, group)


def all_tokens(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[B, t] whole numbers of every rank -> [B, N t] on each."""
    if group is None or group.size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, 1)


class _ToHeads(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(x.unflatten(2, (group.size(), -1)).movedim(2, 0), group).movedim(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _ToSequence.apply(gradient, ctx.group), None


class _ToSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(x.unflatten(1, (group.size(), -1)).movedim(1, 0), group).movedim(0, 2).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _ToHeads.apply(gradient, ctx.group), None


def _exchanged(blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[N, ...], one block for each rank -> [N, ...], one block from each rank."""
    blocks = blocks.contiguous()
    received = torch.empty_like(blocks)
    dist.all_to_all_single(received, blocks, group=group)
    return received
