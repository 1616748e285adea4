"""The memory in matrix products, chunk by chunk: the map of `reference.py`, exact.

All whole chunks are one segment where the memory holds their graph for the backward. Elsewhere the sequence is cut into
segments of about sqrt(N) of its N chunks; each is recomputed in the backward from the state at its border
(torch.utils.checkpoint), so what is held between forward and backward, beyond inputs and outputs, grows with the square
root of T. A segment whose own graph is large (many orthogonalised writes) is recomputed chunk by chunk once more. With
ns_steps = 0 no matrix is formed per token.

Dims: B batch, T tokens, H heads, G = B x H, N chunks of a segment, C tokens of a chunk, W window, I = C + W - 1
sources of a chunk (its tokens and their halo), D lifted key, V value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .delta_rule import delta_rule, delta_rule_packed
from .layout import Layout, Windows, gates_by_chunk, windows
from .leaving import leaving_writes
from .memories import Matrices, MatrixView, WeightView, memory_of, oriented
from .mlp_once import mlp_once, once_coefficients, writes_once
from .mlp_scan import mlp_scan
from .one_token import one_token
from .packing import Packing, pack
from .room import may_hold
from .rule import Gates, Inputs, MemoryRule, MemoryState
from .writes import (
    OrthogonalWriter,
    Writes,
    coefficients_of,
    orthogonal_writes,
    summed_steps,
    writes_of,
)

# A call whose whole graph is larger than this recomputes it. None: as the memory allows (room.py).
HELD_BYTES: float | None = None
# A segment whose graph is larger than this, while it is recomputed, recomputes each of its chunks in turn.
SEGMENT_BYTES = 1 << 30


@dataclass(frozen=True)
class Tokens:
    """The tokens of a segment by chunk.

    r and the residual of the read are x and q where none is given, and zero where the rule has none.
    q [N, G, C, D]; read_residual [N, G, C, V]; x [N, G, I, D]; v, r [N, G, I, V].
    """

    q: Tensor
    read_residual: Tensor
    x: Tensor
    v: Tensor
    r: Tensor


# (rule, coefficients of the chunks, tokens, weights, momentum, the first chunk's anchor) -> (y [N, G, C, V], weights,
# momentum that leave), matrices [G, wide, narrow]; momentum is passed through where the rule has none.
SegmentScan = Callable[
    [MemoryRule, Any, Tokens, Matrices, Matrices, Matrices], tuple[Tensor, Matrices, Matrices]
]
# (rule; the first token's place in its chunk; gates of the segment [B, N*C, H, ...]; C; source gates in their chunks
# [N, G, I], None with pair gates) -> what a `SegmentScan` takes.
SegmentCoefficients = Callable[[MemoryRule, int, Gates, int, Tensor | None], Any]
@dataclass(frozen=True)
class Kernels:
    """What computes the heavy parts.

    segment: all chunks of a segment, and coefficients: what it takes of the gates; None: chunk by chunk here. windows:
    puts sources in their chunks. Chunk by chunk: how sources read the anchor, and what writes where ns_steps > 0.
    held_of_step: how many matrices a write and Newton-Schulz step hold for the backward.
    """

    coefficients: SegmentCoefficients | None = None
    segment: SegmentScan | None = None
    windows: Windows = windows
    anchor: Callable[[Matrices], WeightView] = MatrixView
    orthogonal: OrthogonalWriter = orthogonal_writes
    held_of_step: float = 2.0


TORCH = Kernels()


def omega_memory_chunked(
    rule: MemoryRule, state: MemoryState[int], inputs: Inputs, kernels: Kernels = TORCH
) -> tuple[Tensor, MemoryState[int]]:
    """The map of `reference.py`. Inputs as in `omega_memory`, checked and in one dtype; the state is given."""
    if rule.delta:
        return delta_rule(state, inputs)
    pending = state.pending
    if pending is not None:
        places = torch.arange(inputs.q.shape[1], device=inputs.q.device) + state.position
        inputs, pending = _with_summed_steps(rule, inputs, pending, places)
    y, after = _by_segment(rule, state, inputs, kernels=kernels)
    return y, replace(after, pending=pending)


def omega_memory_packed(
    rule: MemoryRule,
    state: MemoryState,
    inputs: Inputs,
    start: tuple[Tensor, ...],
    positions: Tensor,
    kernels: Kernels = TORCH,
) -> tuple[Tensor, MemoryState[Tensor]]:
    """As `omega_memory_chunked`, at the `start` weights [H, rows, cols] where a document or a shard of it begins."""
    if rule.delta:
        return delta_rule_packed(rule, state, inputs, start, positions)
    if positions.shape[1] == 1:
        return _one_token(rule, state, inputs, start, positions, kernels)
    packing, before, window = pack(positions, rule.chunk, rule.shard), rule.window - 1, rule.window
    sources = [packing.placed_after(halo, t) for halo, t in ((state.keys, inputs.k), (state.values, inputs.v))]
    residual = inputs.residual
    if residual is not None and state.residuals is not None:
        sources.append(packing.placed_after(state.residuals, residual[1]))
        residual = (packing.placed(residual[0]), sources[2][:, before:])
    pending = state.pending
    if pending is not None:
        # Before the tokens are placed: what fills up a chunk takes no step, even where a period ends there.
        inputs, pending = _with_summed_steps(rule, inputs, pending, positions)
    gates = packing.gates(inputs.gates, state.gamma, window)
    whole = Inputs(packing.placed(inputs.q), sources[0][:, before:], sources[1][:, before:], gates, residual)
    halos = [s[:, :before] for s in sources]
    held = halos[2] if residual else None
    now = replace(state.at(0), keys=halos[0], values=halos[1], residuals=held, gamma=None)
    y, now = _by_segment(rule, now, whole, (packing, start), kernels)
    position = positions[:, -1] + 1
    at_border = (position % rule.chunk == 0).view(-1, 1, 1, 1)
    following = [packing.following(s, window) for s in sources]
    gamma = None
    if state.gamma is not None:
        gamma = packing.following(packing.placed_after(state.gamma, inputs.gates.gamma), window)
    after = MemoryState(
        weights=now.weights,
        momentum=now.momentum,
        anchor=tuple(torch.where(at_border, w, a) for w, a in zip(now.weights, now.anchor, strict=True)),
        keys=following[0],
        values=following[1],
        residuals=following[2] if residual else None,
        gamma=gamma,
        position=position,
        pending=pending,
    )
    return packing.taken(y), after


def _one_token(
    rule: MemoryRule,
    state: MemoryState,
    inputs: Inputs,
    start: tuple[Tensor, ...],
    positions: Tensor,
    kernels: Kernels,
) -> tuple[Tensor, MemoryState[Tensor]]:
    """As `omega_memory_packed`, of one token a row."""
    pending = state.pending
    if pending is not None:
        inputs, pending = _with_summed_steps(rule, inputs, pending, positions)
    step = lambda at, own: _by_segment(rule, at, own, kernels=kernels)  # noqa: E731
    y, after = one_token(rule, replace(state, pending=None), inputs, start, positions, step)
    return y, replace(after, pending=pending)


def _with_summed_steps(rule: MemoryRule, inputs: Inputs, pending: Tensor, places: Tensor) -> tuple[Inputs, Tensor]:
    """As `summed_steps`: the inputs whose eta are sums, and the sum that is pending after them."""
    eta, pending = summed_steps(rule, inputs.gates.eta, pending, places)
    return replace(inputs, gates=replace(inputs.gates, eta=eta)), pending


def _by_segment(
    rule: MemoryRule,
    state: MemoryState[int],
    inputs: Inputs,
    packed: tuple[Packing, tuple[Tensor, ...]] | None = None,
    kernels: Kernels = TORCH,
) -> tuple[Tensor, MemoryState[int]]:
    """Scan all tokens, recomputing segments where their graph is too large to hold. packed: and the start weights."""
    length = inputs.q.shape[1]
    graph = partial(graph_bytes, rule, state, held_of_step=kernels.held_of_step)
    # What fills up the chunks of packed documents does not tip a batch into recomputation, unless it is most of it.
    given = max(packed[0].positions.shape[1], length // 2) if packed else length
    hold = may_hold(graph(given), inputs.q.device, HELD_BYTES)
    recompute = torch.is_grad_enabled() and not hold
    pieces = cut(state.position, length, rule.chunk, whole=hold)
    by_chunk = recompute and graph(max(n * c for n, c in pieces)) > SEGMENT_BYTES
    outputs, first = [], 0
    for part, (chunks, tokens) in zip(inputs.split([n * c for n, c in pieces]), pieces, strict=True):
        borders = Borders(packed[0], oriented(memory_of(rule), packed[1]), first) if packed else None
        arguments = (rule, state, part, chunks, tokens, by_chunk, borders, kernels)
        if recompute:
            y, state = checkpoint(scan, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = scan(*arguments)
        outputs.append(y)
        first += chunks
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state


class Borders:
    """What document borders do to the memories of one segment, [G, wide, narrow] each, chunk by chunk."""

    def __init__(self, packing: Packing, start: tuple[Tensor, ...], first: int) -> None:
        """start [H, wide, narrow] each; first: the number of the segment's first chunk in the call."""
        self.packing, self.start, self.first = packing, start, first

    def enter(
        self, n: int, weights: Matrices, momentum: Matrices, anchor: Matrices, last: Matrices
    ) -> tuple[Matrices, Matrices, Matrices, Matrices]:
        """Weights, momentum and anchor of the segment's chunk n, and the anchors of rows that have ended, with it."""
        number = self.first + n
        begun = anchor
        if self.packing.resetting[number]:
            rows = self.packing.resets[number]
            fresh = tuple(f.expand(len(rows), *f.shape).flatten(0, 1) for f in self.start)
            nothing = tuple(torch.zeros_like(f) for f in fresh)
            weights, momentum = self._where(rows, fresh, weights), self._where(rows, nothing, momentum)
            begun = anchor if number else self._where(rows, fresh, anchor)
        # The call's first chunk may go on with one that an earlier call began; every other one begins here.
        anchor = weights if number else begun
        if self.packing.ending[number]:
            last = self._where(self.packing.ends == number, anchor, last)
        return weights, momentum, anchor, last

    def touches(self, n: int) -> bool:
        """Whether `enter` does more at the segment's chunk n than take the anchor from the weights."""
        return self.packing.resetting[self.first + n] or self.packing.ending[self.first + n]

    @staticmethod
    def _where(row: Tensor, yes: Matrices, no: Matrices) -> Matrices:
        heads = yes[0].shape[0] // len(row)
        mask = row.repeat_interleave(heads).view(-1, 1, 1)
        return tuple(torch.where(mask, a, b) for a, b in zip(yes, no, strict=True))


