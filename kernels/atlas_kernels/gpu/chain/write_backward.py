"""The periodic chain backward, the writes: one program a memory, from the last chunk to the first.

The gradients of the matrices stay in place, slot 1 of [2, G, P, F, D]; slot 0 takes that of the first chunk's anchor,
every other anchor is the weights that enter its chunk. Of a chunk e and the factors are formed again from the anchor.
Of each matrix and write the gradient of O_k is formed, at_last_k grad_W' + the outer products that the reads owe it,
and goes back through Newton-Schulz, whose steps are computed again (newton_schulz/backward.py). Then it goes, by rows
of the hidden width, to the factors, S, W and the gates; at last through the factors to the anchor, x, v and r.

Names: `grad_a` is the loss's gradient of a.

A chunk of a memory, sizes as in forward.py; by count, not measured:

    MFLOP        50 + 154 K, of which 120 K are Newton-Schulz: its steps again, and back
    memory       256 KB matrices, 64 K KB O_k, 96 KB that the reads owe, 80 KB tokens and o in; 40 KB out
    through L2   gradients of the matrices 512 KB in, of the O_k twice, and 256 KB out; factors 80 KB and their
                 gradients 160 KB out and in; of each write and matrix Newton-Schulz's trail and G, 0.3 MB, and back
    on chip      X or G in blocks of 64 columns with two [64, 64]; or gradients [64, 64] of e or x. 30 KB shared

Estimate of a chunk, as in forward.py: 34 microseconds at K = 1, 112 at K = 4, at a rate that it will not reach.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from atlas_kernels.gpu.chain.pieces import parts_of, write_factors
from atlas_kernels.gpu.newton_schulz.backward import Scratch as Trail
from atlas_kernels.gpu.newton_schulz.backward import gradient_by_blocks
from atlas_kernels.gpu.newton_schulz.forward import Constants, Strided
from atlas_kernels.gpu.newton_schulz.forward import Matrices as Formed
from atlas_kernels.gpu.newton_schulz.forward import Sizes as Matrix
from atlas_kernels.gpu.scan.pieces import (
    Matrices,
    Sizes,
    add_flipped,
    add_product,
    column,
    gelu_curve,
    inner_error,
    inner_error_gradient,
    product,
    put,
    tile,
)
from atlas_kernels.gpu.scan.write_backward import through_anchor


class Side(NamedTuple):
    """Pointers of one matrix of a memory at one chunk."""

    w_pointer: Any  # [F, D], as the next four
    s_pointer: Any
    stack_pointer: Any  # K of them
    grad_w_pointer: Any  # in place: of what leaves, then of what enters
    grad_s_pointer: Any  # W's without momentum, not used then
    narrow_pointer: Any  # [I, D] and [I, F], the sources' factors
    wide_pointer: Any
    owed_narrow_pointer: Any  # [C, D] and [C, F], what the reads owe
    owed_wide_pointer: Any
    grad_narrow_pointer: Any  # [I, D], added to
    grad_wide_pointer: Any  # [I, F], out


class Sources(NamedTuple):
    """Pointers of one memory at one chunk, [I, D] each."""

    x_pointer: Any
    v_pointer: Any
    r_pointer: Any
    o_pointer: Any
    e_pointer: Any
    grad_e_pointer: Any  # of e until it is that of v
    grad_x_pointer: Any


class Gates(NamedTuple):
    """Pointers of one memory at one chunk, and its sizes: as `Tables`, and of one matrix as `WriteGradients`."""

    alphas_pointer: Any
    of_writes_pointer: Any
    at_last_pointer: Any
    thetas_pointer: Any
    sums_pointer: Any
    steps_pointer: Any
    C: Any
    I: Any  # noqa: E741


class GateGradients(NamedTuple):
    """Pointers at the parts of one matrix of a chunk."""

    keep_pointer: Any
    at_last_pointer: Any  # [K]
    thetas_pointer: Any  # [J]
    sums_pointer: Any  # [J, I]


class Anchored(NamedTuple):
    """What `through_anchor` of the scan takes of its `Chunk`."""

    anchors: Matrices
    part_z_pointer: Any
    part_up_pointer: Any


@triton.jit
def back_through_writes(side, gates, norms_pointer, trail, result_pointer, S: tl.constexpr):
    """The gradient of every S_k of one matrix into result [K, F, D]."""
    for k in tl.range(0, S.WRITES, disable_licm=True):
        # Not kept in variables, which would make numbers of the constants.
        gradient_by_blocks(
            (
                Formed(
                    Strided(side.s_pointer, 0, 1, S.D), gates.thetas_pointer, gates.sums_pointer,
                    side.narrow_pointer, side.wide_pointer, gates.I, S.RANKS_I,
                ),
                Formed(
                    Strided(side.grad_w_pointer, 0, 1, S.D), gates.at_last_pointer, gates.of_writes_pointer,
                    side.owed_narrow_pointer, side.owed_wide_pointer, gates.C, S.RANKS_C,
                ),
            ),
            k, norms_pointer, Strided(result_pointer, S.F * S.D, 1, S.D), gates.steps_pointer, trail,
            Matrix(1, S.D, S.F, S.FORMED), Constants(S.BLOCK_D, S.BLOCK_N, S.BLOCKS, S.PRODUCTS, S.STEPS, 1),
        )  # fmt: skip
        # What one thread stored, another may load; the next matrix takes the same trail.
        tl.debug_barrier()


@triton.jit
def add_to_factors(grad, j, given, gates, sums, i, S: tl.constexpr):
    """From the gradient of S_j, rows f [f, d], to the factors that it is formed of.

    given: wide [i, f], narrow [i, d] in PRODUCTS; sums: gradients of wide, of narrow, of sums [i, BLOCK_J]. Returns
    sums with their parts.
    """
    wide, narrow = given
    grad_wide, grad_narrow, grad_sums = sums
    weights = column(gates.sums_pointer + j * gates.I, i, gates.I)
    met = product(narrow, tl.trans(grad), S)
    grad_sums += tl.where(tl.arange(0, S.BLOCK_J)[None, :] == j, tl.sum(met * wide, 1)[:, None], 0.0)
    return grad_wide + weights * met, add_product(grad_narrow, weights * wide, grad, S), grad_sums


@triton.jit
def to_factors(side, gates, grad_sums_pointer, formed_pointer, grad_narrow, at, S: tl.constexpr):
    """From the gradients of the S_j of one matrix to those of sums and of its wide factors, put in their places.

    formed: [K, F, D], of the S_k; at: sources i and columns d. Returns grad_narrow [i, d] with its part.
    """
    i, d = at
    j = tl.arange(0, S.BLOCK_J)
    narrow = tile(side.narrow_pointer, i, d, gates.I, S.D).to(S.PRODUCTS)
    grad_sums = tl.zeros([S.BLOCK_I, S.BLOCK_J], tl.float32)
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        given = tile(side.wide_pointer, i, f, gates.I, S.F), narrow
        grad_wide = tl.zeros([S.BLOCK_I, S.BLOCK_F], tl.float32)
        for k in tl.range(0, S.WRITES, disable_licm=True):
            grad = tile(formed_pointer + k * S.F * S.D, f, d, S.F, S.D).to(tl.float32)
            if S.MOMENTUM:
                if k == S.FORMED - 1:
                    grad += tile(side.grad_s_pointer, f, d, S.F, S.D)
            grad_wide, grad_narrow, grad_sums = add_to_factors(
                grad, k, given, gates, (grad_wide, grad_narrow, grad_sums), i, S
            )
        if S.FORMED > S.WRITES:
            grad = tile(side.grad_s_pointer, f, d, S.F, S.D)
            grad_wide, grad_narrow, grad_sums = add_to_factors(
                grad, S.FORMED - 1, given, gates, (grad_wide, grad_narrow, grad_sums), i, S
            )
        put(side.grad_wide_pointer, grad_wide, i, f, gates.I, S.F)
    inside = (j < S.FORMED)[None, :] & (i < gates.I)[:, None]
    tl.store(grad_sums_pointer + j[None, :] * gates.I + i[:, None], grad_sums, mask=inside)
    return grad_narrow


@triton.jit
def add_to_momentum(grad, j, s, gates, sums, S: tl.constexpr):
    """From the gradient of S_j, rows f [f, d], to those of S [f, d] and by row of thetas [f, BLOCK_J]."""
    grad_s, grad_thetas = sums
    grad_thetas += tl.where(tl.arange(0, S.BLOCK_J)[None, :] == j, tl.sum(grad * s, 1)[:, None], 0.0)
    return grad_s + tl.load(gates.thetas_pointer + j) * grad, grad_thetas


@triton.jit
def to_momentum(side, gates, grad_thetas_pointer, formed_pointer, d, S: tl.constexpr):
    """From the gradients of the S_j of one matrix to those of thetas and, in place, of S. formed: as above."""
    j = tl.arange(0, S.BLOCK_J)
    grad_thetas = tl.zeros([S.BLOCK_F, S.BLOCK_J], tl.float32)
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        left, s = tile(side.grad_s_pointer, f, d, S.F, S.D), tile(side.s_pointer, f, d, S.F, S.D)
        grad_s = tl.zeros_like(s)
        for k in tl.range(0, S.WRITES, disable_licm=True):
            grad = tile(formed_pointer + k * S.F * S.D, f, d, S.F, S.D).to(tl.float32)
            if k == S.FORMED - 1:
                grad += left
            grad_s, grad_thetas = add_to_momentum(grad, k, s, gates, (grad_s, grad_thetas), S)
        if S.FORMED > S.WRITES:
            grad_s, grad_thetas = add_to_momentum(left, S.FORMED - 1, s, gates, (grad_s, grad_thetas), S)
        # Every thread has read the block that is overwritten now.
        tl.debug_barrier()
        put(side.grad_s_pointer, grad_s, f, d, S.F, S.D)
    tl.store(grad_thetas_pointer + j, tl.sum(grad_thetas, 0), mask=j < S.FORMED)


@triton.jit
def to_weights(side, gates, grads, d, S: tl.constexpr):
    """From the gradient of W', and what the reads owe, to those of keep, at_last and, in place, of W."""
    t, j = tl.arange(0, S.BLOCK_C), tl.arange(0, S.BLOCK_J)
    partner = column(gates.alphas_pointer, t, gates.C) * tile(side.owed_narrow_pointer, t, d, gates.C, S.D)
    partner = tl.trans(partner.to(S.PRODUCTS))
    keep = tl.load(gates.alphas_pointer + gates.C - 1)
    grad_keep = tl.zeros([S.BLOCK_F], tl.float32)
    grad_at_last = tl.zeros([S.BLOCK_F, S.BLOCK_J], tl.float32)
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        grad_w = tile(side.grad_w_pointer, f, d, S.F, S.D)
        grad_keep += tl.sum(grad_w * tile(side.w_pointer, f, d, S.F, S.D), 1)
        for k in tl.range(0, S.WRITES, disable_licm=True):
            O = tile(side.stack_pointer + k * S.F * S.D, f, d, S.F, S.D).to(tl.float32)  # noqa: E741
            grad_at_last += tl.where(j[None, :] == k, tl.sum(grad_w * O, 1)[:, None], 0.0)
        grad_w = add_flipped(keep * grad_w, partner, tile(side.owed_wide_pointer, t, f, gates.C, S.F), S)
        # Every thread has read the block that is overwritten now.
        tl.debug_barrier()
        put(side.grad_w_pointer, grad_w, f, d, S.F, S.D)
    tl.store(grads.keep_pointer, tl.sum(grad_keep, 0))
    tl.store(grads.at_last_pointer + j, tl.sum(grad_at_last, 0), mask=j < S.WRITES)


