"""The memory scan forward: one kernel that writes, chunk after chunk, and one that reads all chunks at once.

`write_kernel`, one program a memory g, keeps nothing of the matrices on chip: chunk n reads them at slot n + 1 of
[N + 2, G, F, ...] and writes slot n + 2; slot 0 holds the first chunk's anchor, slot 1 what enters. `read_kernel`, one
program a chunk and memory, forms what the tokens read from those slots. Kept apart because a read waits for no other
chunk: N times more programs than memories, and a shorter chain; the price is the sources' two products once more.

A chunk of a memory at C = 64, D = V = 64, F = 256, W = 16 (79 sources, padded to 128: a third of the work at the
sources is on padding), layer norm, momentum, bfloat16 products; by count, not measured:

    kernel   MFLOP  of device memory              of L2                          held on chip
    write    34     256 KB matrices out,          anchor twice, weights and      x, e, and both scaled by each source's
                    80 KB tokens in, 20 KB o out  momentum once: 512 KB in       coefficients [I, 64]: 96 KB shared
    read     27     256 KB matrices in,           anchor: 128 KB                 o [C, 64], scores [I, C], sums in
                    160 KB tokens, tables and o                                  registers; x, q, e, seen: 56 KB shared
                    in, 64 KB y, o, scores out
"""

from __future__ import annotations

import triton
import triton.language as tl

from atlas_kernels.gpu.scan_pieces import (
    add_flipped,
    add_product,
    column,
    flipped,
    found_in,
    gelu,
    inner_error,
    normalised,
    product,
    put,
    put_flipped,
    slot_of,
    source_factors,
    tile,
)


