"""Products with a stack of matrices M_k [wide, narrow] that the tokens of a chunk see with weights of their own.

The matrices are those that a chunk's writing tokens have orthogonalised, or the gradients of their momenta; beside them
stands a base B, the weights of the chunk's start or what its last token leaves. Of one memory, T tokens, K matrices:

    through    out_t = a_t B x_t + sum_k w_kt M_k x_t           (or with the transposes)
    meet       scores_kt = wide_t . M_k narrow_t,   inner_k = <B, M_k>
    total      out = a B + sum_k w_k M_k
    form       out_k = s_k B + sum_r c_kr wide_r narrow_r^T

Every gradient of one is another of them. A chunk of a memory with F = 256, D = V = 64, C = 64 and a write at each of K
tokens, by count, for one of its matrices (E: bytes of an element of the stack):

    kernel     programs                   MFLOP      device memory, KB       held on chip
    through    64 tokens and 64 columns   2.1 K, 1 K 16 E K stack, 80 tokens x and out [64, 64]
               (the last: causal, whole groups of BLOCK_T tokens whose weights are zero are left out)
    meet       one a matrix               2.1 K      16 E K stack, 80 K      narrow [C, 64], scores [C]
                                                     tokens (L2)
    total      one a 1024 elements        0.03 K     16 E K stack, 128 base  a block
    form       one a 64 rows              2.1        128 base, 80 factors    a block [64, 64]
"""

from __future__ import annotations

import triton
import triton.language as tl

from atlas_kernels.gpu.newton_schulz_forward import columns_of, places
from atlas_kernels.gpu.scan_pieces import add_product, column, product, put, tile


@triton.jit
def through_kernel(
    x_pointer,  # [G, T, B]
    base_pointer,  # [G, ...], A x B elements each
    alphas_pointer,  # [G, T]
    stack_pointer,  # [G, K, ...]
    weights_pointer,  # [G, K, T]
    out_pointer,  # out: [G, T, A]
    T,
    K,
    A: tl.constexpr,
    B: tl.constexpr,
    ROW: tl.constexpr,  # from one of A to the next in a matrix, and from one of B to the next
    COLUMN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_T)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    alphas = column(alphas_pointer + g * T, t, T)
    out = tl.zeros([BLOCK_T, BLOCK_A], tl.float32)
    for start in tl.range(0, B, BLOCK_B, disable_licm=True):
        b = start + tl.arange(0, BLOCK_B)
        x = tile(x_pointer + g * T * B, t, b, T, B)
        at = b[:, None] * COLUMN + a[None, :] * ROW
        inside = (b[:, None] < B) & (a[None, :] < A)
        base = tl.load(base_pointer + g * A * B + at, mask=inside, other=0.0)
        out = add_product(out, alphas * x, base, PRODUCTS)
        k = 0
        while k < K:  # no range: the interpreter takes an argument as its bound only with an older numpy
            weights = column(weights_pointer + (g * K + k) * T, t, T)
            # Tokens before a write see nothing of it, sources outside its window give nothing to it. NaN is not zero.
            if tl.sum((weights != 0.0).to(tl.int32)) > 0:
                matrix = tl.load(stack_pointer + (g * K + k) * A * B + at, mask=inside, other=0.0)
                out = add_product(out, weights * x, matrix, PRODUCTS)
            k += 1
    put(out_pointer + g * T * A, out, t, a, T, A)


@triton.jit
def meet_kernel(
    wide_pointer,  # [G, T, F]
    narrow_pointer,  # [G, T, D]
    base_pointer,  # [G, F, D]
    stack_pointer,  # [G, K, F, D]
    scores_pointer,  # out: [G, K, T]
    inner_pointer,  # out: [G, K]
    T,
    K,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    g = at // K
    t, d = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    narrow = tile(narrow_pointer + g * T * D, t, d, T, D).to(PRODUCTS)
    scores, inner = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_F], tl.float32)
    for start in tl.range(0, F, BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, BLOCK_F)
        matrix = tile(stack_pointer + at * F * D, f, d, F, D)
        met = product(narrow, tl.trans(matrix), PRODUCTS)
        scores += tl.sum(met * tile(wide_pointer + g * T * F, t, f, T, F), 1)
        inner += tl.sum(matrix.to(tl.float32) * tile(base_pointer + g * F * D, f, d, F, D), 1)
    tl.store(scores_pointer + at * T + t, scores, mask=t < T)
    if tl.program_id(1) == 0:
        tl.store(inner_pointer + at, tl.sum(inner, 0))


@triton.jit
def total_kernel(
    base_pointer,  # [G, SIZE]
    alphas_pointer,  # [G]
    stack_pointer,  # [G, K, SIZE]
    weights_pointer,  # [G, K]
    out_pointer,  # out: [G, SIZE]
    K,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    out = tl.load(alphas_pointer + g) * tl.load(base_pointer + g * SIZE + i, mask=inside, other=0.0)
    k = 0
    while k < K:
        at = g * K + k
        out += tl.load(weights_pointer + at) * tl.load(stack_pointer + at * SIZE + i, mask=inside, other=0.0)
        k += 1
    tl.store(out_pointer + g * SIZE + i, out, mask=inside)


@triton.jit
def form_kernel(
    base_pointer,  # [G, F, D]
    scales_pointer,  # [G]
    coefficients_pointer,  # [G, R]
    narrow_pointer,  # [G, R, D]
    wide_pointer,  # [G, R, F]
    out_pointer,  # out: [G, F, D]
    R,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRODUCTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1)
    source = (
        base_pointer, F * D, 1, D, scales_pointer, coefficients_pointer, narrow_pointer, wide_pointer, R, 1,
    )  # fmt: skip
    out = columns_of(source, g, j, D, F, BLOCK_D, BLOCK_F, PRODUCTS, RANKS)
    d, f = tl.arange(0, BLOCK_D), j * BLOCK_F + tl.arange(0, BLOCK_F)
    tl.store(out_pointer + g * F * D + places(d, f, 1, D), out, mask=(d < D)[:, None] & (f < F)[None, :])