def graph_bytes(rule: MemoryRule, state: MemoryState, tokens: int, held_of_step: float = 2.0) -> float:
    """About what the backward of `tokens` tokens would hold without recomputation (factors as measured)."""
    batch, heads = state.weights[0].shape[:2]
    sources = tokens / rule.chunk * (rule.chunk + rule.window - 1)
    once = rule.memory == "mlp" and rule.ns_period == rule.chunk
    if rule.ns_steps:
        values, held_of_step = (3.6, min(held_of_step, 0.9)) if once else (4.3, held_of_step)
    else:
        values = 4.7 if rule.memory == "mlp" else 8.5
    values *= sources * sum(sum(w.shape[2:]) for w in state.weights)
    # The iterates of each write.
    entries = sum(math.prod(w.shape[2:]) for w in state.weights)
    values += held_of_step * rule.ns_steps * tokens / rule.ns_period * entries
    return values * batch * heads * state.weights[0].element_size()


def cut(position: int, tokens: int, chunk: int, whole: bool = False) -> list[tuple[int, int]]:
    """Segments as (chunks, tokens a chunk): the rest of a begun chunk, whole chunks by about sqrt(N), a tail.

    whole: all whole chunks as one segment.
    """
    head = min(-position % chunk, tokens)
    count, tail = divmod(tokens - head, chunk)
    step = max(1, count if whole else round(math.sqrt(count)))
    pieces = [(1, head)] if head else []
    pieces += [(min(step, count - i), chunk) for i in range(0, count, step)]
    return pieces + ([(1, tail)] if tail else [])


