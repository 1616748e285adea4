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

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-7)
# Of float32 products on tensor cores: three tf32 products, the error of one float32 product. No effect on others.
PRECISION = tl.constexpr("tf32x3")
# Outer products that are summed at once where a matrix is formed.
RANK_BLOCK = tl.constexpr(32)


@triton.jit
def places(rows, columns, row_stride, column_stride):
    """Offsets [M, N] in 64 bits: a view's strides times its rows may pass 2^31."""
    return rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride


@triton.jit
def coefficients_of(table, step):
    """(a, b, c) of a step; table float32 [steps, 3]."""
    return tl.load(table + 3 * step), tl.load(table + 3 * step + 1), tl.load(table + 3 * step + 2)


@triton.jit
def columns_of(source, place, j, m, n, M: tl.constexpr, N: tl.constexpr, PRODUCTS: tl.constexpr, RANKS: tl.constexpr):
    """Block j of N columns of matrix `place`, float32 [M, N], zeros outside [m, n].

    source: (pointer, its strides from matrix to matrix, row and column; and of a formed matrix scales [matrices],
    coefficients [matrices, rank], short [owners, rank, m], long [owners, rank, n], rank, share), None and 0 where
    RANKS is 0. RANKS: blocks of RANK_BLOCK outer products; `share` matrices after each other have one owner. Without
    `pointer` a formed matrix is its outer products alone.
    """
    pointer, stride_matrix, stride_row, stride_column, scales, coefficients, short, long, rank, share = source
    rows, columns = tl.arange(0, M), j * N + tl.arange(0, N)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    if RANKS > 0:
        owner = place // share
        X = tl.zeros((M, N), tl.float32)
        if pointer is not None:
            at = pointer + owner * stride_matrix + places(rows, columns, stride_row, stride_column)
            X = tl.load(scales + place) * tl.load(at, mask=inside, other=0.0).to(tl.float32)
        short += owner * rank * m
        long += owner * rank * n
        for block in tl.range(0, RANKS, disable_licm=True):
            r = block * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
            c = tl.load(coefficients + place * rank + r, mask=r < rank, other=0.0)
            left = short + r[None, :] * m + rows[:, None]
            left = tl.load(left, mask=(rows < m)[:, None] & (r < rank)[None, :], other=0.0)
            right = long + r[:, None] * n + columns[None, :]
            right = tl.load(right, mask=(r < rank)[:, None] & (columns < n)[None, :], other=0.0)
            X = tl.dot((c[None, :] * left).to(PRODUCTS), right.to(PRODUCTS), X, input_precision=PRECISION)
    else:
        at = pointer + place * stride_matrix + places(rows, columns, stride_row, stride_column)
        X = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return X


@triton.jit
def polynomial(A, b, c, PRODUCTS: tl.constexpr):
    """b A + c A A [M, M], summed onto A itself: a second accumulator beside it would spill at M = 128."""
    factor = A.to(PRODUCTS)
    return (c * tl.dot(factor, factor, (b / c) * A, input_precision=PRECISION)).to(PRODUCTS)


@triton.jit
def forward_whole(
    matrices,
    scales,
    coefficients,
    short,
    long,
    rank,
    share,
    result,
    norms,
    table,
    m,
    n,
    stride_matrix,
    stride_row,
    stride_column,
    result_stride_matrix,
    result_stride_row,
    result_stride_column,
    M: tl.constexpr,
    N: tl.constexpr,
    PRODUCTS: tl.constexpr,
    STEPS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """All of X on chip. M, N: powers of two from 16 that hold m and n; norms float32 [matrices], for the backward."""
    matrix = tl.program_id(0).to(tl.int64)
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    source = (matrices, stride_matrix, stride_row, stride_column, scales, coefficients, short, long, rank, share)
    X = columns_of(source, matrix, 0, m, n, M, N, PRODUCTS, RANKS)
    # At once: by rows first, triton 3.6 fails on sm_100 where X comes from a product.
    norm = tl.sqrt(tl.sum(X * X))
    tl.store(norms + matrix, norm)
    X = X / (norm + EPSILON)
    for step in range(STEPS):
        a, b, c = coefficients_of(table, step)
        x = X.to(PRODUCTS)
        A = tl.dot(x, tl.trans(x), input_precision=PRECISION)
        P = polynomial(A, b, c, PRODUCTS)
        X = tl.dot(P, x, a * X, input_precision=PRECISION)
    target = result + matrix * result_stride_matrix + places(rows, columns, result_stride_row, result_stride_column)
    tl.store(target, X.to(result.dtype.element_ty), mask=inside)


@triton.jit
def forward_blocks(
    matrices,
    scales,
    coefficients,
    short,
    long,
    rank,
    share,
    result,
    norms,
    table,
    m,
    n,
    stride_matrix,
    stride_row,
    stride_column,
    result_stride_matrix,
    result_stride_row,
    result_stride_column,
    M: tl.constexpr,
    N: tl.constexpr,
    PRODUCTS: tl.constexpr,
    STEPS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """X by blocks of N columns, kept in `result` between the steps (in its dtype); otherwise as forward_whole."""
    matrix = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, M)
    source = (matrices, stride_matrix, stride_row, stride_column, scales, coefficients, short, long, rank, share)
    target = result + matrix * result_stride_matrix
    squares = tl.zeros((M,), tl.float32)
    for j in range(BLOCKS):
        columns = j * N + tl.arange(0, N)
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        X = columns_of(source, matrix, j, m, n, M, N, PRODUCTS, RANKS)
        here = target + places(rows, columns, result_stride_row, result_stride_column)
        tl.store(here, X.to(result.dtype.element_ty), mask=inside)
        squares += tl.sum(X * X, 1)
    norm = tl.sqrt(tl.sum(squares, 0))
    tl.store(norms + matrix, norm)

    A = tl.zeros((M, M), tl.float32)
    # What one thread stored, another may load.
    tl.debug_barrier()
    for j in range(BLOCKS):
        columns = j * N + tl.arange(0, N)
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        here = target + places(rows, columns, result_stride_row, result_stride_column)
        X = tl.load(here, mask=inside, other=0.0).to(tl.float32) / (norm + EPSILON)
        tl.store(here, X.to(result.dtype.element_ty), mask=inside)
        x = X.to(PRODUCTS)
        A = tl.dot(x, tl.trans(x), A, input_precision=PRECISION)
    for step in range(STEPS):
        a, b, c = coefficients_of(table, step)
        P = polynomial(A, b, c, PRODUCTS)
        A = tl.zeros((M, M), tl.float32)
        tl.debug_barrier()
        for j in range(BLOCKS):
            columns = j * N + tl.arange(0, N)
            inside = (rows < m)[:, None] & (columns < n)[None, :]
            here = target + places(rows, columns, result_stride_row, result_stride_column)
            X = tl.load(here, mask=inside, other=0.0).to(tl.float32)
            X = tl.dot(P, X.to(PRODUCTS), a * X, input_precision=PRECISION)
            tl.store(here, X.to(result.dtype.element_ty), mask=inside)
            if step + 1 < STEPS:
                x = X.to(PRODUCTS)
                A = tl.dot(x, tl.trans(x), A, input_precision=PRECISION)
