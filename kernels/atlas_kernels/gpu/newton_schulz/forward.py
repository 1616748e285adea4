"""Newton-Schulz, forward: one program a matrix.

    X = S / (|S|_F + 1e-7);  k times:  A = X X^T,  P = b A + c A A,  X <- a X + P X          X [m, n], m <= n

S lies in memory, or is formed here from a base and R outer products, S_k = s_k B + sum_r c_kr short_r long_r^T, where
K matrices share B, short and long: the momenta of the writing tokens of a chunk, which exist nowhere else.

Products take `PRODUCTS`, sums and X itself are float32. There is no Gram form here: with products in bfloat16 it
leaves 4 to 35 % of the result wrong, most where singular values fall off as a momentum's do, against 0.4 to 2 % for the
iteration as written (a X is added in float32 and never meets a rounded factor).

What a matrix costs, in the least a GPU can do, k steps, I = bytes of an element of S:

| kernel         | FLOPs              | global memory | through L2, in place of registers | on chip               |
|----------------|--------------------|---------------|-----------------------------------|-----------------------|
| forward_whole  | k (4 m^2 n + 2 m^3)| 2 I m n       | -                                 | X, A, P               |
| forward_blocks | the same           | 2 I m n       | I m n (4 + 2 k)                   | A, P, columns of X    |
| formed: beside | 2 R m n            | O m n, for one| B and the factors: 4 m n +        | -                     |
|                |                    | of 2 I m n    | 4 R (m + n), once for K matrices  |                       |

forward_whole: 64 x 64, k = 5: 7.9 MFLOP on 32 KB of float32, far above any GPU's ratio: bound by tensor cores, so
nothing but S and the result may leave the chip. forward_blocks: 128 x 512 does not fit the registers of a
multiprocessor in float32; a pass over the columns applies one step and sums the next step's A at once, which is one
read and one write of X a step. O: bytes of an element of the result; R = 79 sources add 2.6 MFLOP to 64 x 256.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-7)
# Of float32 products on tensor cores: three tf32 products, the error of one float32 product. No effect on others.
PRECISION = tl.constexpr("tf32x3")
# Outer products that are summed at once where a matrix is formed.
RANK_BLOCK = tl.constexpr(32)


class Strided(NamedTuple):
    """Matrices in memory, of any strides."""

    pointer: Any  # [matrices, m, n]
    stride_matrix: Any
    stride_row: Any
    stride_column: Any


class Matrices(NamedTuple):
    """Matrices [m, n], m <= n: each in memory (RANKS = 0, all after `base` unused), or each formed of

    scales[p] base[p // share] + sum_r coefficients[p, r] short[p // share, r] long[p // share, r]^T
    """

    base: Strided  # [owners, m, n]; its pointer None: the sum alone
    scales_pointer: Any  # [matrices] float32, as the next three
    coefficients_pointer: Any  # [matrices, rank]; None: all are one
    short_pointer: Any  # [owners, rank, m]
    long_pointer: Any  # [owners, rank, n]
    rank: Any
    RANKS: tl.constexpr  # blocks of RANK_BLOCK outer products


class Sizes(NamedTuple):
    count: Any  # of matrices; of the backward at most programs x TURNS
    m: Any
    n: Any
    share: Any  # matrices after each other that have one owner


class Constants(NamedTuple):
    """S of the kernels of Newton-Schulz."""

    M: int  # a power of two from 16 that holds m
    N: int  # a power of two from 16: it holds n, or is a block of the columns
    BLOCKS: int  # of N columns; not used where N holds n
    PRODUCTS: tl.dtype
    STEPS: int
    TURNS: int  # of a program of the backward, a matrix each


@triton.jit
def places(rows, columns, row_stride, column_stride):
    """Offsets [M, N] in 64 bits: a view's strides times its rows may pass 2^31."""
    return rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride


@triton.jit
def coefficients_of(table_pointer, step):
    """(a, b, c) of a step; table float32 [steps, 3]."""
    at = table_pointer + 3 * step
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def columns_of(matrices, place, j, sizes, M: tl.constexpr, N: tl.constexpr, PRODUCTS: tl.constexpr):
    """Block j of N columns of matrix `place` of `Matrices`, float32 [M, N], zeros outside [m, n]."""
    m, n = sizes.m, sizes.n
    rows, columns = tl.arange(0, M), j * N + tl.arange(0, N)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    base = matrices.base
    if matrices.RANKS > 0:
        rank = matrices.rank
        owner = place // sizes.share
        X = tl.zeros((M, N), tl.float32)
        if base.pointer is not None:
            at = base.pointer + owner * base.stride_matrix + places(rows, columns, base.stride_row, base.stride_column)
            X = tl.load(matrices.scales_pointer + place) * tl.load(at, mask=inside, other=0.0).to(tl.float32)
        short_at = matrices.short_pointer + owner * rank * m
        long_at = matrices.long_pointer + owner * rank * n
        for block in tl.range(0, matrices.RANKS, disable_licm=True):
            r = block * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
            left = short_at + r[None, :] * m + rows[:, None]
            left = tl.load(left, mask=(rows < m)[:, None] & (r < rank)[None, :], other=0.0)
            if matrices.coefficients_pointer is not None:
                left *= tl.load(matrices.coefficients_pointer + place * rank + r, mask=r < rank, other=0.0)[None, :]
            right = long_at + r[:, None] * n + columns[None, :]
            right = tl.load(right, mask=(r < rank)[:, None] & (columns < n)[None, :], other=0.0)
            X = tl.dot(left.to(PRODUCTS), right.to(PRODUCTS), X, input_precision=PRECISION)
    else:
        at = base.pointer + place * base.stride_matrix + places(rows, columns, base.stride_row, base.stride_column)
        X = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return X


@triton.jit
def polynomial(A, b, c, PRODUCTS: tl.constexpr):
    """b A + c A A [M, M], summed onto A itself: a second accumulator beside it would spill at M = 128."""
    factor = A.to(PRODUCTS)
    return (c * tl.dot(factor, factor, (b / c) * A, input_precision=PRECISION)).to(PRODUCTS)


@triton.jit
def iterated(X, table_pointer, S: tl.constexpr):
    """X [M, N] after all steps. S: STEPS and PRODUCTS as of `Constants`."""
    for step in range(S.STEPS):
        a, b, c = coefficients_of(table_pointer, step)
        x = X.to(S.PRODUCTS)
        A = tl.dot(x, tl.trans(x), input_precision=PRECISION)
        P = polynomial(A, b, c, S.PRODUCTS)
        X = tl.dot(P, x, a * X, input_precision=PRECISION)
    return X


@triton.jit
def forward_whole(
    matrices,  # Matrices
    result,  # Strided, out
    norms_pointer,  # out: [matrices] float32, |S|_F for the backward
    table_pointer,  # [steps, 3] float32
    sizes,  # Sizes
    S: tl.constexpr,  # Constants
):
    """All of X on chip."""
    matrix = tl.program_id(0).to(tl.int64)
    rows, columns = tl.arange(0, S.M), tl.arange(0, S.N)
    inside = (rows < sizes.m)[:, None] & (columns < sizes.n)[None, :]
    X = columns_of(matrices, matrix, 0, sizes, S.M, S.N, S.PRODUCTS)
    # At once: by rows first, triton 3.6 fails on sm_100 where X comes from a product.
    norm = tl.sqrt(tl.sum(X * X))
    tl.store(norms_pointer + matrix, norm)
    X = iterated(X / (norm + EPSILON), table_pointer, S)
    target = result.pointer + matrix * result.stride_matrix
    target += places(rows, columns, result.stride_row, result.stride_column)
    tl.store(target, X.to(result.pointer.dtype.element_ty), mask=inside)


@triton.jit
def forward_blocks(
    matrices,  # Matrices
    result,  # Strided, out
    norms_pointer,  # out: [matrices] float32, |S|_F for the backward
    table_pointer,  # [steps, 3] float32
    sizes,  # Sizes
    S: tl.constexpr,  # Constants
):
    """X by blocks of N columns, kept in `result` between the steps (in its dtype); otherwise as forward_whole."""
    matrix = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, S.M)
    target = result.pointer + matrix * result.stride_matrix
    squares = tl.zeros((S.M,), tl.float32)
    for j in range(S.BLOCKS):
        columns = j * S.N + tl.arange(0, S.N)
        inside = (rows < sizes.m)[:, None] & (columns < sizes.n)[None, :]
        X = columns_of(matrices, matrix, j, sizes, S.M, S.N, S.PRODUCTS)
        here = target + places(rows, columns, result.stride_row, result.stride_column)
        tl.store(here, X.to(result.pointer.dtype.element_ty), mask=inside)
        squares += tl.sum(X * X, 1)
    norm = tl.sqrt(tl.sum(squares, 0))
    tl.store(norms_pointer + matrix, norm)

    A = tl.zeros((S.M, S.M), tl.float32)
    # What one thread stored, another may load.
    tl.debug_barrier()
    for j in range(S.BLOCKS):
        columns = j * S.N + tl.arange(0, S.N)
        inside = (rows < sizes.m)[:, None] & (columns < sizes.n)[None, :]
        here = target + places(rows, columns, result.stride_row, result.stride_column)
        X = tl.load(here, mask=inside, other=0.0).to(tl.float32) / (norm + EPSILON)
        tl.store(here, X.to(result.pointer.dtype.element_ty), mask=inside)
        x = X.to(S.PRODUCTS)
        A = tl.dot(x, tl.trans(x), A, input_precision=PRECISION)
    for step in range(S.STEPS):
        a, b, c = coefficients_of(table_pointer, step)
        P = polynomial(A, b, c, S.PRODUCTS)
        A = tl.zeros((S.M, S.M), tl.float32)
        tl.debug_barrier()
        for j in range(S.BLOCKS):
            columns = j * S.N + tl.arange(0, S.N)
            inside = (rows < sizes.m)[:, None] & (columns < sizes.n)[None, :]
            here = target + places(rows, columns, result.stride_row, result.stride_column)
            X = tl.load(here, mask=inside, other=0.0).to(tl.float32)
            X = tl.dot(P, X.to(S.PRODUCTS), a * X, input_precision=PRECISION)
            tl.store(here, X.to(result.pointer.dtype.element_ty), mask=inside)
            if step + 1 < S.STEPS:
                x = X.to(S.PRODUCTS)
                A = tl.dot(x, tl.trans(x), A, input_precision=PRECISION)
