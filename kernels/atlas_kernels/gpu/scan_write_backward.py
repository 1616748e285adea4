"""The memory scan backward, the chain of the writes: see scan_backward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from atlas_kernels.gpu.scan_pieces import (
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


@triton.jit
def of_step(
    factor, narrow, to_w, to_s, grad_w, grad_s, of_narrow, grad_to_w, grad_to_s, MOMENTUM: tl.constexpr, PRODUCTS
):
    """Gradients of the two sides of the outer products in W' = .. + factor^T (to_w narrow), S' alike with to_s.

    factor [I, f], narrow [I, n], grad_w, grad_s [f, n]. Returns factor's gradient, and the sums of narrow's [I, n]
    and of to_w's and to_s's [I] with this block's part.
    """
    met = product(narrow, tl.trans(grad_w), PRODUCTS)
    grad_to_w += tl.sum(met * factor, 1)
    grad_factor = to_w * met
    of_narrow = add_product(of_narrow, to_w * factor, grad_w, PRODUCTS)
    if MOMENTUM:
        met = product(narrow, tl.trans(grad_s), PRODUCTS)
        grad_to_s += tl.sum(met * factor, 1)
        grad_factor += to_s * met
        of_narrow = add_product(of_narrow, to_s * factor, grad_s, PRODUCTS)
    return grad_factor, of_narrow, grad_to_w, grad_to_s


@triton.jit
def block_of(pointer, s_pointer, f, n, F, N: tl.constexpr, MOMENTUM: tl.constexpr):
    """Rows f of a matrix's gradient and of its momentum's; of a memory without one, twice the first."""
    of_w = tile(pointer, f, n, F, N)
    of_s = of_w
    if MOMENTUM:
        of_s = tile(s_pointer, f, n, F, N)
    return of_w, of_s


@triton.jit
def of_matrix(matrices, grads, f, n, F, N: tl.constexpr, read, last, sums, MOMENTUM: tl.constexpr, PRODUCTS):
    """Gradients of W and S in W' = keep W + push S + .., S' = drag S + .., with what the reads owe them, rows f.

    matrices: pointers at W and S, and at S's gradient, which is put there; grads: of W' and S' [f, n]; read: the reads'
    side of rows f [C, f], and the narrow one twice, transposed [n, C]: times alphas and times kappas. Returns W's
    gradient and sums (of keep, push and drag, by row) with their parts.
    """
    w_pointer, s_pointer, grad_s_pointer = matrices
    grad_w, grad_s = grads
    side, of_w, of_s = read
    keep, push, drag = last
    grad_keep, grad_push, grad_drag = sums
    w = tile(w_pointer, f, n, F, N)
    grad_keep += tl.sum(grad_w * w, 1)
    if MOMENTUM:
        s = tile(s_pointer, f, n, F, N)
        grad_push += tl.sum(grad_w * s, 1)
        grad_drag += tl.sum(grad_s * s, 1)
        grad_s = add_flipped(drag * grad_s + push * grad_w, of_s, side, PRODUCTS)
        # Every thread has read the block that is overwritten now.
        tl.debug_barrier()
        put(grad_s_pointer, grad_s, f, n, F, N)
    return add_flipped(keep * grad_w, of_w, side, PRODUCTS), (grad_keep, grad_push, grad_drag)


@triton.jit
def through_factors(
    anchors,  # pointers at the three matrices of this memory's anchor, as the next four of what enters the chunk
    weights,
    momenta,
    grad_weights,  # in place: of what leaves, then of what enters
    grad_momenta,
    grad_first_pointer,  # at the gradient of the first chunk's anchor, of W1
    sides,  # pointers at what the reads left of this chunk: h, grad_z, grad_up
    parts,  # pointers at this memory's part_z, part_up
    tokens,  # x, e; seen, scores_met: sources times what q and the reads' gradient met of them
    of_reads,  # what the reads took from W1 and S1, from W2 and S2, transposed: grad_read and q with alphas and kappas
    writes,  # to_w, to_s
    last,  # keep, push, drag
    sums,  # grad_e, grad_x
    is_first,
    C,
    I,  # noqa: E741
    D: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    MOMENTUM: tl.constexpr,
    GATED: tl.constexpr,
    SHARE: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """From the gradients of what leaves a chunk to those of what enters it and of its factors.

    Returns grad_e and grad_x with their parts, the gradients of to_w and to_s [BLOCK_I] and, by row, of last.
    """
    t, i, d, c = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    x, e, seen, scores_met = tokens
    read_w, read_s, q_w, q_s = of_reads
    to_w, to_s = writes
    grad_e, grad_x = sums
    grad_to_w, grad_to_s = tl.zeros([BLOCK_I], tl.float32), tl.zeros([BLOCK_I], tl.float32)
    zero = tl.zeros([BLOCK_F], tl.float32)
    of_last = (zero, zero, zero)
    for start in tl.range(0, F, BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, BLOCK_F)
        a1 = tile(anchors[0], f, c, F, V)
        h, slope, curve = gelu_curve(product(x, tl.trans(tile(anchors[1], f, d, F, D)), PRODUCTS))
        back = product(e, tl.trans(a1), PRODUCTS)
        grad_w1, grad_s1 = block_of(grad_weights[0], grad_momenta[0], f, c, F, V, MOMENTUM)
        grad_w2, grad_s2 = block_of(grad_weights[1], grad_momenta[1], f, d, F, D, MOMENTUM)
        read_h, read_z = tile(sides[0], t, f, C, F), tile(sides[1], t, f, C, F)

        # Of what leaves, and of what the reads met: (h, e) of W1, (factor, x) of W2.
        factor = back * slope
        if GATED:
            grad_w3, grad_s3 = block_of(grad_weights[2], grad_momenta[2], f, d, F, D, MOMENTUM)
            read_up = tile(sides[2], t, f, C, F)
            up = product(x, tl.trans(tile(anchors[2], f, d, F, D)), PRODUCTS)
            grad_up_factor, grad_x, grad_to_w, grad_to_s = of_step(
                back * h, x, to_w, to_s, grad_w3, grad_s3, grad_x, grad_to_w, grad_to_s, MOMENTUM, PRODUCTS
            )
            grad_up_factor = add_product(grad_up_factor, seen, read_up, PRODUCTS)
            factor *= up
            act = h
            h *= up
        grad_factor, grad_x, grad_to_w, grad_to_s = of_step(
            factor, x, to_w, to_s, grad_w2, grad_s2, grad_x, grad_to_w, grad_to_s, MOMENTUM, PRODUCTS
        )
        grad_factor = add_product(grad_factor, seen, read_z, PRODUCTS)
        grad_h, grad_e, grad_to_w, grad_to_s = of_step(
            h, e, to_w, to_s, grad_w1, grad_s1, grad_e, grad_to_w, grad_to_s, MOMENTUM, PRODUCTS
        )
        grad_h = add_product(grad_h, scores_met, read_h, PRODUCTS)

        # factor = back slope (up); with a gate h = act up, and back act is W3's factor.
        if GATED:
            grad_back = grad_factor * slope * up + grad_up_factor * act
            part_z = (grad_h * up + grad_up_factor * back) * slope + grad_factor * back * up * curve
            put(parts[1], grad_h * act + grad_factor * back * slope, i, f, I, F)
        else:
            grad_back = grad_factor * slope
            part_z = grad_h * slope + grad_factor * back * curve
        put(parts[0], part_z, i, f, I, F)
        grad_e = add_product(grad_e, grad_back, a1, PRODUCTS)

        first = (weights[0], momenta[0], grad_momenta[0])
        second = (weights[1], momenta[1], grad_momenta[1])
        grad_w1, of_last = of_matrix(
            first, (grad_w1, grad_s1), f, c, F, V, (read_h, read_w, read_s), last, of_last, MOMENTUM, PRODUCTS
        )
        grad_w2, of_last = of_matrix(
            second, (grad_w2, grad_s2), f, d, F, D, (read_z, q_w, q_s), last, of_last, MOMENTUM, PRODUCTS
        )
        tl.debug_barrier()
        if SHARE > 0:
            grad_a1 = SHARE * tl.trans(product(tl.trans(e), grad_back, PRODUCTS))
            if is_first:
                put(grad_first_pointer, grad_a1, f, c, F, V)
            else:
                grad_w1 += grad_a1
        put(grad_weights[0], grad_w1, f, c, F, V)
        put(grad_weights[1], grad_w2, f, d, F, D)
        if GATED:
            third = (weights[2], momenta[2], grad_momenta[2])
            grad_w3, of_last = of_matrix(
                third, (grad_w3, grad_s3), f, d, F, D, (read_up, q_w, q_s), last, of_last, MOMENTUM, PRODUCTS
            )
            tl.debug_barrier()
            put(grad_weights[2], grad_w3, f, d, F, D)
    return grad_e, grad_x, grad_to_w, grad_to_s, of_last


@triton.jit
def through_anchor(
    anchors,  # pointers at the three matrices of this memory's anchor
    grad_anchors,  # pointers at their gradients, which are added to
    parts,
    x,
    grad_o,
    grad_x,
    I,  # noqa: E741
    D: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    GATED: tl.constexpr,
    SHARE: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """From the gradient of o, and of z and up without what passes through o, to the anchor's. Returns grad_x."""
    i, d, c = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for start in tl.range(0, F, BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, BLOCK_F)
        a1, a2 = tile(anchors[0], f, c, F, V), tile(anchors[1], f, d, F, D)
        h, slope = gelu_slope(product(x, tl.trans(a2), PRODUCTS))
        grad_h = product(grad_o, tl.trans(a1), PRODUCTS)
        grad_z = tile(parts[0], i, f, I, F)
        if GATED:
            a3 = tile(anchors[2], f, d, F, D)
            up = product(x, tl.trans(a3), PRODUCTS)
            grad_up = tile(parts[1], i, f, I, F) + grad_h * h
            grad_h *= up
            h *= up
            grad_x = add_product(grad_x, grad_up, a3, PRODUCTS)
        grad_z += grad_h * slope
        grad_x = add_product(grad_x, grad_z, a2, PRODUCTS)
        if SHARE > 0:
            grad_a1 = add_flipped(tile(grad_anchors[0], f, c, F, V), tl.trans(grad_o), SHARE * h, PRODUCTS)
            grad_a2 = add_flipped(tile(grad_anchors[1], f, d, F, D), tl.trans(x), SHARE * grad_z, PRODUCTS)
            if GATED:
                grad_a3 = add_flipped(tile(grad_anchors[2], f, d, F, D), tl.trans(x), SHARE * grad_up, PRODUCTS)
            tl.debug_barrier()
            put(grad_anchors[0], grad_a1, f, c, F, V)
            put(grad_anchors[1], grad_a2, f, d, F, D)
            if GATED:
                put(grad_anchors[2], grad_a3, f, d, F, D)
    return grad_x