@triton.jit
def through_matrix(side, gates, grads, formed_pointer, S: tl.constexpr):
    """From the gradients of what leaves, and of the S_k, to S, W, factors and gates. grads: GateGradients."""
    d = tl.arange(0, S.BLOCK_D)
    for part in tl.range(0, S.TILES, disable_licm=True):
        i = part * S.BLOCK_I + tl.arange(0, S.BLOCK_I)
        grad_narrow = tile(side.grad_narrow_pointer, i, d, gates.I, S.D)
        grad_narrow = to_factors(side, gates, grads.sums_pointer, formed_pointer, grad_narrow, (i, d), S)
        tl.debug_barrier()
        put(side.grad_narrow_pointer, grad_narrow, i, d, gates.I, S.D)
    tl.debug_barrier()
    if S.MOMENTUM:
        to_momentum(side, gates, grads.thetas_pointer, formed_pointer, d, S)
    to_weights(side, gates, grads, d, S)
    tl.debug_barrier()


@triton.jit
def through_factors(anchors, grad_wide_pointer, grad_anchor_pointer, tokens, grad_e, at, S: tl.constexpr):
    """From the gradients of the wide factors [P, I, F] to those of z and up without what passes through o, in the place
    of the last two; to that of W1's anchor. tokens: x and e [i, d] in PRODUCTS; at: i, and I. Returns grad_e with its
    part."""
    x, e = tokens
    i, I = at  # noqa: E741
    d = tl.arange(0, S.BLOCK_D)
    part_z_pointer = grad_wide_pointer + I * S.F
    part_up_pointer = part_z_pointer + (S.PARTS - 2) * I * S.F
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        a1 = tile(anchors.first_pointer, f, d, S.F, S.D)
        h, slope, curve = gelu_curve(product(x, tl.trans(tile(anchors.second_pointer, f, d, S.F, S.D)), S), S.PRODUCTS)
        back = product(e, tl.trans(a1), S)
        grad_h = tile(grad_wide_pointer, i, f, I, S.F)
        grad_factor = tile(part_z_pointer, i, f, I, S.F)
        if S.GATED:
            # h = act up; the factors are back slope up of W2 and back act of W3.
            up = product(x, tl.trans(tile(anchors.third_pointer, f, d, S.F, S.D)), S)
            grad_factor_up = tile(part_up_pointer, i, f, I, S.F)
            grad_back = grad_factor * slope * up + grad_factor_up * h
            part_z = (grad_h * up + grad_factor_up * back) * slope + grad_factor * back * up * curve
            part_up = grad_h * h + grad_factor * back * slope
        else:
            grad_back = grad_factor * slope
            part_z = grad_h * slope + grad_factor * back * curve
        grad_e = add_product(grad_e, grad_back, a1, S)
        if S.SHARE > 0:
            grad_a1 = tile(grad_anchor_pointer, f, d, S.F, S.D)
            grad_a1 += S.SHARE * tl.trans(product(tl.trans(e), grad_back, S))
        tl.debug_barrier()
        put(part_z_pointer, part_z, i, f, I, S.F)
        if S.GATED:
            put(part_up_pointer, part_up, i, f, I, S.F)
        if S.SHARE > 0:
            put(grad_anchor_pointer, grad_a1, f, d, S.F, S.D)
    return grad_e


