"""The memory scan backward, a memory's chain of writes in slices: see split.py, and read_backward.py for a chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from atlas_kernels.gpu.scan.pieces import put, slot_of, tile
from atlas_kernels.gpu.scan.split import Split, add_parts, meet, round_of
from atlas_kernels.gpu.scan.write_backward import chunk_of, error_gradient, held_at, through_anchor, through_factors


@triton.jit
def give(given, meeting, n, S: tl.constexpr):
    """At chunk n, where there is one, this slice's parts of grad_e, of the gradients of to_w, to_s and last, and of
    what grad_x is without the anchor; its matrices' gradients are those of what enters, but for the anchor."""
    tokens, tables, states, o_pointer, owed, write = given
    sizes, parts, I = meeting.sizes, meeting.parts, meeting.sizes.I  # noqa: E741
    i, d, c = tl.arange(0, S.BLOCK_I), tl.arange(0, S.BLOCK_D), tl.arange(0, S.BLOCK_V)
    part = tl.program_id(0).to(tl.int64)
    if n >= 0:
        at, place = n * sizes.G + part // S.SLICES, round_of(n, part, sizes.G, S)
        held = held_at(tokens, tables, (o_pointer, owed.grad_read_pointer), at, sizes, S)
        chunk = chunk_of(states, owed, write, n, part, sizes, S)
        grad_e, grad_x = tl.zeros([S.BLOCK_I, S.BLOCK_V], tl.float32), tl.zeros([S.BLOCK_I, S.BLOCK_D], tl.float32)
        grad_e, grad_x, grad_to_w, grad_to_s, grad_last = through_factors(chunk, held, grad_e, grad_x, sizes, S)
        put(parts.sources_pointer + place * I * S.V, grad_e, i, c, I, S.V)
        put(parts.x_pointer + place * I * S.D, grad_x, i, d, I, S.D)
        rows_at = parts.rows_pointer + place * 3 * S.BLOCK_I
        tl.store(rows_at + i, grad_to_w)
        if S.MOMENTUM:
            tl.store(rows_at + S.BLOCK_I + i, grad_to_s)
        for j in tl.static_range(3 if S.MOMENTUM else 1):
            tl.store(rows_at + 2 * S.BLOCK_I + j, tl.sum(grad_last[j], 0))


@triton.jit
def take(given, meeting, n, S: tl.constexpr):
    """grad_x of chunk n + 1, whose parts are whole only now; and at chunk n what follows from the sum of grad_e."""
    if n + 1 < meeting.sizes.N:
        take_x(given, meeting, n + 1, S)
    if n >= 0:
        take_sums(given, meeting, n, S)
        take_error(given, meeting, n, S)


@triton.jit
def take_x(given, meeting, n, S: tl.constexpr):
    """grad_x of chunk n, each slice a share of its rows."""
    owed = given[4]
    G, I = meeting.sizes.G, meeting.sizes.I  # noqa: E741
    ROWS: tl.constexpr = S.BLOCK_I // S.SLICES
    part = tl.program_id(0).to(tl.int64)
    at, slice = n * G + part // S.SLICES, part % S.SLICES
    i, d = slice * ROWS + tl.arange(0, ROWS), tl.arange(0, S.BLOCK_D)
    grad_x = tile(owed.grad_x_pointer + at * I * S.D, i, d, I, S.D)
    grad_x = add_parts(grad_x, meeting.parts.x_pointer, round_of(n, part - slice, G, S), (i, d), I, S.D, S)
    put(owed.grad_x_pointer + at * I * S.D, grad_x, i, d, I, S.D)


