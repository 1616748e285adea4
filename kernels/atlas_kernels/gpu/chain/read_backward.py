"""The periodic chain backward, the reads of all chunks at once: one program a chunk and memory.

Takes y's gradient down to that of the queries and of what the gates let each token see; what a read owes to the weights
and to the O_k is left to the chain as the two sides of outer products, in PRODUCTS (see chain/write_backward.py).

A chunk of a memory, sizes as in forward.py; by count, not measured: 8.4 (K + 1) MFLOP; 128 KB weights, 64 K KB O_k and
32 KB tokens in, 96 KB out, of which 64 KB are left to the chain. Held on chip: the gradients of q and of what was read,
[64, 64], and a block of hidden rows. What a query found is multiplied out twice, before and after the activation: kept,
it would be K + 1 such blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from atlas_kernels.gpu.chain.pieces import found_in, parts_of, stack_of
from atlas_kernels.gpu.scan.pieces import (
    add_product,
    column,
    gelu_slope,
    jacobian_times,
    normalised,
    product,
    put,
    tile,
)


@triton.jit
def through_found(q, grad, pointers, gates, at, sums, S: tl.constexpr):
    """From the gradient `grad` [C, f] of what `found_in` found to that of q and of the gates.

    Arguments as there; sums: q's gradient [C, d], that of alphas [C], of of_writes [C, BLOCK_J].
    Returns sums with their parts.
    """
    w_pointer, stack_pointer = pointers
    alphas, of_writes_pointer, C = gates
    f, d = at
    grad_q, grad_alphas, grad_of_writes = sums
    w = tile(w_pointer, f, d, S.F, S.D).to(S.PRODUCTS)
    grad_alphas += tl.sum(product(q, tl.trans(w), S) * grad, 1)
    grad_q = add_product(grad_q, alphas * grad, w, S)
    t, j = tl.arange(0, S.BLOCK_C), tl.arange(0, S.BLOCK_J)
    for k in tl.range(0, S.WRITES, disable_licm=True):
        w = tile(stack_pointer + k * S.F * S.D, f, d, S.F, S.D)
        met = tl.sum(product(q, tl.trans(w), S) * grad, 1)
        grad_of_writes += tl.where(j[None, :] == k, met[:, None], 0.0)
        grad_q = add_product(grad_q, column(of_writes_pointer + k * C, t, C) * grad, w, S)
    return grad_q, grad_alphas, grad_of_writes


@triton.jit
def through_first(grad_read, h, pointers, gates, at, sums, S: tl.constexpr):
    """From the gradient of what was read, grad_read [C, D] in PRODUCTS, to that of h [C, f] and of the gates.

    As in `through_found`, of W1; sums: of alphas and of of_writes. Returns h's gradient and sums with their parts.
    """
    w_pointer, stack_pointer = pointers
    alphas, of_writes_pointer, C = gates
    f, d = at
    grad_alphas, grad_of_writes = sums
    met = product(grad_read, tl.trans(tile(w_pointer, f, d, S.F, S.D)), S)
    grad_alphas += tl.sum(met * h, 1)
    grad_h = alphas * met
    t, j = tl.arange(0, S.BLOCK_C), tl.arange(0, S.BLOCK_J)
    for k in tl.range(0, S.WRITES, disable_licm=True):
        met = product(grad_read, tl.trans(tile(stack_pointer + k * S.F * S.D, f, d, S.F, S.D)), S)
        grad_of_writes += tl.where(j[None, :] == k, tl.sum(met * h, 1)[:, None], 0.0)
        grad_h += column(of_writes_pointer + k * C, t, C) * met
    return grad_h, grad_alphas, grad_of_writes


@triton.jit
def chain_read_backward_kernel(
    grad_y_pointer,  # [N, G, C, D]
    tokens,  # Tokens of the scan
    tables,  # Tables
    states,  # States
    read_pointer,  # [N, G, C, D], of the forward with an output norm; else None
    grads,  # ReadGradients, out
    sizes,  # Sizes of the scan
    S: tl.constexpr,  # Shape
):
    G, C = sizes.G, sizes.C
    at = tl.program_id(0).to(tl.int64)
    weights, stack = parts_of(states.weights_pointer, at + G, S), stack_of(states.stack_pointer, at, S)
    t, d = tl.arange(0, S.BLOCK_C), tl.arange(0, S.BLOCK_D)
    owed = grads.owed.wide_pointer + at * S.PARTS * C * S.F
    grad_read = tile(grad_y_pointer + at * C * S.D, t, d, C, S.D)
    if S.LAYER:
        inside = d[None, :] < S.D
        unit, inverse_sd = normalised(tile(read_pointer + at * C * S.D, t, d, C, S.D), inside, S.D)
        grad_read = jacobian_times(unit, inverse_sd, grad_read, inside, S.D)
    put(grads.owed.grad_read_pointer + at * C * S.D, grad_read, t, d, C, S.D)
    grad_read = grad_read.to(S.PRODUCTS)

    gates = column(tables.alphas_pointer + at * C, t, C), tables.of_writes_pointer + at * S.WRITES * C, C
    q = tile(tokens.q_pointer + at * C * S.D, t, d, C, S.D)
    grad_q, grad_alphas = tl.zeros([S.BLOCK_C, S.BLOCK_D], tl.float32), tl.zeros([S.BLOCK_C], tl.float32)
    grad_of_writes = tl.zeros([S.BLOCK_C, S.BLOCK_J], tl.float32)
    first = weights.first_pointer, stack.first_pointer
    second, third = (weights.second_pointer, stack.second_pointer), (weights.third_pointer, stack.third_pointer)
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        act, slope = gelu_slope(found_in(q, second, gates, (f, d), t, S), S.PRODUCTS)
        h = act
        if S.GATED:
            up = found_in(q, third, gates, (f, d), t, S)
            h = act * up
        grad_h, grad_alphas, grad_of_writes = through_first(
            grad_read, h, first, gates, (f, d), (grad_alphas, grad_of_writes), S
        )
        put(owed, h.to(S.PRODUCTS), t, f, C, S.F)
        if S.GATED:
            grad_up = grad_h * act
            grad_h *= up
            put(owed + 2 * C * S.F, grad_up.to(S.PRODUCTS), t, f, C, S.F)
            grad_q, grad_alphas, grad_of_writes = through_found(
                q, grad_up, third, gates, (f, d), (grad_q, grad_alphas, grad_of_writes), S
            )
        grad_z = grad_h * slope
        put(owed + C * S.F, grad_z.to(S.PRODUCTS), t, f, C, S.F)
        grad_q, grad_alphas, grad_of_writes = through_found(
            q, grad_z, second, gates, (f, d), (grad_q, grad_alphas, grad_of_writes), S
        )
    put(grads.grad_q_pointer + at * C * S.D, grad_q, t, d, C, S.D)
    tl.store(grads.grad_alphas_pointer + at * C + t, grad_alphas, mask=t < C)
    j = tl.arange(0, S.BLOCK_J)
    seen = grads.grad_of_writes_pointer + at * S.WRITES * C + j[None, :] * C + t[:, None]
    tl.store(seen, grad_of_writes, mask=(t < C)[:, None] & (j < S.WRITES)[None, :])
