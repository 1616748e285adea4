"""The memory scan backward: one kernel for the reads of all chunks at once, one for the chain of the writes.

`read_backward_kernel`, one program a chunk and memory, takes y's gradient down to what a read multiplies. What it owes
to matrices and factors is left to the chain as the two sides of outer products, h and dz [C, F] a chunk, in PRODUCTS:
their sums would be four matrices, two to four times the bytes. `write_backward_kernel`, one program a memory, goes
through the chunks from the last to the first with the gradients of the matrices in place, slot 1 of [2, G, F, ...];
slot 0 takes the gradient of the first chunk's anchor, every other anchor is the weights that enter its chunk. Where
memories are few, several programs share one: split.py.

Names: `grad_a` is the loss's gradient of a.

A chunk of a memory, sizes as in forward.py; by count, not measured:

    kernel          MFLOP  device memory                        L2                          held on chip
    read_backward   40     256 KB matrices, 200 KB tokens,      anchor: 128 KB              grad_q_w, grad_q_s [C, 64],
                           tables and o in; 220 KB out                                      grad_met [I, C], registers
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

from atlas_kernels.gpu.scan.pieces import (
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
    two_products,
)


@triton.jit
def query_gradients(grad_q_w, grad_q_s, grad, w, s, S: tl.constexpr):
    """Of alphas q and kappas q [C, D], with the part of these rows: grad W and grad S. No product takes them up."""
    grad_q_w = tl.dot(grad.to(S.PRODUCTS), w.to(S.PRODUCTS), grad_q_w, input_precision="ieee")
    if S.MOMENTUM:
        grad_q_s = tl.dot(grad.to(S.PRODUCTS), s.to(S.PRODUCTS), grad_q_s, input_precision="ieee")
    return grad_q_w, grad_q_s


@triton.jit
def through_sources(e, grad_read, sources_at, scores_at, grad_sources_at, S: tl.constexpr):
    """From the reads' gradient to that of e [I, V], of what the sources' weights have from the scores (put in its
    place), and of the scores [C, I] in PRODUCTS."""
    sources, scores = flipped(sources_at, S.BLOCK_C, S.BLOCK_I), flipped(scores_at, S.BLOCK_C, S.BLOCK_I)
    grad_e = product(sources * scores, grad_read, S)
    grad_scores = product(e, tl.trans(grad_read), S)
    put_flipped(grad_sources_at, grad_scores * scores, S.BLOCK_C, S.BLOCK_I)
    return grad_e, tl.trans((grad_scores * sources).to(S.PRODUCTS))


@triton.jit
def read_backward_kernel(
    grad_y_pointer,  # [N, G, C, V]
    tokens,  # Tokens
    tables,  # Tables
    states,  # States
    reads,  # Reads
    grads,  # ReadGradients, out
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

    grad_read = tile(grad_y_pointer + at * C * S.V, t, c, C, S.V)
    if S.LAYER:
        n, inverse_sd = normalised(tile(reads.read_pointer + at * C * S.V, t, c, C, S.V), inside, S.V)
        grad_read = jacobian_times(n, inverse_sd, grad_read, inside, S.V)
    put(grads.grad_read_pointer + at * C * S.V, grad_read, t, c, C, S.V)
    grad_read = grad_read.to(S.PRODUCTS)

    v, r = tile(tokens.v_pointer + at * I * S.V, i, c, I, S.V), tile(tokens.r_pointer + at * I * S.V, i, c, I, S.V)
    e = inner_error(tile(reads.o_pointer + at * I * S.V, i, c, I, S.V), r, v, inside, S).to(S.PRODUCTS)
    pair = at * S.BLOCK_C * S.BLOCK_I
    sources_at, grad_sources_at = tables.sources_pointer + pair, grads.grad_sources_pointer + pair
    scores_at = reads.scores_pointer + pair
    grad_e, grad_scores = through_sources(e, grad_read, sources_at, scores_at, grad_sources_at, S)
    put(grads.grad_e_pointer + at * I * S.V, grad_e, i, c, I, S.V)

    q = tile(tokens.q_pointer + at * C * S.D, t, d, C, S.D).to(S.PRODUCTS)
    x = tile(tokens.x_pointer + at * I * S.D, i, d, I, S.D).to(S.PRODUCTS)
    sources = flipped(sources_at, S.BLOCK_C, S.BLOCK_I)
    seen = tl.trans((sources * product(x, tl.trans(q), S)).to(S.PRODUCTS))
    alphas = column(tables.alphas_pointer + at * C, t, C)
    kappas = column(tables.kappas_pointer + at * C, t, C) if S.MOMENTUM else alphas
    grad_alphas, grad_kappas = tl.zeros([S.BLOCK_C], tl.float32), tl.zeros([S.BLOCK_C], tl.float32)
    grad_q_w, grad_q_s = tl.zeros([S.BLOCK_C, S.BLOCK_D], tl.float32), tl.zeros([S.BLOCK_C, S.BLOCK_D], tl.float32)
    grad_met = tl.zeros([S.BLOCK_I, S.BLOCK_C], tl.float32)

    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        h, factor, factor_up = source_factors(anchors, x, e, f, d, c, S)
        z, w2, s2 = found_in(q, (weights.second_pointer, momenta.second_pointer), (alphas, kappas), f, d, S)
        act, read_slope = gelu_slope(add_product(z, seen, factor, S), S.PRODUCTS)
        read = act
        if S.GATED:
            up, w3, s3 = found_in(q, (weights.third_pointer, momenta.third_pointer), (alphas, kappas), f, d, S)
            up = add_product(up, seen, factor_up, S)
            read = act * up

        w1 = tile(weights.first_pointer, f, c, S.F, S.V)
        s1 = tile(momenta.first_pointer, f, c, S.F, S.V) if S.MOMENTUM else w1
        met, met_s = two_products(grad_read, w1, s1, S)
        grad_alphas += tl.sum(met * read, 1)
        grad_h = alphas * met
        if S.MOMENTUM:
            grad_kappas += tl.sum(met_s * read, 1)
            grad_h += kappas * met_s
        grad_h = add_product(grad_h, grad_scores, h, S)
        put(grads.h_pointer + at * C * S.F, read.to(S.PRODUCTS), t, f, C, S.F)
        if S.GATED:
            grad_up = grad_h * act
            grad_h *= up
            put(grads.grad_up_pointer + at * C * S.F, grad_up.to(S.PRODUCTS), t, f, C, S.F)
            grad_met = add_product(grad_met, factor_up, tl.trans(grad_up), S)
            grad_q_w, grad_q_s = query_gradients(grad_q_w, grad_q_s, grad_up, w3, s3, S)
        grad_z = grad_h * read_slope
        put(grads.grad_z_pointer + at * C * S.F, grad_z.to(S.PRODUCTS), t, f, C, S.F)
        grad_met = add_product(grad_met, factor, tl.trans(grad_z), S)
        grad_q_w, grad_q_s = query_gradients(grad_q_w, grad_q_s, grad_z, w2, s2, S)

    # Read again: held until here they would cost registers.
    exact = tile(tokens.q_pointer + at * C * S.D, t, d, C, S.D)
    q, x = exact.to(S.PRODUCTS), tile(tokens.x_pointer + at * I * S.D, i, d, I, S.D).to(S.PRODUCTS)
    tl.store(grads.grad_alphas_pointer + at * C + t, grad_alphas + tl.sum(grad_q_w * exact, 1), mask=t < C)
    grad_q = alphas * grad_q_w
    if S.MOMENTUM:
        tl.store(grads.grad_kappas_pointer + at * C + t, grad_kappas + tl.sum(grad_q_s * exact, 1), mask=t < C)
        grad_q += kappas * grad_q_s
    # What this program has put there, other threads of it add to.
    tl.debug_barrier()
    grad_sources = flipped(grad_sources_at, S.BLOCK_C, S.BLOCK_I) + grad_met * product(x, tl.trans(q), S)
    tl.debug_barrier()
    put_flipped(grad_sources_at, grad_sources, S.BLOCK_C, S.BLOCK_I)
    grad_met *= flipped(sources_at, S.BLOCK_C, S.BLOCK_I)
    put(grads.grad_q_pointer + at * C * S.D, add_product(grad_q, tl.trans(grad_met), x, S), t, d, C, S.D)
    put(grads.grad_x_pointer + at * I * S.D, product(grad_met, q, S), i, d, I, S.D)
