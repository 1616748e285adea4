"""The memory scan forward, a memory's chain in slices: see split.py, and forward.py for what a chunk is."""

from __future__ import annotations

import triton
import triton.language as tl

from atlas_kernels.gpu.scan.forward import anchor_output, write_rows
from atlas_kernels.gpu.scan.pieces import put, slot_of, tile
from atlas_kernels.gpu.scan.split import Split, add_parts, meet, round_of


@triton.jit
def places(n, sizes, S: tl.constexpr):
    """Of this program at chunk n: its slice, the chunk among [N, G], the slice's matrices among [N, G SLICES], the
    slot of its anchor."""
    part = tl.program_id(0).to(tl.int64)
    at, place = n * sizes.G + part // S.SLICES, n * sizes.G * S.SLICES + part
    return part, at, place, tl.where(n == 0, part, place + sizes.G * S.SLICES)


@triton.jit
def give(given, meeting, n, S: tl.constexpr):
    """This slice's part of o at chunk n."""
    tokens, _, states, _ = given
    sizes, I = meeting.sizes, meeting.sizes.I  # noqa: E741
    i, d, c = tl.arange(0, S.BLOCK_I), tl.arange(0, S.BLOCK_D), tl.arange(0, S.BLOCK_V)
    part, at, _, anchor = places(n, sizes, S)
    x = tile(tokens.x_pointer + at * I * S.D, i, d, I, S.D)
    o = anchor_output(slot_of(states.weights, anchor, S), x, S)
    put(meeting.parts.sources_pointer + round_of(n, part, sizes.G, S) * I * S.V, o, i, c, I, S.V)


@triton.jit
def take(given, meeting, n, S: tl.constexpr):
    """o at chunk n, of which the first slice stores what the reads need, and what leaves in this slice's rows."""
    tokens, tables, states, o_pointer = given
    sizes, I = meeting.sizes, meeting.sizes.I  # noqa: E741
    i, d, c = tl.arange(0, S.BLOCK_I), tl.arange(0, S.BLOCK_D), tl.arange(0, S.BLOCK_V)
    part, at, place, anchor = places(n, sizes, S)
    first = round_of(n, part - part % S.SLICES, sizes.G, S)
    o = tl.zeros([S.BLOCK_I, S.BLOCK_V], tl.float32)
    o = add_parts(o, meeting.parts.sources_pointer, first, (i, c), I, S.V, S)
    if part % S.SLICES == 0:
        put(o_pointer + at * I * S.V, o, i, c, I, S.V)
    x = tile(tokens.x_pointer + at * I * S.D, i, d, I, S.D)
    before = place + sizes.G * S.SLICES
    slots = slot_of(states.weights, anchor, S), before, before + sizes.G * S.SLICES
    write_rows(tokens, tables, states, slots, (x, o), at, I, S)


@triton.jit
def write_split_kernel(
    tokens,  # Tokens
    tables,  # Tables
    states,  # States, slots 0 and 1 filled; out: the others
    o_pointer,  # out: [N, G, I, V]
    meeting,  # Meeting
    S: tl.constexpr,  # Shape
):
    given = (tokens, tables, states, o_pointer)
    arrived = meeting.parts.arrived_pointer + tl.program_id(0) // S.SLICES
    n = 0
    while n < meeting.sizes.N:
        give(given, meeting, n, S)
        meet(arrived, n + 1, S)
        take(given, meeting, n, S)
        # What this chunk wrote, other threads of the program read in the next.
        tl.debug_barrier()
        n += 1


@triton.jit
def write_phase_kernel(
    tokens,  # Tokens
    tables,  # Tables
    states,  # States
    o_pointer,  # [N, G, I, V]
    meeting,  # Meeting, with a step
    S: tl.constexpr,  # Shape
):
    given = (tokens, tables, states, o_pointer)
    if meeting.step.takes:
        take(given, meeting, meeting.step.n, S)
    else:
        give(given, meeting, meeting.step.n, S)


SPLIT_WRITE = Split(write_split_kernel, write_phase_kernel, backward=False)