@triton.jit
def begin_chunk(sources, factors, anchors, g, I, S: tl.constexpr):  # noqa: E741
    """e and the factors formed again; gradients of x and e set to 0. sources: Sources."""
    d = tl.arange(0, S.BLOCK_D)
    for part in tl.range(0, S.TILES, disable_licm=True):
        i = part * S.BLOCK_I + tl.arange(0, S.BLOCK_I)
        o, v = tile(sources.o_pointer, i, d, I, S.D), tile(sources.v_pointer, i, d, I, S.D)
        e = inner_error(o, tile(sources.r_pointer, i, d, I, S.D), v, d[None, :] < S.D, S)
        write_factors(factors, anchors, tile(sources.x_pointer, i, d, I, S.D).to(S.PRODUCTS), e, g, (i, I), S)
        put(sources.grad_e_pointer, tl.zeros_like(e), i, d, I, S.D)
        put(sources.grad_x_pointer, tl.zeros_like(e), i, d, I, S.D)


@triton.jit
def to_sources(sources, anchors, grad_anchors, grad_wide_pointer, sizes, S: tl.constexpr):
    """From the gradients of the factors, grad_wide [P, I, F] and in `sources`, to those of x, v, r and the anchor."""
    I = sizes.I  # noqa: E741
    d = tl.arange(0, S.BLOCK_D)
    for part in tl.range(0, S.TILES, disable_licm=True):
        first = part * S.BLOCK_I
        i = first + tl.arange(0, S.BLOCK_I)
        x = tile(sources.x_pointer, i, d, I, S.D).to(S.PRODUCTS)
        e = tile(sources.e_pointer, i, d, I, S.D).to(S.PRODUCTS)
        grad_e = tile(sources.grad_e_pointer, i, d, I, S.D)
        grad_e = through_factors(anchors, grad_wide_pointer, grad_anchors.first_pointer, (x, e), grad_e, (i, I), S)
        # What one thread stored, another loads.
        tl.debug_barrier()
        o, v = tile(sources.o_pointer, i, d, I, S.D), tile(sources.v_pointer, i, d, I, S.D)
        r = tile(sources.r_pointer, i, d, I, S.D)
        grad_o, grad_value = inner_error_gradient(o, r, v, grad_e, d[None, :] < S.D, S)
        put(sources.grad_e_pointer, grad_value, i, d, I, S.D)
        of_z = grad_wide_pointer + (I + first) * S.F
        anchored = Anchored(anchors, of_z, of_z + (S.PARTS - 2) * I * S.F)
        grad_x, rest = tile(sources.grad_x_pointer, i, d, I, S.D), Sizes(sizes.N, sizes.G, sizes.C, I - first)
        grad_x = through_anchor(anchored, grad_anchors, x, grad_o.to(S.PRODUCTS), grad_x, rest, S)
        tl.debug_barrier()
        put(sources.grad_x_pointer, grad_x, i, d, I, S.D)
    tl.debug_barrier()