def scan(
    rule: MemoryRule,
    state: MemoryState[int],
    inputs: Inputs,
    chunks: int,
    tokens: int,
    by_chunk: bool = False,
    borders: Borders | None = None,
    kernels: Kernels = TORCH,
) -> tuple[Tensor, MemoryState[int]]:
    """Write and read one segment: `chunks` chunks of `tokens` tokens. (y [B, N*C, H, V], the state after it).

    by_chunk: hold only the weights at each chunk's border for the backward. borders: of packed documents; the state's
    anchor is then that of the last chunk of the rows that have ended.
    """
    layout = Layout(chunks, tokens, kernels.windows)
    q = read_residual = layout.by_chunk(inputs.q)
    x, keys = layout.with_halo(state.keys, inputs.k)
    v, values = layout.with_halo(state.values, inputs.v)
    r, residuals = x, None
    if inputs.residual is not None and state.residuals is not None:
        read_residual = layout.by_chunk(inputs.residual[0])
        r, residuals = layout.with_halo(state.residuals, inputs.residual[1])
    elif not rule.residual:
        r, read_residual = torch.zeros_like(v), v.new_zeros(*q.shape[:-1], v.shape[-1])
    given = inputs.gates
    own, gamma = (None, None) if state.gamma is None else layout.with_halo(state.gamma, given.gamma)

    offset = state.position % rule.chunk
    # Row by row: passes over matrices of one layout are several times faster than over two.
    by_row = lambda ms: tuple(m.flatten(0, 1).contiguous() for m in oriented(memory_of(rule), ms))  # noqa: E731
    weights, momentum = by_row(state.weights), by_row(state.momentum)
    anchor = weights if offset == 0 and not borders else by_row(state.anchor)
    whole = Tokens(q, read_residual, x, v, r)
    scanned = _scanned(kernels, rule, weights, tokens, by_chunk)
    if scanned:
        segment, coefficients = scanned
        of = coefficients(rule, offset, given, tokens, own)
        after = _by_stretch(rule, segment, of, whole, (weights, momentum, anchor), borders)
    else:
        if rule.read == "chunk":
            writes = leaving_writes(rule, offset, given, tokens, own)
        else:
            writes = writes_of(rule, offset, *gates_by_chunk(given, tokens, own), kernels.orthogonal)
        by = (kernels.anchor, writes)
        after = _chunk_by_chunk(rule, by, whole, (weights, momentum, anchor), by_chunk, borders)
    y, weights, momentum, anchor = after

    batch, _, heads, _ = inputs.q.shape
    position = state.position + chunks * tokens
    if position % rule.chunk == 0 and not borders:
        anchor = weights
    weights, momentum, anchor = (
        tuple(m.unflatten(0, (batch, heads)) for m in oriented(memory_of(rule), ms))
        for ms in (weights, momentum, anchor)
    )
    if not rule.momentum:
        momentum = state.momentum
    after_state = MemoryState(weights, momentum, anchor, keys, values, residuals, gamma, position)
    return layout.by_token(y, batch, heads), after_state


