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
def of_matrices(
    w_pointer, s_pointer, at, f, n, F, N: tl.constexpr, grad_w, grad_s, keep, push, drag, sums, MOMENTUM: tl.constexpr
):
    """Gradients of W and S in W' = keep W + push S + .., S' = drag S + .., and of keep, push, drag by row."""
    grad_keep, grad_push, grad_drag = sums
    w = tile(w_pointer + at, f, n, F, N)
    grad_keep += tl.sum(grad_w * w, 1)
    if MOMENTUM:
        s = tile(s_pointer + at, f, n, F, N)
        grad_push += tl.sum(grad_w * s, 1)
        grad_drag += tl.sum(grad_s * s, 1)
        grad_s = drag * grad_s + push * grad_w
    return keep * grad_w, grad_s, (grad_keep, grad_push, grad_drag)


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
    PRODUCTS: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    t, i, d, c = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    inside = c[None, :] < V
    n = N - 1
    while n >= 0:
        at = n * G + g
        before = at + G
        anchor = tl.where(n == 0, g, before)
        q, x = tile(q_pointer + at * C * D, t, d, C, D), tile(x_pointer + at * I * D, i, d, I, D).to(PRODUCTS)
        v, r = tile(v_pointer + at * I * V, i, c, I, V), tile(r_pointer + at * I * V, i, c, I, V)
        e = inner_error(tile(o_pointer + at * I * V, i, c, I, V), r, v, inside, V, LAYER, L2).to(PRODUCTS)
        grad_read = tile(grad_read_pointer + at * C * V, t, c, C, V)
        sources = flipped(sources_pointer + at * BLOCK_C * BLOCK_I, BLOCK_C, BLOCK_I)
        scores_met = (sources * product(e, tl.trans(grad_read), PRODUCTS)).to(PRODUCTS)
        seen = (sources * product(x, tl.trans(q), PRODUCTS)).to(PRODUCTS)
        alphas = column(alphas_pointer + at * C, t, C)
        read_w, q_w = tl.trans((alphas * grad_read).to(PRODUCTS)), tl.trans((alphas * q).to(PRODUCTS))
        to_w = column(to_w_pointer + at * I, i, I)
        to_s = to_w
        push, drag = 0.0, 0.0
        if MOMENTUM:
            kappas = column(kappas_pointer + at * C, t, C)
            read_s, q_s = tl.trans((kappas * grad_read).to(PRODUCTS)), tl.trans((kappas * q).to(PRODUCTS))
            to_s = column(to_s_pointer + at * I, i, I)
            keep = tl.load(last_pointer + at * 3)
            push, drag = tl.load(last_pointer + at * 3 + 1), tl.load(last_pointer + at * 3 + 2)
        else:
            keep = tl.load(last_pointer + at)

        grad_e, grad_x = tile(grad_e_pointer + at * I * V, i, c, I, V), tile(grad_x_pointer + at * I * D, i, d, I, D)
        grad_to_w, grad_to_s = tl.zeros([BLOCK_I], tl.float32), tl.zeros([BLOCK_I], tl.float32)
        zero = tl.zeros([BLOCK_F], tl.float32)
        sums = (zero, zero, zero)
        for start in tl.range(0, F, BLOCK_F, disable_licm=True):
            f = start + tl.arange(0, BLOCK_F)
            a1, a2 = tile(w1_pointer + anchor * F * V, f, c, F, V), tile(w2_pointer + anchor * F * D, f, d, F, D)
            h, slope, curve = gelu_curve(product(x, tl.trans(a2), PRODUCTS))
            back = product(e, tl.trans(a1), PRODUCTS)
            grad_w1 = tile(grad_w1_pointer + (G + g) * F * V, f, c, F, V)
            grad_w2 = tile(grad_w2_pointer + (G + g) * F * D, f, d, F, D)
            grad_s1, grad_s2 = grad_w1, grad_w2
            if MOMENTUM:
                grad_s1 = tile(grad_s1_pointer + g * F * V, f, c, F, V)
                grad_s2 = tile(grad_s2_pointer + g * F * D, f, d, F, D)
            read_h, read_z = tile(h_pointer + at * C * F, t, f, C, F), tile(grad_z_pointer + at * C * F, t, f, C, F)

            # Of what leaves, and of what the reads met: (h, e) of W1, (factor, x) of W2.
            factor = back * slope
            if GATED:
                a3 = tile(w3_pointer + anchor * F * D, f, d, F, D)
                grad_w3 = tile(grad_w3_pointer + (G + g) * F * D, f, d, F, D)
                grad_s3 = grad_w3
                if MOMENTUM:
                    grad_s3 = tile(grad_s3_pointer + g * F * D, f, d, F, D)
                read_up = tile(grad_up_pointer + at * C * F, t, f, C, F)
                up = product(x, tl.trans(a3), PRODUCTS)
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
                put(part_up_pointer + g * I * F, grad_h * act + grad_factor * back * slope, i, f, I, F)
            else:
                grad_back = grad_factor * slope
                part_z = grad_h * slope + grad_factor * back * curve
            put(part_z_pointer + g * I * F, part_z, i, f, I, F)
            grad_e = add_product(grad_e, grad_back, a1, PRODUCTS)
            grad_a1 = tl.trans(product(tl.trans(e), grad_back, PRODUCTS))

            at1, at2 = before * F * V, before * F * D
            grad_w1, grad_s1, sums = of_matrices(
                w1_pointer, s1_pointer, at1, f, c, F, V, grad_w1, grad_s1, keep, push, drag, sums, MOMENTUM
            )
            grad_w2, grad_s2, sums = of_matrices(
                w2_pointer, s2_pointer, at2, f, d, F, D, grad_w2, grad_s2, keep, push, drag, sums, MOMENTUM
            )
            grad_w1 = add_flipped(grad_w1, read_w, read_h, PRODUCTS)
            grad_w2 = add_flipped(grad_w2, q_w, read_z, PRODUCTS)
            # Every thread has read the block that is overwritten now.
            tl.debug_barrier()
            if MOMENTUM:
                put(grad_s1_pointer + g * F * V, add_flipped(grad_s1, read_s, read_h, PRODUCTS), f, c, F, V)
                put(grad_s2_pointer + g * F * D, add_flipped(grad_s2, q_s, read_z, PRODUCTS), f, d, F, D)
            if n == 0:
                put(grad_w1_pointer + g * F * V, grad_a1, f, c, F, V)
            else:
                grad_w1 += grad_a1
            put(grad_w1_pointer + (G + g) * F * V, grad_w1, f, c, F, V)
            put(grad_w2_pointer + (G + g) * F * D, grad_w2, f, d, F, D)
            if GATED:
                grad_w3, grad_s3, sums = of_matrices(
                    w3_pointer, s3_pointer, at2, f, d, F, D, grad_w3, grad_s3, keep, push, drag, sums, MOMENTUM
                )
                if MOMENTUM:
                    put(grad_s3_pointer + g * F * D, add_flipped(grad_s3, q_s, read_up, PRODUCTS), f, d, F, D)
                put(grad_w3_pointer + (G + g) * F * D, add_flipped(grad_w3, q_w, read_up, PRODUCTS), f, d, F, D)
        tl.debug_barrier()

        grad_keep, grad_push, grad_drag = sums
        if MOMENTUM:
            tl.store(grad_last_pointer + at * 3, tl.sum(grad_keep, 0))
            tl.store(grad_last_pointer + at * 3 + 1, tl.sum(grad_push, 0))
            tl.store(grad_last_pointer + at * 3 + 2, tl.sum(grad_drag, 0))
            tl.store(grad_to_s_pointer + at * I + i, grad_to_s, mask=i < I)
        else:
            tl.store(grad_last_pointer + at, tl.sum(grad_keep, 0))
        tl.store(grad_to_w_pointer + at * I + i, grad_to_w, mask=i < I)
        o = tile(o_pointer + at * I * V, i, c, I, V)
        v, r = tile(v_pointer + at * I * V, i, c, I, V), tile(r_pointer + at * I * V, i, c, I, V)
        grad_o, grad_value = inner_error_gradient(o, r, v, grad_e, inside, V, LAYER, L2)
        put(grad_value_pointer + at * I * V, grad_value, i, c, I, V)

        # The anchor's gradient: in slot 0 of the first chunk, else with that of the weights that enter.
        slot = tl.where(n == 0, g, G + g)
        for start in tl.range(0, F, BLOCK_F, disable_licm=True):
            f = start + tl.arange(0, BLOCK_F)
            a1, a2 = tile(w1_pointer + anchor * F * V, f, c, F, V), tile(w2_pointer + anchor * F * D, f, d, F, D)
            h, slope = gelu_slope(product(x, tl.trans(a2), PRODUCTS))
            grad_h = product(grad_o, tl.trans(a1), PRODUCTS)
            grad_a1 = tile(grad_w1_pointer + slot * F * V, f, c, F, V)
            grad_a2 = tile(grad_w2_pointer + slot * F * D, f, d, F, D)
            grad_z = tile(part_z_pointer + g * I * F, i, f, I, F)
            if GATED:
                a3, grad_a3 = (
                    tile(w3_pointer + anchor * F * D, f, d, F, D),
                    tile(grad_w3_pointer + slot * F * D, f, d, F, D),
                )
                up = product(x, tl.trans(a3), PRODUCTS)
                grad_up = tile(part_up_pointer + g * I * F, i, f, I, F) + grad_h * h
                grad_h *= up
                h *= up
                grad_x = add_product(grad_x, grad_up, a3, PRODUCTS)
                grad_a3 = add_flipped(grad_a3, tl.trans(x), grad_up, PRODUCTS)
            grad_z += grad_h * slope
            grad_x = add_product(grad_x, grad_z, a2, PRODUCTS)
            grad_a1 = add_flipped(grad_a1, tl.trans(grad_o), h, PRODUCTS)
            grad_a2 = add_flipped(grad_a2, tl.trans(x), grad_z, PRODUCTS)
            tl.debug_barrier()
            put(grad_w1_pointer + slot * F * V, grad_a1, f, c, F, V)
            put(grad_w2_pointer + slot * F * D, grad_a2, f, d, F, D)
            if GATED:
                put(grad_w3_pointer + slot * F * D, grad_a3, f, d, F, D)
        put(grad_x_pointer + at * I * D, grad_x, i, d, I, D)
        tl.debug_barrier()
        n -= 1
