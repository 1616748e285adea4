"""Newton-Schulz, backward: each program recomputes the steps of one matrix, then walks them back; then its next matrix.

With G = dX' of a step X' = a X + P X, P = b A + c A A, A = X X^T (A, P, E symmetric):

    E = G X^T + X G^T,   D = b E + c (E A + A E),   dX = a G + P G + D X

and of X = S r, r = 1 / (f + 1e-7), f = |S|_F:   dS = r (dX - X <dX, X> (f + 1e-7) / f), the last term 0 where f is 0.

X, A and P of every step are kept in `trail` as the products take them, so nothing is computed twice; a step of
recomputing costs the forward's FLOPs, a step back 6 m^2 n + 4 m^3. `trail` belongs to a program, not to a matrix, so
that it is as large as the GPU has room for programs, not as the batch. J bytes of an element of PRODUCTS, I of S:

| kernel          | FLOPs               | global memory | through L2                    | on chip                     |
|-----------------|---------------------|---------------|-------------------------------|-----------------------------|
| backward_whole  | k (10 m^2 n + 6 m^3)| 4 I m n       | 2 k J (m n + 2 m^2)           | X or G, A, P, E, D          |
| backward_blocks | the same            | 6 I m n       | k (J (4 m n + m^2 (10 + n / N)| A, P or E, P, columns of    |
|                 |                     |               | + 16 m n)                     | G, X                        |

S and G may both be formed here from their factors, as in newton_schulz_forward.py; S twice, at 2 R m n FLOPs each.
The gradient of Newton-Schulz is linear in what comes in, which is scaled to |G|_F = 1 first: in float16 it would
vanish otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from atlas_kernels.gpu.newton_schulz_forward import (
    EPSILON,
    PRECISION,
    coefficients_of,
    columns_of,
    places,
    polynomial,
)


@triton.jit
def grid_of(rows, columns, ROW: tl.constexpr):
    """Offsets [M, N] in rows of ROW elements."""
    return rows[:, None] * ROW + columns[None, :]


@triton.jit
def through_step(dP, A, b, c, PRODUCTS: tl.constexpr):
    """D [M, M] as the products take it, from G X^T."""
    E = dP + tl.trans(dP)
    factor = E.to(PRODUCTS)
    D = tl.dot(factor, A, (b / c) * E, input_precision=PRECISION)
    return (c * tl.dot(A, factor, D, input_precision=PRECISION)).to(PRODUCTS)


@triton.jit
def sum_of_products(left, right, total, M: tl.constexpr, SLICE: tl.constexpr):
    """total + left right [M, M], read from memory by slices of the inner side: whole, they would spill at M = 128."""
    rows, slice = tl.arange(0, M), tl.arange(0, SLICE)
    for k in tl.range(0, M // SLICE, disable_licm=True):
        across = tl.load(left + grid_of(rows, k * SLICE + slice, M))
        down = tl.load(right + grid_of(k * SLICE + slice, rows, M))
        total = tl.dot(across, down, total, input_precision=PRECISION)
    return total


@triton.jit
def bounded(dS, pointer):
    """dS in the dtype that `pointer` points at, at most its largest number: of a zero matrix it is 1e7 times dX."""
    if pointer.dtype.element_ty == tl.float16:
        dS = tl.minimum(tl.maximum(dS, -65504.0), 65504.0)
    return dS.to(pointer.dtype.element_ty)


@triton.jit
def backward_whole(
    matrices,
    scales,
    coefficients,
    short,
    long,
    rank,
    gradients,
    gradient_scales,
    gradient_coefficients,
    gradient_short,
    gradient_long,
    gradient_rank,
    share,
    result,
    norms,
    table,
    trail,
    count,
    m,
    n,
    stride_matrix,
    stride_row,
    stride_column,
    gradient_stride_matrix,
    gradient_stride_row,
    gradient_stride_column,
    result_stride_matrix,
    result_stride_row,
    result_stride_column,
    M: tl.constexpr,
    N: tl.constexpr,
    PRODUCTS: tl.constexpr,
    STEPS: tl.constexpr,
    TURNS: tl.constexpr,
    RANKS: tl.constexpr,
    GRADIENT_RANKS: tl.constexpr,
):
    """All of X, then of G, on chip. count: matrices, at most programs x TURNS; trail [programs, STEPS,
    M N + 2 M M] of PRODUCTS."""
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, M)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    wide, small = grid_of(rows, columns, N), grid_of(rows, inner, M)
    source = (matrices, stride_matrix, stride_row, stride_column, scales, coefficients, short, long, rank, share)
    incoming = (
        gradients, gradient_stride_matrix, gradient_stride_row, gradient_stride_column, gradient_scales,
        gradient_coefficients, gradient_short, gradient_long, gradient_rank, share,
    )  # fmt: skip
    STEP: tl.constexpr = M * N + 2 * M * M
    trail += tl.program_id(0).to(tl.int64) * STEPS * STEP
    # Not a while: what is hoisted out of one costs the registers that the products need.
    for turn in tl.range(0, TURNS, disable_licm=True):
        place = turn * tl.num_programs(0) + tl.program_id(0)
        if place < count:
            matrix = place.to(tl.int64)
            norm = tl.load(norms + matrix)
            X = columns_of(source, matrix, 0, m, n, M, N, PRODUCTS, RANKS) / (norm + EPSILON)
            for step in tl.range(0, STEPS, disable_licm=True):
                a, b, c = coefficients_of(table, step)
                here = trail + step * STEP
                x = X.to(PRODUCTS)
                A = tl.dot(x, tl.trans(x), input_precision=PRECISION)
                P = polynomial(A, b, c, PRODUCTS)
                tl.store(here + wide, x)
                tl.store(here + M * N + small, A.to(PRODUCTS))
                tl.store(here + M * N + M * M + small, P)
                X = tl.dot(P, x, a * X, input_precision=PRECISION)
            G = columns_of(incoming, matrix, 0, m, n, M, N, PRODUCTS, GRADIENT_RANKS)
            size = tl.sqrt(tl.sum(G * G))
            size = tl.where(size > 0, size, 1.0)
            G = G / size
            # What one thread stored, another may load.
            tl.debug_barrier()
            for back in tl.range(0, STEPS, disable_licm=True):
                step = STEPS - 1 - back
                a, b, c = coefficients_of(table, step)
                here = trail + step * STEP
                x = tl.load(here + wide)
                A = tl.load(here + M * N + small)
                P = tl.load(here + M * N + M * M + small)
                g = G.to(PRODUCTS)
                D = through_step(tl.dot(g, tl.trans(x), input_precision=PRECISION), A, b, c, PRODUCTS)
                G = tl.dot(P, g, a * G, input_precision=PRECISION)
                G = tl.dot(D, x, G, input_precision=PRECISION)
            X = columns_of(source, matrix, 0, m, n, M, N, PRODUCTS, RANKS) / (norm + EPSILON)
            radial = tl.sum(G * X) * tl.where(norm > 0, (norm + EPSILON) / tl.where(norm > 0, norm, 1.0), 0.0)
            target = result + matrix * result_stride_matrix
            target += places(rows, columns, result_stride_row, result_stride_column)
            tl.store(target, bounded((G - X * radial) * (size / (norm + EPSILON)), result), mask=inside)
            # The next matrix takes the same trail.
            tl.debug_barrier()


@triton.jit
def forward_again(
    source, matrix, norm, table, trail, work, m, n, M: tl.constexpr, N: tl.constexpr, PRODUCTS: tl.constexpr,
    STEPS: tl.constexpr, RANKS: tl.constexpr, BLOCKS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Every step's X, A and P onto this program's trail; `work` holds the last X in full precision."""
    rows, inner = tl.arange(0, M), tl.arange(0, M)
    block, small = grid_of(rows, tl.arange(0, N), N), grid_of(rows, inner, M)
    AFTER: tl.constexpr = BLOCKS * M * N
    STEP: tl.constexpr = AFTER + 2 * M * M
    A = tl.zeros((M, M), tl.float32)
    for j in tl.range(0, BLOCKS, disable_licm=True):
        X = columns_of(source, matrix, j, m, n, M, N, PRODUCTS, RANKS) / (norm + EPSILON)
        x = X.to(PRODUCTS)
        tl.store(work + j * M * N + block, X)
        tl.store(trail + j * M * N + block, x)
        A = tl.dot(x, tl.trans(x), A, input_precision=PRECISION)
    for step in tl.range(0, STEPS, disable_licm=True):
        a, b, c = coefficients_of(table, step)
        here = trail + step * STEP
        tl.store(here + AFTER + small, A.to(PRODUCTS))
        # What one thread stored, another may load.
        tl.debug_barrier()
        P = (c * sum_of_products(here + AFTER, here + AFTER, (b / c) * A, M, SLICE)).to(PRODUCTS)
        tl.store(here + AFTER + M * M + small, P)
        A = tl.zeros((M, M), tl.float32)
        tl.debug_barrier()
        if step + 1 < STEPS:
            for j in tl.range(0, BLOCKS, disable_licm=True):
                x = tl.load(here + j * M * N + block)
                X = tl.load(work + j * M * N + block)
                X = tl.dot(P, x, a * X, input_precision=PRECISION)
                x = X.to(PRODUCTS)
                tl.store(work + j * M * N + block, X)
                tl.store(here + STEP + j * M * N + block, x)
                A = tl.dot(x, tl.trans(x), A, input_precision=PRECISION)


