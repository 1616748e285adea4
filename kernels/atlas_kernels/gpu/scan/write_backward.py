"""The memory scan backward, the chain of the writes: see read_backward.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from atlas_kernels.gpu.scan.pieces import (
    Matrices,
    add_flipped,
    add_product,
    column,
    flipped,
    gelu_curve,
    gelu_slope,
    inner_error,
    inner_error_gradient,
    product,
    put,
    slot_of,
    tile,
)


class Chunk(NamedTuple):
    """Pointers of one memory at one chunk; its momenta are its weights once more where it has none."""

    anchors: Matrices  # one slot, as the next five
    weights: Matrices  # that enter the chunk, as the momenta
    momenta: Matrices
    grad_weights: Matrices  # in place: of what leaves, then of what enters
    grad_momenta: Matrices
    grad_first: Matrices  # of the first chunk's anchor
    h_pointer: Any  # [C, F], left by the reads as the next two
    grad_z_pointer: Any
    grad_up_pointer: Any
    part_z_pointer: Any  # [I, F], as the next
    part_up_pointer: Any
    is_first: Any


class Held(NamedTuple):
    """What a program holds of a chunk while it goes through the hidden rows."""

    x: Any  # [I, D]
    e: Any  # [I, V]
    seen: Any  # [I, C]: sources times what q met of x, and times what the reads' gradient met of e
    scores_met: Any
    read_w: Any  # [V, C]: what the reads owe to W1, the reads' gradient times alphas; to S1, times kappas
    read_s: Any
    q_w: Any  # [D, C]: to W2 and W3, q times alphas; to S2 and S3, times kappas
    q_s: Any
    to_w: Any  # [I, 1], as to_s
    to_s: Any
    keep: Any  # W' = keep W + push S + .., S' = drag S + ..
    push: Any
    drag: Any


@triton.jit
def step_gradients(factor, narrow, held, grads, sums, S: tl.constexpr):
    """Gradients of the two sides of the outer products in W' = .. + factor^T (to_w narrow), S' alike with to_s.

    factor [I, f], narrow [I, n]; grads: of W' and S' [f, n]. Returns factor's gradient, and sums (of narrow's gradient
    [I, n], of to_w's and to_s's [I]) with this block's part.
    """
    grad_w, grad_s = grads
    grad_narrow, grad_to_w, grad_to_s = sums
    met = product(narrow, tl.trans(grad_w), S)
    grad_to_w += tl.sum(met * factor, 1)
    grad_factor = held.to_w * met
    grad_narrow = add_product(grad_narrow, held.to_w * factor, grad_w, S)
    if S.MOMENTUM:
        met = product(narrow, tl.trans(grad_s), S)
        grad_to_s += tl.sum(met * factor, 1)
        grad_factor += held.to_s * met
        grad_narrow = add_product(grad_narrow, held.to_s * factor, grad_s, S)
    return grad_factor, grad_narrow, grad_to_w, grad_to_s


@triton.jit
def gradient_block(w_pointer, s_pointer, f, n, N: tl.constexpr, S: tl.constexpr):
    """Rows f of a matrix's gradient and of its momentum's; of a memory without one, twice the first."""
    grad_w = tile(w_pointer, f, n, S.F, N)
    grad_s = grad_w
    if S.MOMENTUM:
        grad_s = tile(s_pointer, f, n, S.F, N)
    return grad_w, grad_s


@triton.jit
def matrix_gradients(pointers, grads, at, N: tl.constexpr, reads, held, sums, S: tl.constexpr):
    """Gradients of W and S in W' = keep W + push S + .., S' = drag S + .., with what the reads owe them.

    pointers: at W, S, and S's gradient, which is put there; grads: of W' and S' [f, n]; at: rows f and columns n of N;
    reads: their side of rows f [C, f], and its partners for W and for S [n, C]. Returns W's gradient, and sums (of
    keep, push and drag, by row) with their parts.
    """
    w_pointer, s_pointer, grad_s_pointer = pointers
    grad_w, grad_s = grads
    f, n = at
    side, partner_w, partner_s = reads
    grad_keep, grad_push, grad_drag = sums
    w = tile(w_pointer, f, n, S.F, N)
    grad_keep += tl.sum(grad_w * w, 1)
    if S.MOMENTUM:
        s = tile(s_pointer, f, n, S.F, N)
        grad_push += tl.sum(grad_w * s, 1)
        grad_drag += tl.sum(grad_s * s, 1)
        grad_s = add_flipped(held.drag * grad_s + held.push * grad_w, partner_s, side, S)
        # Every thread has read the block that is overwritten now.
        tl.debug_barrier()
        put(grad_s_pointer, grad_s, f, n, S.F, N)
    return add_flipped(held.keep * grad_w, partner_w, side, S), (grad_keep, grad_push, grad_drag)


@triton.jit
def through_factors(chunk, held, grad_e, grad_x, sizes, S: tl.constexpr):
    """From the gradients of what leaves a chunk to those of what enters it and of its factors.

    Returns grad_e and grad_x with their parts, the gradients of to_w and to_s [BLOCK_I] and, by row, of last.
    """
    t, i, d, c = tl.arange(0, S.BLOCK_C), tl.arange(0, S.BLOCK_I), tl.arange(0, S.BLOCK_D), tl.arange(0, S.BLOCK_V)
    x, e = held.x, held.e
    anchors, weights, momenta = chunk.anchors, chunk.weights, chunk.momenta
    grad_weights, grad_momenta = chunk.grad_weights, chunk.grad_momenta
    grad_to_w, grad_to_s = tl.zeros([S.BLOCK_I], tl.float32), tl.zeros([S.BLOCK_I], tl.float32)
    zero = tl.zeros([S.BLOCK_F], tl.float32)
    grad_last = (zero, zero, zero)
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        a1 = tile(anchors.first_pointer, f, c, S.F, S.V)
        z = product(x, tl.trans(tile(anchors.second_pointer, f, d, S.F, S.D)), S)
        h, slope, curve = gelu_curve(z, S.PRODUCTS)
        back = product(e, tl.trans(a1), S)
        grad_w1, grad_s1 = gradient_block(grad_weights.first_pointer, grad_momenta.first_pointer, f, c, S.V, S)
        grad_w2, grad_s2 = gradient_block(grad_weights.second_pointer, grad_momenta.second_pointer, f, d, S.D, S)
        read_h = tile(chunk.h_pointer, t, f, sizes.C, S.F * S.SLICES)
        read_z = tile(chunk.grad_z_pointer, t, f, sizes.C, S.F * S.SLICES)

        # Of what leaves, and of what the reads met: (h, e) of W1, (factor, x) of W2.
        factor = back * slope
        if S.GATED:
            grad_w3, grad_s3 = gradient_block(grad_weights.third_pointer, grad_momenta.third_pointer, f, d, S.D, S)
            read_up = tile(chunk.grad_up_pointer, t, f, sizes.C, S.F * S.SLICES)
            up = product(x, tl.trans(tile(anchors.third_pointer, f, d, S.F, S.D)), S)
            grad_up_factor, grad_x, grad_to_w, grad_to_s = step_gradients(
                back * h, x, held, (grad_w3, grad_s3), (grad_x, grad_to_w, grad_to_s), S
            )
            grad_up_factor = add_product(grad_up_factor, held.seen, read_up, S)
            factor *= up
            act = h
            h *= up
        grad_factor, grad_x, grad_to_w, grad_to_s = step_gradients(
            factor, x, held, (grad_w2, grad_s2), (grad_x, grad_to_w, grad_to_s), S
        )
        grad_factor = add_product(grad_factor, held.seen, read_z, S)
        grad_h, grad_e, grad_to_w, grad_to_s = step_gradients(
            h, e, held, (grad_w1, grad_s1), (grad_e, grad_to_w, grad_to_s), S
        )
        grad_h = add_product(grad_h, held.scores_met, read_h, S)

        # factor = back slope (up); with a gate h = act up, and back act is W3's factor.
        if S.GATED:
            grad_back = grad_factor * slope * up + grad_up_factor * act
            part_z = (grad_h * up + grad_up_factor * back) * slope + grad_factor * back * up * curve
            put(chunk.part_up_pointer, grad_h * act + grad_factor * back * slope, i, f, sizes.I, S.F)
        else:
            grad_back = grad_factor * slope
            part_z = grad_h * slope + grad_factor * back * curve
        put(chunk.part_z_pointer, part_z, i, f, sizes.I, S.F)
        grad_e = add_product(grad_e, grad_back, a1, S)

        first = (weights.first_pointer, momenta.first_pointer, grad_momenta.first_pointer)
        second = (weights.second_pointer, momenta.second_pointer, grad_momenta.second_pointer)
        grad_w1, grad_last = matrix_gradients(
            first, (grad_w1, grad_s1), (f, c), S.V, (read_h, held.read_w, held.read_s), held, grad_last, S
        )
        grad_w2, grad_last = matrix_gradients(
            second, (grad_w2, grad_s2), (f, d), S.D, (read_z, held.q_w, held.q_s), held, grad_last, S
        )
        tl.debug_barrier()
        if S.SHARE > 0:
            grad_a1 = S.SHARE * tl.trans(product(tl.trans(e), grad_back, S))
            if chunk.is_first:
                put(chunk.grad_first.first_pointer, grad_a1, f, c, S.F, S.V)
            else:
                grad_w1 += grad_a1
        put(grad_weights.first_pointer, grad_w1, f, c, S.F, S.V)
        put(grad_weights.second_pointer, grad_w2, f, d, S.F, S.D)
        if S.GATED:
            third = (weights.third_pointer, momenta.third_pointer, grad_momenta.third_pointer)
            grad_w3, grad_last = matrix_gradients(
                third, (grad_w3, grad_s3), (f, d), S.D, (read_up, held.q_w, held.q_s), held, grad_last, S
            )
            tl.debug_barrier()
            put(grad_weights.third_pointer, grad_w3, f, d, S.F, S.D)
    return grad_e, grad_x, grad_to_w, grad_to_s, grad_last


@triton.jit
def through_anchor(chunk, grad_anchors, x, grad_o, grad_x, sizes, S: tl.constexpr):
    """From the gradient of o, and of z and up without what passes through o, to the anchor's, which are added to.

    grad_anchors: pointers at them, one slot. Returns grad_x with its part.
    """
    grad_first, grad_second = grad_anchors.first_pointer, grad_anchors.second_pointer
    grad_third = grad_anchors.third_pointer
    i, d, c = tl.arange(0, S.BLOCK_I), tl.arange(0, S.BLOCK_D), tl.arange(0, S.BLOCK_V)
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        a1, a2 = tile(chunk.anchors.first_pointer, f, c, S.F, S.V), tile(chunk.anchors.second_pointer, f, d, S.F, S.D)
        h, slope = gelu_slope(product(x, tl.trans(a2), S), S.PRODUCTS)
        grad_h = product(grad_o, tl.trans(a1), S)
        grad_z = tile(chunk.part_z_pointer, i, f, sizes.I, S.F)
        if S.GATED:
            a3 = tile(chunk.anchors.third_pointer, f, d, S.F, S.D)
            up = product(x, tl.trans(a3), S)
            grad_up = tile(chunk.part_up_pointer, i, f, sizes.I, S.F) + grad_h * h
            grad_h *= up
            h *= up
            grad_x = add_product(grad_x, grad_up, a3, S)
        grad_z += grad_h * slope
        grad_x = add_product(grad_x, grad_z, a2, S)
        if S.SHARE > 0:
            grad_a1 = add_flipped(tile(grad_first, f, c, S.F, S.V), tl.trans(grad_o), S.SHARE * h, S)
            grad_a2 = add_flipped(tile(grad_second, f, d, S.F, S.D), tl.trans(x), S.SHARE * grad_z, S)
            if S.GATED:
                grad_a3 = add_flipped(tile(grad_third, f, d, S.F, S.D), tl.trans(x), S.SHARE * grad_up, S)
            tl.debug_barrier()
            put(grad_first, grad_a1, f, c, S.F, S.V)
            put(grad_second, grad_a2, f, d, S.F, S.D)
            if S.GATED:
                put(grad_third, grad_a3, f, d, S.F, S.D)
    return grad_x


@triton.jit
def chunk_of(states, owed, write, n, g, sizes, S: tl.constexpr):
    """Pointers at what memory g, or a slice of one, has at chunk n."""
    G, C = sizes.G * S.SLICES, sizes.C
    before = (n + 1) * G + g
    weights = slot_of(states.weights, before, S)
    grad_weights = slot_of(write.grad_weights, G + g, S)
    momenta, grad_momenta = weights, grad_weights
    if S.MOMENTUM:
        momenta, grad_momenta = slot_of(states.momenta, before, S), slot_of(write.grad_momenta, g, S)
    side = ((n * sizes.G + g // S.SLICES) * C * S.SLICES + g % S.SLICES) * S.F
    part = g * sizes.I * S.F
    return Chunk(
        slot_of(states.weights, tl.where(n == 0, g, before), S),
        weights,
        momenta,
        grad_weights,
        grad_momenta,
        slot_of(write.grad_weights, g, S),
        owed.h_pointer + side,
        owed.grad_z_pointer + side,
        (owed.grad_up_pointer if S.GATED else owed.grad_z_pointer) + side,
        write.part_z_pointer + part,
        (write.part_up_pointer if S.GATED else write.part_z_pointer) + part,
        n == 0,
    )


@triton.jit
def held_at(tokens, tables, pointers, at, sizes, S: tl.constexpr):
    """What is held of chunk `at`; pointers: at what the anchor gave, and at the gradient of the read."""
    C, I = sizes.C, sizes.I  # noqa: E741
    o_pointer, grad_read_pointer = pointers
    t, i, d, c = tl.arange(0, S.BLOCK_C), tl.arange(0, S.BLOCK_I), tl.arange(0, S.BLOCK_D), tl.arange(0, S.BLOCK_V)
    x = tile(tokens.x_pointer + at * I * S.D, i, d, I, S.D).to(S.PRODUCTS)
    q = tile(tokens.q_pointer + at * C * S.D, t, d, C, S.D)
    v, r = tile(tokens.v_pointer + at * I * S.V, i, c, I, S.V), tile(tokens.r_pointer + at * I * S.V, i, c, I, S.V)
    o = tile(o_pointer + at * I * S.V, i, c, I, S.V)
    e = inner_error(o, r, v, c[None, :] < S.V, S).to(S.PRODUCTS)
    grad_read = tile(grad_read_pointer + at * C * S.V, t, c, C, S.V)
    sources = flipped(tables.sources_pointer + at * S.BLOCK_C * S.BLOCK_I, S.BLOCK_C, S.BLOCK_I)
    seen = (sources * product(x, tl.trans(q), S)).to(S.PRODUCTS)
    scores_met = (sources * product(e, tl.trans(grad_read), S)).to(S.PRODUCTS)
    alphas, to_w = column(tables.alphas_pointer + at * C, t, C), column(tables.to_w_pointer + at * I, i, I)
    read_w, q_w = tl.trans((alphas * grad_read).to(S.PRODUCTS)), tl.trans((alphas * q).to(S.PRODUCTS))
    read_s, q_s, to_s = read_w, q_w, to_w
    if S.MOMENTUM:
        kappas, to_s = column(tables.kappas_pointer + at * C, t, C), column(tables.to_s_pointer + at * I, i, I)
        read_s, q_s = tl.trans((kappas * grad_read).to(S.PRODUCTS)), tl.trans((kappas * q).to(S.PRODUCTS))
        at_last = tables.last_pointer + at * 3
        keep, push, drag = tl.load(at_last), tl.load(at_last + 1), tl.load(at_last + 2)
    else:
        keep, push, drag = tl.load(tables.last_pointer + at), 0.0, 0.0
    return Held(x, e, seen, scores_met, read_w, read_s, q_w, q_s, to_w, to_s, keep, push, drag)


@triton.jit
def error_gradient(tokens, o_pointer, grad_e, at, I, S: tl.constexpr):  # noqa: E741
    """From e's gradient at the sources of chunk `at` to those of o and of the value, as `inner_error_gradient`."""
    i, c = tl.arange(0, S.BLOCK_I), tl.arange(0, S.BLOCK_V)
    o = tile(o_pointer + at * I * S.V, i, c, I, S.V)
    v, r = tile(tokens.v_pointer + at * I * S.V, i, c, I, S.V), tile(tokens.r_pointer + at * I * S.V, i, c, I, S.V)
    return inner_error_gradient(o, r, v, grad_e, c[None, :] < S.V, S)


