"""The memory scan forward: one kernel that writes, chunk after chunk, and one that reads all chunks at once.

`write_kernel`, one program a memory g, keeps nothing of the matrices on chip: chunk n reads them at slot n + 1 of
[N + 2, G, F, ...] and writes slot n + 2; slot 0 holds the first chunk's anchor, slot 1 what enters. `read_kernel`, one
program a chunk and memory, forms what the tokens read from those slots. Kept apart because a read waits for no other
chunk: N times more programs than memories, and a shorter chain; the price is the sources' two products once more.
Where memories are few, several programs share one: split.py.

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

from atlas_kernels.gpu.scan.pieces import (
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
def anchor_output(anchors, x, S: tl.constexpr):
    """What the anchor gives to each source x [I, d]: o [I, c], summed over the hidden rows."""
    d, c = tl.arange(0, S.BLOCK_D), tl.arange(0, S.BLOCK_V)
    o = tl.zeros([S.BLOCK_I, S.BLOCK_V], tl.float32)
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        h = gelu(product(x, tl.trans(tile(anchors.second_pointer, f, d, S.F, S.D)), S), S.PRODUCTS)
        if S.GATED:
            h *= product(x, tl.trans(tile(anchors.third_pointer, f, d, S.F, S.D)), S)
        o = add_product(o, h, tile(anchors.first_pointer, f, c, S.F, S.V), S)
    return o


@triton.jit
def write_rows(tokens, tables, states, slots, sources, at, I, S: tl.constexpr):  # noqa: E741
    """What leaves chunk `at`: the hidden rows of the matrices and their momenta.

    slots: pointers at the anchor, the places of what enters and of what leaves; sources: x [I, d] and o [I, c].
    """
    D: tl.constexpr = S.D
    V: tl.constexpr = S.V
    F: tl.constexpr = S.F
    weights = states.weights
    if S.MOMENTUM:
        momenta = states.momenta
    anchors, before, after = slots
    x, o = sources
    i, d, c = tl.arange(0, S.BLOCK_I), tl.arange(0, S.BLOCK_D), tl.arange(0, S.BLOCK_V)
    inside = c[None, :] < V
    v, r = tile(tokens.v_pointer + at * I * V, i, c, I, V), tile(tokens.r_pointer + at * I * V, i, c, I, V)
    e = inner_error(o, r, v, inside, S)
    to_w = column(tables.to_w_pointer + at * I, i, I)
    e_to_w, x_to_w = tl.trans((to_w * e).to(S.PRODUCTS)), tl.trans((to_w * x).to(S.PRODUCTS))
    if S.MOMENTUM:
        to_s = column(tables.to_s_pointer + at * I, i, I)
        e_to_s, x_to_s = tl.trans((to_s * e).to(S.PRODUCTS)), tl.trans((to_s * x).to(S.PRODUCTS))
        keep = tl.load(tables.last_pointer + at * 3)
        push, drag = tl.load(tables.last_pointer + at * 3 + 1), tl.load(tables.last_pointer + at * 3 + 2)
    else:
        keep = tl.load(tables.last_pointer + at)

    for start in tl.range(0, F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        h, factor, factor_up = source_factors(anchors, x, e, f, d, c, S)
        w1 = keep * tile(weights.first_pointer + before * F * V, f, c, F, V)
        w2 = keep * tile(weights.second_pointer + before * F * D, f, d, F, D)
        if S.MOMENTUM:
            s1 = tile(momenta.first_pointer + before * F * V, f, c, F, V)
            s2 = tile(momenta.second_pointer + before * F * D, f, d, F, D)
            w1, w2 = w1 + push * s1, w2 + push * s2
            put(momenta.first_pointer + after * F * V, add_flipped(drag * s1, e_to_s, h, S), f, c, F, V)
            s2_at = momenta.second_pointer + after * F * D
            put(s2_at, add_flipped(drag * s2, x_to_s, factor, S), f, d, F, D)
        put(weights.first_pointer + after * F * V, add_flipped(w1, e_to_w, h, S), f, c, F, V)
        put(weights.second_pointer + after * F * D, add_flipped(w2, x_to_w, factor, S), f, d, F, D)
        if S.GATED:
            w3 = keep * tile(weights.third_pointer + before * F * D, f, d, F, D)
            if S.MOMENTUM:
                s3 = tile(momenta.third_pointer + before * F * D, f, d, F, D)
                w3 += push * s3
                s3_at = momenta.third_pointer + after * F * D
                put(s3_at, add_flipped(drag * s3, x_to_s, factor_up, S), f, d, F, D)
            put(weights.third_pointer + after * F * D, add_flipped(w3, x_to_w, factor_up, S), f, d, F, D)


@triton.jit
def write_kernel(
    tokens,  # Tokens
    tables,  # Tables
    states,  # States, slots 0 and 1 filled; out: the others
    o_pointer,  # out: [N, G, I, V], what the anchor gives to each source
    sizes,  # Sizes
    S: tl.constexpr,  # Shape
):
    N, G, I = sizes.N, sizes.G, sizes.I  # noqa: E741
    g = tl.program_id(0)
    i, d, c = tl.arange(0, S.BLOCK_I), tl.arange(0, S.BLOCK_D), tl.arange(0, S.BLOCK_V)
    n = 0
    while n < N:  # no range: the interpreter takes an argument as its bound only with an older numpy
        at = (n * G + g).to(tl.int64)
        before, after = at + G, at + 2 * G
        anchors = slot_of(states.weights, tl.where(n == 0, at, before), S)
        x = tile(tokens.x_pointer + at * I * S.D, i, d, I, S.D)
        o = anchor_output(anchors, x, S)
        put(o_pointer + at * I * S.V, o, i, c, I, S.V)
        write_rows(tokens, tables, states, (anchors, before, after), (x, o), at, I, S)
        # What this chunk wrote, other threads of the program read in the next.
        tl.debug_barrier()
        n += 1


@triton.jit
def read_kernel(
    tokens,  # Tokens
    tables,  # Tables
    states,  # States
    reads,  # Reads; out: y, and where KEEP read and scores
    sizes,  # Sizes
    S: tl.constexpr,  # Shape
):
    G, C, I = sizes.G, sizes.C, sizes.I  # noqa: E741
    at = tl.program_id(0).to(tl.int64)
    anchors = slot_of(states.weights, tl.where(at < G, at, at + G), S)
    weights = slot_of(states.weights, at + G, S)
    momenta = slot_of(states.momenta, at + G, S) if S.MOMENTUM else weights
    t, i, d, c = tl.arange(0, S.BLOCK_C), tl.arange(0, S.BLOCK_I), tl.arange(0, S.BLOCK_D), tl.arange(0, S.BLOCK_V)
    inside = c[None, :] < S.V
    # Rounded at once: what a program holds through the hidden rows costs it registers.
    q = tile(tokens.q_pointer + at * C * S.D, t, d, C, S.D).to(S.PRODUCTS)
    x = tile(tokens.x_pointer + at * I * S.D, i, d, I, S.D).to(S.PRODUCTS)
    sources_at = tables.sources_pointer + at * S.BLOCK_C * S.BLOCK_I
    seen = flipped(sources_at, S.BLOCK_C, S.BLOCK_I) * product(x, tl.trans(q), S)
    seen = tl.trans(seen.to(S.PRODUCTS))
    v, r = tile(tokens.v_pointer + at * I * S.V, i, c, I, S.V), tile(tokens.r_pointer + at * I * S.V, i, c, I, S.V)
    e = inner_error(tile(reads.o_pointer + at * I * S.V, i, c, I, S.V), r, v, inside, S).to(S.PRODUCTS)
    alphas = column(tables.alphas_pointer + at * C, t, C)
    kappas = column(tables.kappas_pointer + at * C, t, C) if S.MOMENTUM else alphas

    o = tl.zeros([S.BLOCK_C, S.BLOCK_V], tl.float32)
    scores = tl.zeros([S.BLOCK_I, S.BLOCK_C], tl.float32)
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        h, factor, factor_up = source_factors(anchors, x, e, f, d, c, S)
        z, _, _ = found_in(q, (weights.second_pointer, momenta.second_pointer), (alphas, kappas), f, d, S)
        read = gelu(add_product(z, seen, factor, S), S.PRODUCTS)
        if S.GATED:
            up, _, _ = found_in(q, (weights.third_pointer, momenta.third_pointer), (alphas, kappas), f, d, S)
            read *= add_product(up, seen, factor_up, S)
        o = add_product(o, alphas * read, tile(weights.first_pointer, f, c, S.F, S.V), S)
        if S.MOMENTUM:
            o = add_product(o, kappas * read, tile(momenta.first_pointer, f, c, S.F, S.V), S)
        scores = add_product(scores, h, tl.trans(read), S)

    sources = flipped(sources_at, S.BLOCK_C, S.BLOCK_I)
    o = add_product(o, tl.trans(sources * scores), e, S)
    if S.KEEP:
        put(reads.read_pointer + at * C * S.V, o, t, c, C, S.V)
        put_flipped(reads.scores_pointer + at * S.BLOCK_C * S.BLOCK_I, scores, S.BLOCK_C, S.BLOCK_I)
    if S.LAYER:
        o, _ = normalised(o, inside, S.V)
    put(
        reads.y_pointer + at * C * S.V, tile(tokens.read_residual_pointer + at * C * S.V, t, c, C, S.V) + o,
        t, c, C, S.V,
    )  # fmt: skip