@triton.jit
def incoming_gradient(
    incoming, matrix, last, work, m, n, M: tl.constexpr, N: tl.constexpr, PRODUCTS: tl.constexpr,
    GRADIENT_RANKS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """G of length 1 into `work`; its product with the last step's X, at `last`, and its length (1 where that is 0)."""
    rows = tl.arange(0, M)
    block = grid_of(rows, tl.arange(0, N), N)
    squares = tl.zeros((M,), tl.float32)
    for j in tl.range(0, BLOCKS, disable_licm=True):
        G = columns_of(incoming, matrix, j, m, n, M, N, PRODUCTS, GRADIENT_RANKS)
        tl.store(work + j * M * N + block, G)
        squares += tl.sum(G * G, 1)
    size = tl.sqrt(tl.sum(squares, 0))
    size = tl.where(size > 0, size, 1.0)
    dP = tl.zeros((M, M), tl.float32)
    tl.debug_barrier()
    for j in tl.range(0, BLOCKS, disable_licm=True):
        G = tl.load(work + j * M * N + block) / size
        tl.store(work + j * M * N + block, G)
        x = tl.load(last + j * M * N + block)
        dP = tl.dot(G.to(PRODUCTS), tl.trans(x), dP, input_precision=PRECISION)
    return dP, size


@triton.jit
def back_through_steps(
    dP, table, trail, work, M: tl.constexpr, N: tl.constexpr, PRODUCTS: tl.constexpr, STEPS: tl.constexpr,
    BLOCKS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """G in `work` from behind the last step to before the first; its product with the first X."""
    rows, inner = tl.arange(0, M), tl.arange(0, M)
    block, small = grid_of(rows, tl.arange(0, N), N), grid_of(rows, inner, M)
    AFTER: tl.constexpr = BLOCKS * M * N
    STEP: tl.constexpr = AFTER + 2 * M * M
    spare = trail + STEPS * STEP
    for back in tl.range(0, STEPS, disable_licm=True):
        step = STEPS - 1 - back
        a, b, c = coefficients_of(table, step)
        here = trail + step * STEP
        before = trail + tl.maximum(step - 1, 0) * STEP
        E = dP + tl.trans(dP)
        tl.store(spare + small, E.to(PRODUCTS))
        tl.debug_barrier()
        D = sum_of_products(spare, here + AFTER, (b / c) * E, M, SLICE)
        D = sum_of_products(here + AFTER, spare, D, M, SLICE)
        # Beside P it would spill, so it is read again with every block.
        d = spare + M * M + small
        tl.store(d, (c * D).to(PRODUCTS))
        P = tl.load(here + AFTER + M * M + small)
        dP = tl.zeros((M, M), tl.float32)
        tl.debug_barrier()
        for j in tl.range(0, BLOCKS, disable_licm=True):
            G = tl.load(work + j * M * N + block)
            G = tl.dot(P, G.to(PRODUCTS), a * G, input_precision=PRECISION)
            G = tl.dot(tl.load(d), tl.load(here + j * M * N + block), G, input_precision=PRECISION)
            tl.store(work + j * M * N + block, G)
            x = tl.load(before + j * M * N + block)
            dP = tl.dot(G.to(PRODUCTS), tl.trans(x), dP, input_precision=PRECISION)
    return dP


@triton.jit
def backward_blocks(
    matrices,
    scales,
    coefficients,
    short,
    long,
    rank,
    gradients,
    gradient_scales,
    gradient_coefficients,
    gradient_short,
    gradient_long,
    gradient_rank,
    share,
    result,
    norms,
    table,
    trail,
    work,
    count,
    m,
    n,
    stride_matrix,
    stride_row,
    stride_column,
    gradient_stride_matrix,
    gradient_stride_row,
    gradient_stride_column,
    result_stride_matrix,
    result_stride_row,
    result_stride_column,
    M: tl.constexpr,
    N: tl.constexpr,
    PRODUCTS: tl.constexpr,
    STEPS: tl.constexpr,
    TURNS: tl.constexpr,
    RANKS: tl.constexpr,
    GRADIENT_RANKS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """By BLOCKS of N columns. trail [programs, STEPS (BLOCKS M N + 2 M M) + 2 M M] of PRODUCTS, a block's rows
    together, E and D at its end; work float32 [programs, BLOCKS M N], X and then G in full precision; otherwise as
    backward_whole."""
    rows, inner = tl.arange(0, M), tl.arange(0, M)
    block = grid_of(rows, tl.arange(0, N), N)
    source = (matrices, stride_matrix, stride_row, stride_column, scales, coefficients, short, long, rank, share)
    incoming = (
        gradients, gradient_stride_matrix, gradient_stride_row, gradient_stride_column, gradient_scales,
        gradient_coefficients, gradient_short, gradient_long, gradient_rank, share,
    )  # fmt: skip
    AFTER: tl.constexpr = BLOCKS * M * N
    STEP: tl.constexpr = AFTER + 2 * M * M
    SLICE: tl.constexpr = 32 if M > 32 else 16
    trail += tl.program_id(0).to(tl.int64) * (STEPS * STEP + 2 * M * M)
    work += tl.program_id(0).to(tl.int64) * AFTER
    # Not a while: what is hoisted out of one costs the registers that the products need.
    for turn in tl.range(0, TURNS, disable_licm=True):
        place = turn * tl.num_programs(0) + tl.program_id(0)
        if place < count:
            matrix = place.to(tl.int64)
            norm = tl.load(norms + matrix)
            forward_again(source, matrix, norm, table, trail, work, m, n, M, N, PRODUCTS, STEPS, RANKS, BLOCKS, SLICE)
            dP, size = incoming_gradient(
                incoming, matrix, trail + (STEPS - 1) * STEP, work, m, n, M, N, PRODUCTS, GRADIENT_RANKS, BLOCKS
            )
            dP = back_through_steps(dP, table, trail, work, M, N, PRODUCTS, STEPS, BLOCKS, SLICE)
            # Before the first step stands its own X: the diagonal of what was summed last is <dX, X>.
            radial = tl.sum(tl.sum(tl.where(rows[:, None] == inner[None, :], dP, 0.0), 1), 0)
            radial *= tl.where(norm > 0, (norm + EPSILON) / tl.where(norm > 0, norm, 1.0), 0.0)
            tl.debug_barrier()
            target = result + matrix * result_stride_matrix
            for j in tl.range(0, BLOCKS, disable_licm=True):
                X = columns_of(source, matrix, j, m, n, M, N, PRODUCTS, RANKS) / (norm + EPSILON)
                G = tl.load(work + j * M * N + block) - X * radial
                columns = j * N + tl.arange(0, N)
                inside = (rows < m)[:, None] & (columns < n)[None, :]
                at = places(rows, columns, result_stride_row, result_stride_column)
                tl.store(target + at, bounded(G * (size / (norm + EPSILON)), result), mask=inside)
            # The next matrix takes the same trail.
            tl.debug_barrier()
