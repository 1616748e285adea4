"""The memory scan backward: one kernel for the reads of all chunks at once, one for the chain of the writes.

`read_backward_kernel`, one program a chunk and memory, takes y's gradient down to what a read multiplies. What it owes
to matrices and factors is left to the chain as the two sides of outer products, h and dz [C, F] a chunk, in PRODUCTS:
their sums would be four matrices, two to four times the bytes. `write_backward_kernel`, one program a memory, goes
through the chunks from the last to the first with the gradients of the matrices in place, slot 1 of [2, G, F, ...];
slot 0 takes the gradient of the first chunk's anchor, every other anchor is the weights that enter its chunk.

Names: `grad_a` is the loss's gradient of a.

A chunk of a memory, sizes as in scan_forward.py; by count, not measured:

    kernel          MFLOP  device memory                        L2                          held on chip
    read_backward   40     256 KB matrices, 200 KB tokens,      anchor: 128 KB              of_w, of_s [C, 64], grad_met
                           tables and o in; 220 KB out                                      [I, C] in registers
    write_backward  90     256 KB matrices, 64 KB h and dz,     gradients of the matrices,  grad_e, grad_x [I, 64] in
                           220 KB tokens, tables and o in;      in place: 256 KB in, 256    registers; 80 KB shared
                           60 KB out                            out, half of it twice;
                                                                part_z 80 KB out and in

Z, H and D are computed again from the matrices at the chunk's start: kept, they are 80 KB each a chunk and memory,
to save 4 MFLOP each. The gradient at z without what passes through the output norm (part_z) is kept from one pass
over the hidden width to the next: to form it again takes four times the products of what it saves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from atlas_kernels.gpu.scan_pieces import (
    add_product,
    column,
    flipped,
    found_in,
    gelu_slope,
    inner_error,
    jacobian_times,
    normalised,
    product,
    put,
    put_flipped,
    slot_of,
    source_factors,
    tile,
)


@triton.jit
def of_both(of_w, of_s, grad, w, s, MOMENTUM: tl.constexpr, PRODUCTS):
    """The sums of grad W and grad S with these rows' part."""
    of_w = add_product(of_w, grad, w, PRODUCTS)
    if MOMENTUM:
        of_s = add_product(of_s, grad, s, PRODUCTS)
    return of_w, of_s


@triton.jit
def through_sources(e, grad_read, sources_at, scores_at, grad_sources_at, BLOCK_C, BLOCK_I, PRODUCTS: tl.constexpr):
    """From the reads' gradient to that of e [I, V], of what the sources' weights have from the scores (put in its
    place), and of the scores [C, I] in PRODUCTS."""
    sources, scores = flipped(sources_at, BLOCK_C, BLOCK_I), flipped(scores_at, BLOCK_C, BLOCK_I)
    grad_e = product(sources * scores, grad_read, PRODUCTS)
    grad_scores = product(e, tl.trans(grad_read), PRODUCTS)
    put_flipped(grad_sources_at, grad_scores * scores, BLOCK_C, BLOCK_I)
    return grad_e, tl.trans((grad_scores * sources).to(PRODUCTS))