@triton.jit
def chain_write_backward_kernel(
    tokens,  # Tokens of the scan
    tables,  # Tables
    states,  # States
    owed,  # Owed
    write,  # WriteGradients
    scratch,  # Scratch
    sizes,  # Sizes of the scan
    S: tl.constexpr,  # Shape
):
    N, G, C, I = sizes.N, sizes.G, sizes.C, sizes.I  # noqa: E741
    SIZE: tl.constexpr = S.F * S.D
    WORK: tl.constexpr = S.BLOCKS * S.BLOCK_N * S.BLOCK_D
    TRAIL: tl.constexpr = S.STEPS * (WORK + 2 * S.BLOCK_D * S.BLOCK_D) + 2 * S.BLOCK_D * S.BLOCK_D
    g = tl.program_id(0).to(tl.int64)
    trail = Trail(scratch.trail_pointer + g * TRAIL, scratch.work_pointer + g * WORK)
    formed_at = scratch.formed_pointer + g * S.WRITES * SIZE
    e_at = scratch.factors.e_pointer + g * I * S.D
    # Not a while: what is hoisted out of one costs the registers that Newton-Schulz needs.
    for turn in tl.range(0, S.TURNS, disable_licm=True):
        n = N - 1 - turn
        if n >= 0:
            at = n * G + g
            anchors = parts_of(states.weights_pointer, tl.where(n == 0, g, at + G), S)
            x_at, grad_x_at = tokens.x_pointer + at * I * S.D, write.grad_x_pointer + at * I * S.D
            grad_e_at = write.grad_value_pointer + at * I * S.D
            sources = Sources(
                x_at, tokens.v_pointer + at * I * S.D, tokens.r_pointer + at * I * S.D,
                states.o_pointer + at * I * S.D, e_at, grad_e_at, grad_x_at,
            )  # fmt: skip
            begin_chunk(sources, scratch.factors, anchors, g, I, S)
            gates = Gates(
                tables.alphas_pointer + at * C, tables.of_writes_pointer + at * S.WRITES * C,
                tables.at_last_pointer + at * S.WRITES, tables.thetas_pointer + at * S.FORMED,
                tables.sums_pointer + at * S.FORMED * I, tables.steps_pointer, C, I,
            )  # fmt: skip
            tl.debug_barrier()

            for p in tl.range(0, S.PARTS, disable_licm=True):
                own, before, mine = at * S.PARTS + p, (at + G) * S.PARTS + p, g * S.PARTS + p
                side = Side(
                    w_pointer=states.weights_pointer + before * SIZE,
                    s_pointer=states.momenta_pointer + before * SIZE,
                    stack_pointer=states.stack_pointer + own * S.WRITES * SIZE,
                    grad_w_pointer=write.grad_weights_pointer + (G * S.PARTS + mine) * SIZE,
                    grad_s_pointer=write.grad_momenta_pointer + mine * SIZE,
                    narrow_pointer=tl.where(p == 0, e_at, x_at),
                    wide_pointer=scratch.factors.wide_pointer + mine * I * S.F,
                    owed_narrow_pointer=tl.where(p == 0, owed.grad_read_pointer, tokens.q_pointer) + at * C * S.D,
                    owed_wide_pointer=owed.wide_pointer + own * C * S.F,
                    grad_narrow_pointer=tl.where(p == 0, grad_e_at, grad_x_at),
                    grad_wide_pointer=scratch.grad_wide_pointer + mine * I * S.F,
                )
                grads = GateGradients(
                    write.grad_keep_pointer + own, write.grad_at_last_pointer + own * S.WRITES,
                    write.grad_thetas_pointer + own * S.FORMED, write.grad_sums_pointer + own * S.FORMED * I,
                )  # fmt: skip
                back_through_writes(side, gates, states.norms_pointer + own * S.WRITES, trail, formed_at, S)
                through_matrix(side, gates, grads, formed_at, S)

            # The anchor's gradient: in slot 0 of the first chunk, else with that of the weights that enter.
            grad_anchors = parts_of(write.grad_weights_pointer, tl.where(n == 0, g, G + g), S)
            to_sources(sources, anchors, grad_anchors, scratch.grad_wide_pointer + g * S.PARTS * I * S.F, sizes, S)