def _scanned(
    kernels: Kernels, rule: MemoryRule, weights: Matrices, tokens: int, by_chunk: bool
) -> tuple[SegmentScan, SegmentCoefficients] | None:
    """What scans all chunks of a segment as one function, and what it takes of the gates; None: chunk by chunk."""
    if rule.read == "chunk":
        return None
    if kernels is not TORCH:
        return (kernels.segment, kernels.coefficients) if kernels.segment and kernels.coefficients else None
    # torch's own are of an mlp's whole chunks: they hold a segment's graph, and cost more than one token's steps.
    # They write products into places of larger tensors, which a traced graph cannot hold.
    if rule.memory != "mlp" or tokens != rule.chunk or by_chunk or torch.compiler.is_dynamo_compiling():
        return None
    if rule.ns_steps == 0:
        return mlp_scan, _in_torch(coefficients_of)
    return (mlp_once, _in_torch(once_coefficients)) if writes_once(rule, weights, tokens) else None


def _in_torch(coefficients: Callable[..., Any]) -> SegmentCoefficients:
    def of(rule: MemoryRule, _offset: int, gates: Gates, tokens: int, sources: Tensor | None) -> Any:
        of_chunks, band = gates_by_chunk(gates, tokens, sources)
        return coefficients(rule, *of_chunks, band)

    return of