@triton.jit
def write_backward_kernel(
    q_pointer,  # [N, G, C, D]
    x_pointer,  # [N, G, I, D]
    v_pointer,  # [N, G, I, V]
    r_pointer,  # [N, G, I, V]
    alphas_pointer,  # [N, G, C]
    kappas_pointer,  # [N, G, C]
    sources_pointer,  # [N, G, BLOCK_C, BLOCK_I]
    last_pointer,  # [N, G, 3], or [N, G, 1] without momentum
    to_w_pointer,  # [N, G, I]
    to_s_pointer,  # [N, G, I]
    w1_pointer,  # [N + 2, G, F, V]
    w2_pointer,  # [N + 2, G, F, D]
    w3_pointer,
    s1_pointer,
    s2_pointer,
    s3_pointer,
    o_pointer,  # [N, G, I, V]
    grad_read_pointer,  # [N, G, C, V], from the reads' kernel as the next three
    h_pointer,  # [N, G, C, F]
    grad_z_pointer,  # [N, G, C, F]
    grad_up_pointer,  # [N, G, C, F]
    grad_e_pointer,  # [N, G, I, V]
    grad_x_pointer,  # in: the reads' part; out: [N, G, I, D]
    grad_value_pointer,  # out: [N, G, I, V], of r - v with l2, of -v with dot
    grad_last_pointer,  # out: as last
    grad_to_w_pointer,  # out: [N, G, I]
    grad_to_s_pointer,  # out: [N, G, I]
    # In and out: [2, G, F, V]; slot 0 the anchor's, out; slot 1 in: of what leaves, out: of what enters.
    grad_w1_pointer,
    grad_w2_pointer,  # [2, G, F, D]
    grad_w3_pointer,
    grad_s1_pointer,  # in and out: [G, F, V]
    grad_s2_pointer,
    grad_s3_pointer,
    part_z_pointer,  # scratch [G, I, F]: the gradient of z without what passes through o
    part_up_pointer,
    N,
    G,
    C,
    I,  # noqa: E741
    D: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    LAYER: tl.constexpr,
    L2: tl.constexpr,
    MOMENTUM: tl.constexpr,
    GATED: tl.constexpr,
    SHARE: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    t, i, d, c = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    inside = c[None, :] < V
    grad_weights = slot_of(grad_w1_pointer, grad_w2_pointer, grad_w3_pointer, G + g, D, V, F, GATED)
    grad_momenta = grad_weights
    if MOMENTUM:
        grad_momenta = slot_of(grad_s1_pointer, grad_s2_pointer, grad_s3_pointer, g, D, V, F, GATED)
    grad_first = slot_of(grad_w1_pointer, grad_w2_pointer, grad_w3_pointer, g, D, V, F, GATED)
    parts = (part_z_pointer + g * I * F, (part_up_pointer if GATED else part_z_pointer) + g * I * F)
    up_pointer = grad_up_pointer if GATED else grad_z_pointer
    n = N - 1
    while n >= 0:
        at = n * G + g
        before = at + G
        anchors = slot_of(w1_pointer, w2_pointer, w3_pointer, tl.where(n == 0, g, before), D, V, F, GATED)
        weights = slot_of(w1_pointer, w2_pointer, w3_pointer, before, D, V, F, GATED)
        x, q = tile(x_pointer + at * I * D, i, d, I, D).to(PRODUCTS), tile(q_pointer + at * C * D, t, d, C, D)
        v, r = tile(v_pointer + at * I * V, i, c, I, V), tile(r_pointer + at * I * V, i, c, I, V)
        e = inner_error(tile(o_pointer + at * I * V, i, c, I, V), r, v, inside, V, LAYER, L2).to(PRODUCTS)
        grad_read = tile(grad_read_pointer + at * C * V, t, c, C, V)
        sources = flipped(sources_pointer + at * BLOCK_C * BLOCK_I, BLOCK_C, BLOCK_I)
        seen = (sources * product(x, tl.trans(q), PRODUCTS)).to(PRODUCTS)
        scores_met = (sources * product(e, tl.trans(grad_read), PRODUCTS)).to(PRODUCTS)
        alphas, to_w = column(alphas_pointer + at * C, t, C), column(to_w_pointer + at * I, i, I)
        read_w, q_w = tl.trans((alphas * grad_read).to(PRODUCTS)), tl.trans((alphas * q).to(PRODUCTS))
        momenta, read_s, q_s, to_s = weights, read_w, q_w, to_w
        if MOMENTUM:
            momenta = slot_of(s1_pointer, s2_pointer, s3_pointer, before, D, V, F, GATED)
            kappas, to_s = column(kappas_pointer + at * C, t, C), column(to_s_pointer + at * I, i, I)
            read_s, q_s = tl.trans((kappas * grad_read).to(PRODUCTS)), tl.trans((kappas * q).to(PRODUCTS))
            at_last = last_pointer + at * 3
            last = (tl.load(at_last), tl.load(at_last + 1), tl.load(at_last + 2))
        else:
            last = (tl.load(last_pointer + at), 0.0, 0.0)
        sides = (h_pointer + at * C * F, grad_z_pointer + at * C * F, up_pointer + at * C * F)
        grad_e, grad_x = tile(grad_e_pointer + at * I * V, i, c, I, V), tile(grad_x_pointer + at * I * D, i, d, I, D)
        grad_e, grad_x, grad_to_w, grad_to_s, of_last = through_factors(
            anchors, weights, momenta, grad_weights, grad_momenta, grad_first[0], sides, parts,
            (x, e, seen, scores_met), (read_w, read_s, q_w, q_s), (to_w, to_s), last, (grad_e, grad_x), n == 0, C, I,
            D, V, F, BLOCK_C, BLOCK_I, BLOCK_D, BLOCK_V, BLOCK_F, MOMENTUM, GATED, SHARE, PRODUCTS,
        )  # fmt: skip
        tl.debug_barrier()

        if MOMENTUM:
            for j in tl.static_range(3):
                tl.store(grad_last_pointer + at * 3 + j, tl.sum(of_last[j], 0))
            tl.store(grad_to_s_pointer + at * I + i, grad_to_s, mask=i < I)
        else:
            tl.store(grad_last_pointer + at, tl.sum(of_last[0], 0))
        tl.store(grad_to_w_pointer + at * I + i, grad_to_w, mask=i < I)
        o = tile(o_pointer + at * I * V, i, c, I, V)
        v, r = tile(v_pointer + at * I * V, i, c, I, V), tile(r_pointer + at * I * V, i, c, I, V)
        grad_o, grad_value = inner_error_gradient(o, r, v, grad_e, inside, V, LAYER, L2)
        put(grad_value_pointer + at * I * V, grad_value, i, c, I, V)

        # The anchor's gradient: in slot 0 of the first chunk, else with that of the weights that enter.
        slot = tl.where(n == 0, g, G + g)
        grad_anchors = slot_of(grad_w1_pointer, grad_w2_pointer, grad_w3_pointer, slot, D, V, F, GATED)
        grad_x = through_anchor(
            anchors, grad_anchors, parts, x, grad_o, grad_x, I,
            D, V, F, BLOCK_I, BLOCK_D, BLOCK_V, BLOCK_F, GATED, SHARE, PRODUCTS,
        )  # fmt: skip
        put(grad_x_pointer + at * I * D, grad_x, i, d, I, D)
        tl.debug_barrier()
        n -= 1