@triton.jit
def write_kernel(
    x_pointer,  # [N, G, I, D]
    v_pointer,  # [N, G, I, V]
    r_pointer,  # [N, G, I, V]
    last_pointer,  # [N, G, 3], or [N, G, 1] without momentum
    to_w_pointer,  # [N, G, I]
    to_s_pointer,  # [N, G, I]
    w1_pointer,  # [N + 2, G, F, V], slots 0 and 1 filled
    w2_pointer,  # [N + 2, G, F, D]
    w3_pointer,
    s1_pointer,  # as w1, slot 1 filled
    s2_pointer,
    s3_pointer,
    o_pointer,  # out: [N, G, I, V], what the anchor gives to each source
    N,
    G,
    I,  # noqa: E741
    D: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
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
    g = tl.program_id(0)
    i, d, c = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    inside = c[None, :] < V
    n = 0
    while n < N:  # no range: the interpreter takes an argument as its bound only with an older numpy
        at = (n * G + g).to(tl.int64)
        before, after = at + G, at + 2 * G
        anchors = slot_of(w1_pointer, w2_pointer, w3_pointer, tl.where(n == 0, at, before), D, V, F, GATED)
        x = tile(x_pointer + at * I * D, i, d, I, D)
        o = tl.zeros([BLOCK_I, BLOCK_V], tl.float32)
        for start in tl.range(0, F, BLOCK_F, disable_licm=True):
            f = start + tl.arange(0, BLOCK_F)
            h = gelu(product(x, tl.trans(tile(anchors[1], f, d, F, D)), PRODUCTS))
            if GATED:
                h *= product(x, tl.trans(tile(anchors[2], f, d, F, D)), PRODUCTS)
            o = add_product(o, h, tile(anchors[0], f, c, F, V), PRODUCTS)
        put(o_pointer + at * I * V, o, i, c, I, V)

        v, r = tile(v_pointer + at * I * V, i, c, I, V), tile(r_pointer + at * I * V, i, c, I, V)
        e = inner_error(o, r, v, inside, V, LAYER, L2)
        to_w = column(to_w_pointer + at * I, i, I)
        e_to_w, x_to_w = tl.trans((to_w * e).to(PRODUCTS)), tl.trans((to_w * x).to(PRODUCTS))
        if MOMENTUM:
            to_s = column(to_s_pointer + at * I, i, I)
            e_to_s, x_to_s = tl.trans((to_s * e).to(PRODUCTS)), tl.trans((to_s * x).to(PRODUCTS))
            keep = tl.load(last_pointer + at * 3)
            push, drag = tl.load(last_pointer + at * 3 + 1), tl.load(last_pointer + at * 3 + 2)
        else:
            keep = tl.load(last_pointer + at)

        for start in tl.range(0, F, BLOCK_F, disable_licm=True):
            f = start + tl.arange(0, BLOCK_F)
            h, factor, factor_up = source_factors(anchors, x, e, f, d, c, F, D, V, GATED, PRODUCTS)
            w1 = keep * tile(w1_pointer + before * F * V, f, c, F, V)
            w2 = keep * tile(w2_pointer + before * F * D, f, d, F, D)
            if MOMENTUM:
                s1 = tile(s1_pointer + before * F * V, f, c, F, V)
                s2 = tile(s2_pointer + before * F * D, f, d, F, D)
                w1, w2 = w1 + push * s1, w2 + push * s2
                put(s1_pointer + after * F * V, add_flipped(drag * s1, e_to_s, h, PRODUCTS), f, c, F, V)
                put(s2_pointer + after * F * D, add_flipped(drag * s2, x_to_s, factor, PRODUCTS), f, d, F, D)
            put(w1_pointer + after * F * V, add_flipped(w1, e_to_w, h, PRODUCTS), f, c, F, V)
            put(w2_pointer + after * F * D, add_flipped(w2, x_to_w, factor, PRODUCTS), f, d, F, D)
            if GATED:
                w3 = keep * tile(w3_pointer + before * F * D, f, d, F, D)
                if MOMENTUM:
                    s3 = tile(s3_pointer + before * F * D, f, d, F, D)
                    w3 += push * s3
                    put(s3_pointer + after * F * D, add_flipped(drag * s3, x_to_s, factor_up, PRODUCTS), f, d, F, D)
                put(w3_pointer + after * F * D, add_flipped(w3, x_to_w, factor_up, PRODUCTS), f, d, F, D)
        # What this chunk wrote, other threads of the program read in the next.
        tl.debug_barrier()
        n += 1


@triton.jit
def read_kernel(
    q_pointer,  # [N, G, C, D]
    read_residual_pointer,  # [N, G, C, V]
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
    y_pointer,  # out: [N, G, C, V]
    read_pointer,  # out where KEEP: [N, G, C, V], y before its norm
    scores_pointer,  # out where KEEP: [N, G, BLOCK_C, BLOCK_I], h of the reads times h of the sources
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
    KEEP: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    anchors = slot_of(w1_pointer, w2_pointer, w3_pointer, tl.where(at < G, at, at + G), D, V, F, GATED)
    weights = slot_of(w1_pointer, w2_pointer, w3_pointer, at + G, D, V, F, GATED)
    momenta = slot_of(s1_pointer, s2_pointer, s3_pointer, at + G, D, V, F, GATED) if MOMENTUM else weights
    t, i, d, c = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    inside = c[None, :] < V
    q, x = tile(q_pointer + at * C * D, t, d, C, D), tile(x_pointer + at * I * D, i, d, I, D)
    seen = flipped(sources_pointer + at * BLOCK_C * BLOCK_I, BLOCK_C, BLOCK_I) * product(x, tl.trans(q), PRODUCTS)
    seen = tl.trans(seen.to(PRODUCTS))
    v, r = tile(v_pointer + at * I * V, i, c, I, V), tile(r_pointer + at * I * V, i, c, I, V)
    e = inner_error(tile(o_pointer + at * I * V, i, c, I, V), r, v, inside, V, LAYER, L2)
    alphas = column(alphas_pointer + at * C, t, C)
    kappas = column(kappas_pointer + at * C, t, C) if MOMENTUM else alphas

    o = tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
    scores = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
    for start in tl.range(0, F, BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, BLOCK_F)
        h, factor, factor_up = source_factors(anchors, x, e, f, d, c, F, D, V, GATED, PRODUCTS)
        z, _, _ = found_in(q, weights[1], momenta[1], alphas, kappas, f, d, F, D, MOMENTUM, PRODUCTS)
        read = gelu(add_product(z, seen, factor, PRODUCTS))
        if GATED:
            up, _, _ = found_in(q, weights[2], momenta[2], alphas, kappas, f, d, F, D, MOMENTUM, PRODUCTS)
            read *= add_product(up, seen, factor_up, PRODUCTS)
        o = add_product(o, alphas * read, tile(weights[0], f, c, F, V), PRODUCTS)
        if MOMENTUM:
            o = add_product(o, kappas * read, tile(momenta[0], f, c, F, V), PRODUCTS)
        scores = add_product(scores, h, tl.trans(read), PRODUCTS)

    sources = flipped(sources_pointer + at * BLOCK_C * BLOCK_I, BLOCK_C, BLOCK_I)
    o = add_product(o, tl.trans(sources * scores), e, PRODUCTS)
    if KEEP:
        put(read_pointer + at * C * V, o, t, c, C, V)
        put_flipped(scores_pointer + at * BLOCK_C * BLOCK_I, scores, BLOCK_C, BLOCK_I)
    if LAYER:
        o, _ = normalised(o, inside, V)
    put(y_pointer + at * C * V, tile(read_residual_pointer + at * C * V, t, c, C, V) + o, t, c, C, V)