def _by_stretch(
    rule: MemoryRule,
    segment: SegmentScan,
    of: Any,
    whole: Tokens,
    matrices: tuple[Matrices, Matrices, Matrices],
    borders: Borders | None,
) -> tuple[Tensor, Matrices, Matrices, Matrices]:
    """A segment in stretches of chunks that no document border touches: (y [N, G, C, V]; weights, momentum, anchor).

    of: what `segment` takes of the gates, a dataclass of tensors [N, ...].
    matrices: weights, momentum and the first chunk's anchor. Without borders it is one stretch.
    """
    chunks = len(whole.q)
    starts = [n for n in range(chunks) if n == 0 or (borders and borders.touches(n))]
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], chunks], strict=True)]
    weights, momentum, anchor = matrices
    last_anchor, outputs = anchor, []
    for start, own, tokens in zip(starts, _stretches(of, lengths), _stretches(whole, lengths), strict=True):
        if borders:
            weights, momentum, anchor, last_anchor = borders.enter(start, weights, momentum, anchor, last_anchor)
        y, weights, momentum = segment(rule, own, tokens, weights, momentum, anchor)
        outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return y, weights, momentum, last_anchor if borders else anchor


def _stretches(of: Any, lengths: list[int]) -> list[Any]:
    """Coefficients or Tokens of a segment, taken apart along its chunks."""
    if len(lengths) == 1:
        return [of]
    fields = [[None] * len(lengths) if t is None else t.split(lengths) for t in vars(of).values()]
    return [type(of)(*parts) for parts in zip(*fields, strict=True)]


def _chunk_by_chunk(
    rule: MemoryRule,
    by: tuple[Callable[[Matrices], WeightView], Writes],
    whole: Tokens,
    matrices: tuple[Matrices, Matrices, Matrices],
    by_chunk: bool,
    borders: Borders | None,
) -> tuple[Tensor, Matrices, Matrices, Matrices]:
    """One chunk after the other: (y [N, G, C, V]; weights, momentum and anchor after them).

    by: how sources read the anchor, and what writes. matrices: weights, momentum and the first chunk's anchor.
    by_chunk, borders: as in `scan`.
    """
    anchor_of, writes = by
    memory, outputs = memory_of(rule), []
    # Taken apart at once: the backward of one index is a whole segment of zeros.
    tensors = (whole.q, whole.read_residual, whole.x, whole.v, whole.r)
    qs, read_qs, xs, vs, rs = (t.unbind() for t in tensors)

    def step(n: int, weights: Matrices, momentum: Matrices, anchor: Matrices) -> tuple[Tensor, Matrices, Matrices]:
        factors = memory.factors(anchor_of(rule.anchor_of(anchor)), xs[n], vs[n], rs[n])
        reader, leave = writes.advance(n, weights, momentum, factors)
        y = memory.read(MatrixView(anchor) if rule.read == "chunk" else reader, qs[n], read_qs[n])
        return y, *leave()

    weights, momentum, anchor = matrices
    last_anchor = anchor
    for n in range(len(qs)):
        if borders:
            weights, momentum, anchor, last_anchor = borders.enter(n, weights, momentum, anchor, last_anchor)
        elif n > 0:
            anchor = weights
        if by_chunk:
            y, weights, momentum = checkpoint(
                step, n, weights, momentum, anchor, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y, weights, momentum = step(n, weights, momentum, anchor)
        outputs.append(y)
    # Chunks of a memory side by side: `by_token` then needs no copy.
    return torch.stack(outputs, 1).transpose(0, 1), weights, momentum, last_anchor if borders else anchor