@triton.jit
def write_backward_kernel(
    tokens,  # Tokens
    tables,  # Tables
    states,  # States
    o_pointer,  # [N, G, I, V]
    owed,  # Owed; out: grad_x
    write,  # WriteGradients
    sizes,  # Sizes
    S: tl.constexpr,  # Shape
):
    N, G, I = sizes.N, sizes.G, sizes.I  # noqa: E741
    g = tl.program_id(0).to(tl.int64)
    i, d, c = tl.arange(0, S.BLOCK_I), tl.arange(0, S.BLOCK_D), tl.arange(0, S.BLOCK_V)
    n = N - 1
    while n >= 0:
        at = n * G + g
        held = held_at(tokens, tables, (o_pointer, owed.grad_read_pointer), at, sizes, S)
        chunk = chunk_of(states, owed, write, n, g, sizes, S)
        grad_e = tile(owed.grad_e_pointer + at * I * S.V, i, c, I, S.V)
        grad_x = tile(owed.grad_x_pointer + at * I * S.D, i, d, I, S.D)
        grad_e, grad_x, grad_to_w, grad_to_s, grad_last = through_factors(chunk, held, grad_e, grad_x, sizes, S)
        tl.debug_barrier()

        if S.MOMENTUM:
            for j in tl.static_range(3):
                tl.store(write.grad_last_pointer + at * 3 + j, tl.sum(grad_last[j], 0))
            tl.store(write.grad_to_s_pointer + at * I + i, grad_to_s, mask=i < I)
        else:
            tl.store(write.grad_last_pointer + at, tl.sum(grad_last[0], 0))
        tl.store(write.grad_to_w_pointer + at * I + i, grad_to_w, mask=i < I)
        grad_o, grad_value = error_gradient(tokens, o_pointer, grad_e, at, I, S)
        put(write.grad_value_pointer + at * I * S.V, grad_value, i, c, I, S.V)

        # The anchor's gradient: in slot 0 of the first chunk, else with that of the weights that enter.
        grad_anchors = slot_of(write.grad_weights, tl.where(n == 0, g, G + g), S)
        grad_x = through_anchor(chunk, grad_anchors, held.x, grad_o, grad_x, sizes, S)
        put(owed.grad_x_pointer + at * I * S.D, grad_x, i, d, I, S.D)
        tl.debug_barrier()
        n -= 1