@triton.jit
def read_backward_kernel(
    grad_y_pointer,  # [N, G, C, V]
    q_pointer,  # [N, G, C, D]
    x_pointer,  # [N, G, I, D]
    v_pointer,  # [N, G, I, V]
    r_pointer,  # [N, G, I, V]
    alphas_pointer,  # [N, G, C]
    kappas_pointer,  # [N, G, C]
    sources_pointer,  # [N, G, BLOCK_C, BLOCK_I]
    w1_pointer,  # [N + 2, G, F, V]
    w2_pointer,  # [N + 2, G, F, D]
    w3_pointer,
    s1_pointer,
    s2_pointer,
    s3_pointer,
    o_pointer,  # [N, G, I, V]
    read_pointer,  # [N, G, C, V]
    scores_pointer,  # [N, G, BLOCK_C, BLOCK_I]
    grad_q_pointer,  # out: [N, G, C, D]
    grad_alphas_pointer,  # out: [N, G, C]
    grad_kappas_pointer,  # out: [N, G, C]
    grad_sources_pointer,  # out: [N, G, BLOCK_C, BLOCK_I]
    grad_x_pointer,  # out: [N, G, I, D], the reads' part
    grad_e_pointer,  # out: [N, G, I, V], the reads' part
    grad_read_pointer,  # out: [N, G, C, V]
    h_pointer,  # out: [N, G, C, F] in PRODUCTS
    grad_z_pointer,  # out: [N, G, C, F] in PRODUCTS
    grad_up_pointer,  # out: [N, G, C, F] in PRODUCTS
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
    at = tl.program_id(0).to(tl.int64)
    anchors = slot_of(w1_pointer, w2_pointer, w3_pointer, tl.where(at < G, at, at + G), D, V, F, GATED)
    weights = slot_of(w1_pointer, w2_pointer, w3_pointer, at + G, D, V, F, GATED)
    momenta = slot_of(s1_pointer, s2_pointer, s3_pointer, at + G, D, V, F, GATED) if MOMENTUM else weights
    t, i, d, c = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    inside = c[None, :] < V

    grad_read = tile(grad_y_pointer + at * C * V, t, c, C, V)
    if LAYER:
        n, inverse_sd = normalised(tile(read_pointer + at * C * V, t, c, C, V), inside, V)
        grad_read = jacobian_times(n, inverse_sd, grad_read, inside, V)
    put(grad_read_pointer + at * C * V, grad_read, t, c, C, V)
    grad_read = grad_read.to(PRODUCTS)

    v, r = tile(v_pointer + at * I * V, i, c, I, V), tile(r_pointer + at * I * V, i, c, I, V)
    e = inner_error(tile(o_pointer + at * I * V, i, c, I, V), r, v, inside, V, LAYER, L2).to(PRODUCTS)
    pair = at * BLOCK_C * BLOCK_I
    sources_at, grad_sources_at = sources_pointer + pair, grad_sources_pointer + pair
    grad_e, grad_scores = through_sources(
        e, grad_read, sources_at, scores_pointer + pair, grad_sources_at, BLOCK_C, BLOCK_I, PRODUCTS
    )
    put(grad_e_pointer + at * I * V, grad_e, i, c, I, V)

    q = tile(q_pointer + at * C * D, t, d, C, D).to(PRODUCTS)
    x = tile(x_pointer + at * I * D, i, d, I, D).to(PRODUCTS)
    sources = flipped(sources_at, BLOCK_C, BLOCK_I)
    seen = tl.trans((sources * product(x, tl.trans(q), PRODUCTS)).to(PRODUCTS))
    alphas = column(alphas_pointer + at * C, t, C)
    kappas = column(kappas_pointer + at * C, t, C) if MOMENTUM else alphas
    grad_alphas, grad_kappas = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    of_w, of_s = tl.zeros([BLOCK_C, BLOCK_D], tl.float32), tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    grad_met = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)

    for start in tl.range(0, F, BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, BLOCK_F)
        h, factor, factor_up = source_factors(anchors, x, e, f, d, c, F, D, V, GATED, PRODUCTS)
        z, w2, s2 = found_in(q, weights[1], momenta[1], alphas, kappas, f, d, F, D, MOMENTUM, PRODUCTS)
        act, read_slope = gelu_slope(add_product(z, seen, factor, PRODUCTS))
        read = act
        if GATED:
            up, w3, s3 = found_in(q, weights[2], momenta[2], alphas, kappas, f, d, F, D, MOMENTUM, PRODUCTS)
            up = add_product(up, seen, factor_up, PRODUCTS)
            read = act * up

        of_read = product(grad_read, tl.trans(tile(weights[0], f, c, F, V)), PRODUCTS)
        grad_alphas += tl.sum(of_read * read, 1)
        grad_h = alphas * of_read
        if MOMENTUM:
            of_read = product(grad_read, tl.trans(tile(momenta[0], f, c, F, V)), PRODUCTS)
            grad_kappas += tl.sum(of_read * read, 1)
            grad_h += kappas * of_read
        grad_h = add_product(grad_h, grad_scores, h, PRODUCTS)
        put(h_pointer + at * C * F, read.to(PRODUCTS), t, f, C, F)
        if GATED:
            grad_up = grad_h * act
            grad_h *= up
            put(grad_up_pointer + at * C * F, grad_up.to(PRODUCTS), t, f, C, F)
            grad_met = add_product(grad_met, factor_up, tl.trans(grad_up), PRODUCTS)
            of_w, of_s = of_both(of_w, of_s, grad_up, w3, s3, MOMENTUM, PRODUCTS)
        grad_z = grad_h * read_slope
        put(grad_z_pointer + at * C * F, grad_z.to(PRODUCTS), t, f, C, F)
        grad_met = add_product(grad_met, factor, tl.trans(grad_z), PRODUCTS)
        of_w, of_s = of_both(of_w, of_s, grad_z, w2, s2, MOMENTUM, PRODUCTS)

    exact = tile(q_pointer + at * C * D, t, d, C, D)
    tl.store(grad_alphas_pointer + at * C + t, grad_alphas + tl.sum(of_w * exact, 1), mask=t < C)
    grad_q = alphas * of_w
    if MOMENTUM:
        tl.store(grad_kappas_pointer + at * C + t, grad_kappas + tl.sum(of_s * exact, 1), mask=t < C)
        grad_q += kappas * of_s
    # What this program has put there, other threads of it add to.
    tl.debug_barrier()
    grad_sources = flipped(grad_sources_at, BLOCK_C, BLOCK_I) + grad_met * product(x, tl.trans(q), PRODUCTS)
    tl.debug_barrier()
    put_flipped(grad_sources_at, grad_sources, BLOCK_C, BLOCK_I)
    grad_met *= flipped(sources_at, BLOCK_C, BLOCK_I)
    put(grad_q_pointer + at * C * D, add_product(grad_q, tl.trans(grad_met), x, PRODUCTS), t, d, C, D)
    put(grad_x_pointer + at * I * D, product(grad_met, q, PRODUCTS), i, d, I, D)