@triton.jit
def take_sums(given, meeting, n, S: tl.constexpr):
    """The gradients of to_w, to_s and last at chunk n, by the first slice."""
    write = given[5]
    G, I = meeting.sizes.G, meeting.sizes.I  # noqa: E741
    part = tl.program_id(0).to(tl.int64)
    if part % S.SLICES == 0:
        at, i = n * G + part // S.SLICES, tl.arange(0, S.BLOCK_I)
        rows_at = meeting.parts.rows_pointer + round_of(n, part, G, S) * 3 * S.BLOCK_I
        grad_to_w, grad_to_s = tl.zeros([S.BLOCK_I], tl.float32), tl.zeros([S.BLOCK_I], tl.float32)
        for j in tl.static_range(S.SLICES):
            grad_to_w += tl.load(rows_at + j * 3 * S.BLOCK_I + i)
            if S.MOMENTUM:
                grad_to_s += tl.load(rows_at + (j * 3 + 1) * S.BLOCK_I + i)
        tl.store(write.grad_to_w_pointer + at * I + i, grad_to_w, mask=i < I)
        if S.MOMENTUM:
            tl.store(write.grad_to_s_pointer + at * I + i, grad_to_s, mask=i < I)
        LAST: tl.constexpr = 3 if S.MOMENTUM else 1
        for k in tl.static_range(LAST):
            grad_last = tl.load(rows_at + 2 * S.BLOCK_I + k)
            for j in tl.static_range(1, S.SLICES):
                grad_last += tl.load(rows_at + (j * 3 + 2) * S.BLOCK_I + k)
            tl.store(write.grad_last_pointer + at * LAST + k, grad_last)


@triton.jit
def take_error(given, meeting, n, S: tl.constexpr):
    """From grad_e at chunk n to the gradients of the value, of this slice's anchor and its part of grad_x."""
    tokens, _, states, o_pointer, owed, write = given
    sizes, parts, G, I = meeting.sizes, meeting.parts, meeting.sizes.G, meeting.sizes.I  # noqa: E741
    i, d, c = tl.arange(0, S.BLOCK_I), tl.arange(0, S.BLOCK_D), tl.arange(0, S.BLOCK_V)
    part = tl.program_id(0).to(tl.int64)
    at, slice = n * G + part // S.SLICES, part % S.SLICES
    grad_e = tile(owed.grad_e_pointer + at * I * S.V, i, c, I, S.V)
    grad_e = add_parts(grad_e, parts.sources_pointer, round_of(n, part - slice, G, S), (i, c), I, S.V, S)
    grad_o, grad_value = error_gradient(tokens, o_pointer, grad_e, at, I, S)
    if slice == 0:
        put(write.grad_value_pointer + at * I * S.V, grad_value, i, c, I, S.V)
    chunk = chunk_of(states, owed, write, n, part, sizes, S)
    # The anchor's gradient: in slot 0 of the first chunk, else with that of the weights that enter.
    grad_anchors = slot_of(write.grad_weights, tl.where(n == 0, part, G * S.SLICES + part), S)
    x = tile(tokens.x_pointer + at * I * S.D, i, d, I, S.D).to(S.PRODUCTS)
    x_at = parts.x_pointer + round_of(n, part, G, S) * I * S.D
    grad_x = through_anchor(chunk, grad_anchors, x, grad_o, tile(x_at, i, d, I, S.D), sizes, S)
    put(x_at, grad_x, i, d, I, S.D)


@triton.jit
def write_backward_split_kernel(
    tokens,  # Tokens
    tables,  # Tables
    states,  # States
    o_pointer,  # [N, G, I, V]
    owed,  # Owed; out: grad_x
    write,  # WriteGradients
    meeting,  # Meeting
    S: tl.constexpr,  # Shape
):
    given = (tokens, tables, states, o_pointer, owed, write)
    arrived = meeting.parts.arrived_pointer + tl.program_id(0) // S.SLICES
    n = meeting.sizes.N - 1
    # Once more after the first chunk, for its grad_x.
    while n >= -1:
        give(given, meeting, n, S)
        meet(arrived, meeting.sizes.N - n, S)
        take(given, meeting, n, S)
        # What this chunk left of the matrices' gradients, other threads of the program read in the next.
        tl.debug_barrier()
        n -= 1


@triton.jit
def write_backward_phase_kernel(
    tokens,  # Tokens
    tables,  # Tables
    states,  # States
    o_pointer,  # [N, G, I, V]
    owed,  # Owed
    write,  # WriteGradients
    meeting,  # Meeting, with a step
    S: tl.constexpr,  # Shape
):
    given = (tokens, tables, states, o_pointer, owed, write)
    if meeting.step.takes:
        take(given, meeting, meeting.step.n, S)
    else:
        give(given, meeting, meeting.step.n, S)


SPLIT_WRITE_BACKWARD = Split(write_backward_split_kernel, write_backward_phase_kernel, backward=True)
