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

from typing import Any, NamedTuple

import triton
import triton.language as tl

from atlas_kernels.gpu.newton_schulz.forward import Matrices, Sizes, Strided, columns_of, places
from atlas_kernels.gpu.scan.pieces import add_product, column, product, put, tile


class Stack(NamedTuple):
    """The matrices of G memories and what each token sees of them (`total`: one token; `meet`: unweighted)."""

    base_pointer: Any  # [G, wide, narrow]
    alphas_pointer: Any  # [G, T], of the base
    stack_pointer: Any  # [G, K, wide, narrow]
    weights_pointer: Any  # [G, K, T], of the stack


class Through(NamedTuple):
    """S of `through_kernel`: A of what comes out, B of what goes in."""

    A: int
    B: int
    ROW: int  # from one of A to the next in a matrix, and from one of B to the next
    COLUMN: int
    BLOCK_T: int
    BLOCK_A: int
    BLOCK_B: int
    PRODUCTS: tl.dtype


class Meet(NamedTuple):
    """S of `meet_kernel`."""

    F: int
    D: int
    BLOCK_T: int
    BLOCK_F: int
    BLOCK_D: int
    PRODUCTS: tl.dtype


class Total(NamedTuple):
    """S of `total_kernel`."""

    SIZE: int  # elements of a matrix
    BLOCK: int


class Form(NamedTuple):
    """S of `form_kernel`."""

    F: int
    D: int
    BLOCK_F: int
    BLOCK_D: int
    PRODUCTS: tl.dtype
    RANKS: int  # blocks of the outer products


@triton.jit
def through_kernel(
    x_pointer,  # [G, T, B]
    stack,  # Stack
    out_pointer,  # out: [G, T, A]
    T,
    K,
    S: tl.constexpr,  # Through
):
    blocks = tl.cdiv(T, S.BLOCK_T)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * S.BLOCK_T + tl.arange(0, S.BLOCK_T)
    a = tl.program_id(1) * S.BLOCK_A + tl.arange(0, S.BLOCK_A)
    alphas = column(stack.alphas_pointer + g * T, t, T)
    out = tl.zeros([S.BLOCK_T, S.BLOCK_A], tl.float32)
    for start in tl.range(0, S.B, S.BLOCK_B, disable_licm=True):
        b = start + tl.arange(0, S.BLOCK_B)
        x = tile(x_pointer + g * T * S.B, t, b, T, S.B)
        at = b[:, None] * S.COLUMN + a[None, :] * S.ROW
        inside = (b[:, None] < S.B) & (a[None, :] < S.A)
        base = tl.load(stack.base_pointer + g * S.A * S.B + at, mask=inside, other=0.0)
        out = add_product(out, alphas * x, base, S.PRODUCTS)
        k = 0
        while k < K:  # no range: the interpreter takes an argument as its bound only with an older numpy
            weights = column(stack.weights_pointer + (g * K + k) * T, t, T)
            # Tokens before a write see nothing of it, sources outside its window give nothing to it. NaN is not zero.
            if tl.sum((weights != 0.0).to(tl.int32)) > 0:
                matrix = tl.load(stack.stack_pointer + (g * K + k) * S.A * S.B + at, mask=inside, other=0.0)
                out = add_product(out, weights * x, matrix, S.PRODUCTS)
            k += 1
    put(out_pointer + g * T * S.A, out, t, a, T, S.A)


@triton.jit
def meet_kernel(
    wide_pointer,  # [G, T, F]
    narrow_pointer,  # [G, T, D]
    stack,  # Stack
    scores_pointer,  # out: [G, K, T]
    inner_pointer,  # out: [G, K]
    T,
    K,
    S: tl.constexpr,  # Meet
):
    at = tl.program_id(0).to(tl.int64)
    g = at // K
    t, d = tl.program_id(1) * S.BLOCK_T + tl.arange(0, S.BLOCK_T), tl.arange(0, S.BLOCK_D)
    narrow = tile(narrow_pointer + g * T * S.D, t, d, T, S.D).to(S.PRODUCTS)
    scores, inner = tl.zeros([S.BLOCK_T], tl.float32), tl.zeros([S.BLOCK_F], tl.float32)
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        matrix = tile(stack.stack_pointer + at * S.F * S.D, f, d, S.F, S.D)
        met = product(narrow, tl.trans(matrix), S.PRODUCTS)
        scores += tl.sum(met * tile(wide_pointer + g * T * S.F, t, f, T, S.F), 1)
        inner += tl.sum(matrix.to(tl.float32) * tile(stack.base_pointer + g * S.F * S.D, f, d, S.F, S.D), 1)
    tl.store(scores_pointer + at * T + t, scores, mask=t < T)
    if tl.program_id(1) == 0:
        tl.store(inner_pointer + at, tl.sum(inner, 0))


@triton.jit
def total_kernel(
    stack,  # Stack
    out_pointer,  # out: [G, SIZE]
    K,
    S: tl.constexpr,  # Total
):
    g = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * S.BLOCK + tl.arange(0, S.BLOCK)
    inside = i < S.SIZE
    out = tl.load(stack.alphas_pointer + g) * tl.load(stack.base_pointer + g * S.SIZE + i, mask=inside, other=0.0)
    k = 0
    while k < K:
        at = g * K + k
        weight = tl.load(stack.weights_pointer + at)
        out += weight * tl.load(stack.stack_pointer + at * S.SIZE + i, mask=inside, other=0.0)
        k += 1
    tl.store(out_pointer + g * S.SIZE + i, out, mask=inside)


@triton.jit
def form_kernel(
    base_pointer,  # [G, F, D]
    scales_pointer,  # [G]
    coefficients_pointer,  # [G, R]
    narrow_pointer,  # [G, R, D]
    wide_pointer,  # [G, R, F]
    out_pointer,  # out: [G, F, D]
    R,
    S: tl.constexpr,  # Form
):
    g = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1)
    # Not kept in variables, which would make numbers of the constants.
    out = columns_of(
        Matrices(
            Strided(base_pointer, S.F * S.D, 1, S.D), scales_pointer, coefficients_pointer, narrow_pointer,
            wide_pointer, R, S.RANKS,
        ),
        g, j, Sizes(1, S.D, S.F, 1), S.BLOCK_D, S.BLOCK_F, S.PRODUCTS,
    )  # fmt: skip
    d, f = tl.arange(0, S.BLOCK_D), j * S.BLOCK_F + tl.arange(0, S.BLOCK_F)
    inside = (d < S.D)[:, None] & (f < S.F)[None, :]
    tl.store(out_pointer + g * S.F * S.D + places(d, f, 1, S.D), out, mask=inside)
