"""The periodic chain forward: one kernel that writes, chunk after chunk, and one that reads all chunks at once.

`chain_write_kernel`, one program a memory, goes through the chunks with its matrices in slots of device memory, as the
scan does (see scan/forward.py). Of each chunk it puts e and the factors of the sources aside, 64 sources at a time. Of
each matrix it forms the momentum S_k of each writing token from them, takes it through all steps of Newton-Schulz on
chip, and leaves O_k to the reads. What leaves the chunk is summed from the O_k as the reads see them, rounded.
`chain_read_kernel`, one program a chunk and memory, reads through the weights that enter and the O_k: no source.

A chunk of a memory at C = 64, D = 64, F = 256, W = 16 (79 sources, padded to 128 as rows and to 96 where they are
summed over), K writes, five steps, momentum, bfloat16 products; by count, not measured:

    kernel       MFLOP        of device memory              of L2                        held on chip
    chain_write  17 + 53 K    256 KB matrices and 64 K KB   anchor four times, weights   X [64, 256] in registers,
                              O_k out, 60 KB tokens in,     once, momentum K times:      its operands in 40 KB shared;
                              20 KB o out                   640 + 128 K KB; factors      or x, e, o [64, 64] of the
                                                            80 KB out and K times in     sources
    chain_read   4.2 (K + 1)  128 KB weights and 64 K KB    -                            q and o [64, 64] in registers
                              O_k in, 32 KB tokens in,
                              16 KB y out

Of the chain's MFLOP, 47 K are the steps themselves. Estimate of a chunk: at the rate of a large bfloat16 product, of
which one program has a 132nd, 12 microseconds at K = 1 and 39 at K = 4; one program a multiprocessor will not reach it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from atlas_kernels.gpu.chain.pieces import found_in, parts_of, stack_of, write_factors
from atlas_kernels.gpu.newton_schulz.forward import EPSILON, Matrices, Sizes, Strided, columns_of, iterated, places
from atlas_kernels.gpu.scan.pieces import add_product, column, gelu, inner_error, normalised, product, put, tile


@triton.jit
def anchor_output(anchors, x, S: tl.constexpr):
    """What the anchor gives to sources x [i, D] before the norm and the residual [i, D]."""
    d = tl.arange(0, S.BLOCK_D)
    o = tl.zeros([S.BLOCK_I, S.BLOCK_D], tl.float32)
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        h = gelu(product(x, tl.trans(tile(anchors.second_pointer, f, d, S.F, S.D)), S), S.PRODUCTS)
        if S.GATED:
            h *= product(x, tl.trans(tile(anchors.third_pointer, f, d, S.F, S.D)), S)
        o = add_product(o, h, tile(anchors.first_pointer, f, d, S.F, S.D), S)
    return o


@triton.jit
def orthogonalise(at, tables, sides, I, S: tl.constexpr):  # noqa: E741
    """Every S_k of one matrix to its O_k and norm, and S'.

    at: pointers at S, S', the O_k, the norms; tables: at thetas, sums, the steps' coefficients; sides: at the narrow
    and the wide factors.
    """
    s_pointer, moved_pointer, stack_pointer, norms_pointer = at
    thetas_pointer, sums_pointer, steps_pointer = tables
    narrow_pointer, wide_pointer = sides
    d, f = tl.arange(0, S.BLOCK_D), tl.arange(0, S.BLOCK_N)
    inside = (d < S.D)[:, None] & (f < S.F)[None, :]
    for j in tl.range(0, S.FORMED, disable_licm=True):
        X = columns_of(
            Matrices(
                Strided(s_pointer, 0, 1, S.D), thetas_pointer, sums_pointer, narrow_pointer, wide_pointer, I, S.RANKS_I
            ),
            j, 0, Sizes(1, S.D, S.F, S.FORMED), S.BLOCK_D, S.BLOCK_N, S.PRODUCTS,
        )  # fmt: skip
        if S.MOMENTUM:
            if j == S.FORMED - 1:
                tl.store(moved_pointer + places(d, f, 1, S.D), X, mask=inside)
        if j < S.WRITES:
            norm = tl.sqrt(tl.sum(X * X))
            tl.store(norms_pointer + j, norm)
            X = iterated(X / (norm + EPSILON), steps_pointer, S)
            tl.store(stack_pointer + j * S.F * S.D + places(d, f, 1, S.D), X.to(S.PRODUCTS), mask=inside)


@triton.jit
def put_sum(out_pointer, w_pointer, stack_pointer, gates, S: tl.constexpr):
    """keep W + sum_k at_last_k O_k; gates: keep, and the pointer at at_last."""
    keep, at_last_pointer = gates
    d = tl.arange(0, S.BLOCK_D)
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        w = keep * tile(w_pointer, f, d, S.F, S.D)
        for k in tl.range(0, S.WRITES, disable_licm=True):
            O = tile(stack_pointer + k * S.F * S.D, f, d, S.F, S.D)  # noqa: E741
            w += tl.load(at_last_pointer + k) * O.to(tl.float32)
        put(out_pointer, w, f, d, S.F, S.D)


@triton.jit
def chain_write_kernel(
    tokens,  # Tokens of the scan
    tables,  # Tables
    states,  # States, slots 0 and 1 filled; out: the others
    factors,  # Factors
    sizes,  # Sizes of the scan
    S: tl.constexpr,  # Shape
):
    N, G, C, I = sizes.N, sizes.G, sizes.C, sizes.I  # noqa: E741
    SIZE: tl.constexpr = S.F * S.D
    g = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, S.BLOCK_D)
    # Not a while: what is hoisted out of one costs the registers that Newton-Schulz needs.
    for n in tl.range(0, S.TURNS, disable_licm=True):
        if n < N:
            at = n * G + g
            anchors = parts_of(states.weights_pointer, tl.where(n == 0, at, at + G), S)
            x_at = tokens.x_pointer + at * I * S.D
            for part in tl.range(0, S.TILES, disable_licm=True):
                i = part * S.BLOCK_I + tl.arange(0, S.BLOCK_I)
                x = tile(x_at, i, d, I, S.D).to(S.PRODUCTS)
                o = anchor_output(anchors, x, S)
                put(states.o_pointer + at * I * S.D, o, i, d, I, S.D)
                v = tile(tokens.v_pointer + at * I * S.D, i, d, I, S.D)
                r = tile(tokens.r_pointer + at * I * S.D, i, d, I, S.D)
                write_factors(factors, anchors, x, inner_error(o, r, v, d[None, :] < S.D, S), g, (i, I), S)
            # What one thread stored, another may load.
            tl.debug_barrier()

            gates = tables.thetas_pointer + at * S.FORMED, tables.sums_pointer + at * S.FORMED * I, tables.steps_pointer
            last = tl.load(tables.alphas_pointer + at * C + C - 1), tables.at_last_pointer + at * S.WRITES
            for p in tl.range(0, S.PARTS, disable_licm=True):
                own, before, after = at * S.PARTS + p, (at + G) * S.PARTS + p, (at + 2 * G) * S.PARTS + p
                stack = states.stack_pointer + own * S.WRITES * SIZE
                s_at, moved_at = states.momenta_pointer + before * SIZE, states.momenta_pointer + after * SIZE
                narrow = tl.where(p == 0, factors.e_pointer + g * I * S.D, x_at)
                wide = factors.wide_pointer + (g * S.PARTS + p) * I * S.F
                norms = states.norms_pointer + own * S.WRITES
                orthogonalise((s_at, moved_at, stack, norms), gates, (narrow, wide), I, S)
                tl.debug_barrier()
                weights = states.weights_pointer
                put_sum(weights + after * SIZE, weights + before * SIZE, stack, last, S)
            tl.debug_barrier()


@triton.jit
def chain_read_kernel(
    tokens,  # Tokens of the scan
    tables,  # Tables
    states,  # States
    y_pointer,  # out: [N, G, C, D]
    read_pointer,  # out, of the output norm's backward: [N, G, C, D], y before its norm and residual; else None
    sizes,  # Sizes of the scan
    S: tl.constexpr,  # Shape
):
    G, C = sizes.G, sizes.C
    at = tl.program_id(0).to(tl.int64)
    weights, stack = parts_of(states.weights_pointer, at + G, S), stack_of(states.stack_pointer, at, S)
    t, d = tl.arange(0, S.BLOCK_C), tl.arange(0, S.BLOCK_D)
    gates = column(tables.alphas_pointer + at * C, t, C), tables.of_writes_pointer + at * S.WRITES * C, C
    q = tile(tokens.q_pointer + at * C * S.D, t, d, C, S.D)
    o = tl.zeros([S.BLOCK_C, S.BLOCK_D], tl.float32)
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        h = gelu(found_in(q, (weights.second_pointer, stack.second_pointer), gates, (f, d), t, S), S.PRODUCTS)
        if S.GATED:
            h *= found_in(q, (weights.third_pointer, stack.third_pointer), gates, (f, d), t, S)
        o = add_product(o, gates[0] * h, tile(weights.first_pointer, f, d, S.F, S.D), S)
        for k in tl.range(0, S.WRITES, disable_licm=True):
            seen = column(gates[1] + k * C, t, C) * h
            o = add_product(o, seen, tile(stack.first_pointer + k * S.F * S.D, f, d, S.F, S.D), S)
    if S.KEEP and S.LAYER:
        put(read_pointer + at * C * S.D, o, t, d, C, S.D)
    if S.LAYER:
        o, _ = normalised(o, d[None, :] < S.D, S.D)
    r = tile(tokens.read_residual_pointer + at * C * S.D, t, d, C, S.D)
    put(y_pointer + at * C * S.D, r + o, t, d, C, S.D)
