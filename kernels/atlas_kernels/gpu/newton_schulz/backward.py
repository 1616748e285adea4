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

S and G may both be formed here from their factors, as in forward.py; S twice, at 2 R m n FLOPs each.
The gradient of Newton-Schulz is linear in what comes in, which is scaled to |G|_F = 1 first: in float16 it would
vanish otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from atlas_kernels.gpu.newton_schulz.forward import (
    EPSILON,
    PRECISION,
    coefficients_of,
    columns_of,
    places,
    polynomial,
)


class Scratch(NamedTuple):
    """Memory of each program, which its next matrix takes again. AFTER = M N, or BLOCKS M N of backward_blocks."""

    trail_pointer: Any  # [programs, STEPS, AFTER + 2 M M] of PRODUCTS; by blocks [2 M M] after each program's steps
    work_pointer: Any  # [programs, AFTER] float32, X and then G in full precision; None of backward_whole


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
def sum_of_products(left_pointer, right_pointer, total, M: tl.constexpr):
    """total + left right [M, M], read from memory by slices of the inner side: whole, they would spill at M = 128."""
    SLICE: tl.constexpr = 32 if M > 32 else 16
    rows, slice = tl.arange(0, M), tl.arange(0, SLICE)
    for k in tl.range(0, M // SLICE, disable_licm=True):
        across = tl.load(left_pointer + grid_of(rows, k * SLICE + slice, M))
        down = tl.load(right_pointer + grid_of(k * SLICE + slice, rows, M))
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
    matrices,  # Matrices
    gradients,  # Matrices, of what comes in
    result,  # Strided, out
    norms_pointer,  # [matrices] float32, of the forward
    table_pointer,  # [steps, 3] float32
    scratch,  # Scratch
    sizes,  # Sizes
    S: tl.constexpr,  # Constants
):
    """All of X, then of G, on chip."""
    rows, columns, inner = tl.arange(0, S.M), tl.arange(0, S.N), tl.arange(0, S.M)
    inside = (rows < sizes.m)[:, None] & (columns < sizes.n)[None, :]
    wide, small = grid_of(rows, columns, S.N), grid_of(rows, inner, S.M)
    STEP: tl.constexpr = S.M * S.N + 2 * S.M * S.M
    trail = scratch.trail_pointer + tl.program_id(0).to(tl.int64) * S.STEPS * STEP
    # Not a while: what is hoisted out of one costs the registers that the products need.
    for turn in tl.range(0, S.TURNS, disable_licm=True):
        place = turn * tl.num_programs(0) + tl.program_id(0)
        if place < sizes.count:
            matrix = place.to(tl.int64)
            norm = tl.load(norms_pointer + matrix)
            X = columns_of(matrices, matrix, 0, sizes, S.M, S.N, S.PRODUCTS) / (norm + EPSILON)
            for step in tl.range(0, S.STEPS, disable_licm=True):
                a, b, c = coefficients_of(table_pointer, step)
                here = trail + step * STEP
                x = X.to(S.PRODUCTS)
                A = tl.dot(x, tl.trans(x), input_precision=PRECISION)
                P = polynomial(A, b, c, S.PRODUCTS)
                tl.store(here + wide, x)
                tl.store(here + S.M * S.N + small, A.to(S.PRODUCTS))
                tl.store(here + S.M * S.N + S.M * S.M + small, P)
                X = tl.dot(P, x, a * X, input_precision=PRECISION)
            G = columns_of(gradients, matrix, 0, sizes, S.M, S.N, S.PRODUCTS)
            size = tl.sqrt(tl.sum(G * G))
            size = tl.where(size > 0, size, 1.0)
            G = G / size
            # What one thread stored, another may load.
            tl.debug_barrier()
            for back in tl.range(0, S.STEPS, disable_licm=True):
                step = S.STEPS - 1 - back
                a, b, c = coefficients_of(table_pointer, step)
                here = trail + step * STEP
                x = tl.load(here + wide)
                A = tl.load(here + S.M * S.N + small)
                P = tl.load(here + S.M * S.N + S.M * S.M + small)
                g = G.to(S.PRODUCTS)
                D = through_step(tl.dot(g, tl.trans(x), input_precision=PRECISION), A, b, c, S.PRODUCTS)
                G = tl.dot(P, g, a * G, input_precision=PRECISION)
                G = tl.dot(D, x, G, input_precision=PRECISION)
            X = columns_of(matrices, matrix, 0, sizes, S.M, S.N, S.PRODUCTS) / (norm + EPSILON)
            radial = tl.sum(G * X) * tl.where(norm > 0, (norm + EPSILON) / tl.where(norm > 0, norm, 1.0), 0.0)
            target = result.pointer + matrix * result.stride_matrix
            target += places(rows, columns, result.stride_row, result.stride_column)
            tl.store(target, bounded((G - X * radial) * (size / (norm + EPSILON)), result.pointer), mask=inside)
            # The next matrix takes the same trail.
            tl.debug_barrier()


@triton.jit
def forward_again(matrices, matrix, norm, table_pointer, scratch, sizes, S: tl.constexpr):
    """Every step's X, A and P onto this program's trail; its work holds the last X in full precision."""
    trail, work = scratch.trail_pointer, scratch.work_pointer
    rows, inner = tl.arange(0, S.M), tl.arange(0, S.M)
    block, small = grid_of(rows, tl.arange(0, S.N), S.N), grid_of(rows, inner, S.M)
    AFTER: tl.constexpr = S.BLOCKS * S.M * S.N
    STEP: tl.constexpr = AFTER + 2 * S.M * S.M
    A = tl.zeros((S.M, S.M), tl.float32)
    for j in tl.range(0, S.BLOCKS, disable_licm=True):
        X = columns_of(matrices, matrix, j, sizes, S.M, S.N, S.PRODUCTS) / (norm + EPSILON)
        x = X.to(S.PRODUCTS)
        tl.store(work + j * S.M * S.N + block, X)
        tl.store(trail + j * S.M * S.N + block, x)
        A = tl.dot(x, tl.trans(x), A, input_precision=PRECISION)
    for step in tl.range(0, S.STEPS, disable_licm=True):
        a, b, c = coefficients_of(table_pointer, step)
        here = trail + step * STEP
        tl.store(here + AFTER + small, A.to(S.PRODUCTS))
        # What one thread stored, another may load.
        tl.debug_barrier()
        P = (c * sum_of_products(here + AFTER, here + AFTER, (b / c) * A, S.M)).to(S.PRODUCTS)
        tl.store(here + AFTER + S.M * S.M + small, P)
        A = tl.zeros((S.M, S.M), tl.float32)
        tl.debug_barrier()
        if step + 1 < S.STEPS:
            for j in tl.range(0, S.BLOCKS, disable_licm=True):
                x = tl.load(here + j * S.M * S.N + block)
                X = tl.load(work + j * S.M * S.N + block)
                X = tl.dot(P, x, a * X, input_precision=PRECISION)
                x = X.to(S.PRODUCTS)
                tl.store(work + j * S.M * S.N + block, X)
                tl.store(here + STEP + j * S.M * S.N + block, x)
                A = tl.dot(x, tl.trans(x), A, input_precision=PRECISION)


@triton.jit
def incoming_gradient(gradients, matrix, last, work, sizes, S: tl.constexpr):
    """G of length 1 at `work`; its product with the last step's X, at `last`, and its length (1 where that is 0)."""
    rows = tl.arange(0, S.M)
    block = grid_of(rows, tl.arange(0, S.N), S.N)
    squares = tl.zeros((S.M,), tl.float32)
    for j in tl.range(0, S.BLOCKS, disable_licm=True):
        G = columns_of(gradients, matrix, j, sizes, S.M, S.N, S.PRODUCTS)
        tl.store(work + j * S.M * S.N + block, G)
        squares += tl.sum(G * G, 1)
    size = tl.sqrt(tl.sum(squares, 0))
    size = tl.where(size > 0, size, 1.0)
    dP = tl.zeros((S.M, S.M), tl.float32)
    tl.debug_barrier()
    for j in tl.range(0, S.BLOCKS, disable_licm=True):
        G = tl.load(work + j * S.M * S.N + block) / size
        tl.store(work + j * S.M * S.N + block, G)
        x = tl.load(last + j * S.M * S.N + block)
        dP = tl.dot(G.to(S.PRODUCTS), tl.trans(x), dP, input_precision=PRECISION)
    return dP, size


@triton.jit
def back_through_steps(dP, table_pointer, scratch, S: tl.constexpr):
    """G in this program's work from behind the last step to before the first; its product with the first X."""
    trail, work = scratch.trail_pointer, scratch.work_pointer
    rows, inner = tl.arange(0, S.M), tl.arange(0, S.M)
    block, small = grid_of(rows, tl.arange(0, S.N), S.N), grid_of(rows, inner, S.M)
    AFTER: tl.constexpr = S.BLOCKS * S.M * S.N
    STEP: tl.constexpr = AFTER + 2 * S.M * S.M
    spare = trail + S.STEPS * STEP
    for back in tl.range(0, S.STEPS, disable_licm=True):
        step = S.STEPS - 1 - back
        a, b, c = coefficients_of(table_pointer, step)
        here = trail + step * STEP
        before = trail + tl.maximum(step - 1, 0) * STEP
        E = dP + tl.trans(dP)
        tl.store(spare + small, E.to(S.PRODUCTS))
        tl.debug_barrier()
        D = sum_of_products(spare, here + AFTER, (b / c) * E, S.M)
        D = sum_of_products(here + AFTER, spare, D, S.M)
        # Beside P it would spill, so it is read again with every block.
        d = spare + S.M * S.M + small
        tl.store(d, (c * D).to(S.PRODUCTS))
        P = tl.load(here + AFTER + S.M * S.M + small)
        dP = tl.zeros((S.M, S.M), tl.float32)
        tl.debug_barrier()
        for j in tl.range(0, S.BLOCKS, disable_licm=True):
            G = tl.load(work + j * S.M * S.N + block)
            G = tl.dot(P, G.to(S.PRODUCTS), a * G, input_precision=PRECISION)
            G = tl.dot(tl.load(d), tl.load(here + j * S.M * S.N + block), G, input_precision=PRECISION)
            tl.store(work + j * S.M * S.N + block, G)
            x = tl.load(before + j * S.M * S.N + block)
            dP = tl.dot(G.to(S.PRODUCTS), tl.trans(x), dP, input_precision=PRECISION)
    return dP


@triton.jit
def gradient_by_blocks(sources, matrix, norms_pointer, result, table_pointer, own, sizes, S: tl.constexpr):
    """The gradient of one matrix, in its place of `result`. sources: `Matrices` of S and of what comes in, not kept in
    variables, which would make numbers of their constants; own: the `Scratch` of this program."""
    rows, inner = tl.arange(0, S.M), tl.arange(0, S.M)
    block = grid_of(rows, tl.arange(0, S.N), S.N)
    AFTER: tl.constexpr = S.BLOCKS * S.M * S.N
    STEP: tl.constexpr = AFTER + 2 * S.M * S.M
    trail, work = own.trail_pointer, own.work_pointer
    norm = tl.load(norms_pointer + matrix)
    forward_again(sources[0], matrix, norm, table_pointer, own, sizes, S)
    dP, size = incoming_gradient(sources[1], matrix, trail + (S.STEPS - 1) * STEP, work, sizes, S)
    dP = back_through_steps(dP, table_pointer, own, S)
    # Before the first step stands its own X: the diagonal of what was summed last is <dX, X>.
    radial = tl.sum(tl.sum(tl.where(rows[:, None] == inner[None, :], dP, 0.0), 1), 0)
    radial *= tl.where(norm > 0, (norm + EPSILON) / tl.where(norm > 0, norm, 1.0), 0.0)
    tl.debug_barrier()
    target = result.pointer + matrix * result.stride_matrix
    for j in tl.range(0, S.BLOCKS, disable_licm=True):
        X = columns_of(sources[0], matrix, j, sizes, S.M, S.N, S.PRODUCTS) / (norm + EPSILON)
        G = tl.load(work + j * S.M * S.N + block) - X * radial
        columns = j * S.N + tl.arange(0, S.N)
        inside = (rows < sizes.m)[:, None] & (columns < sizes.n)[None, :]
        at = places(rows, columns, result.stride_row, result.stride_column)
        tl.store(target + at, bounded(G * (size / (norm + EPSILON)), result.pointer), mask=inside)


@triton.jit
def backward_blocks(
    matrices,  # Matrices
    gradients,  # Matrices, of what comes in
    result,  # Strided, out
    norms_pointer,  # [matrices] float32, of the forward
    table_pointer,  # [steps, 3] float32
    scratch,  # Scratch
    sizes,  # Sizes
    S: tl.constexpr,  # Constants
):
    """By BLOCKS of N columns, a block's rows together in `scratch`, and E and D at the end of the trail; otherwise as
    backward_whole."""
    AFTER: tl.constexpr = S.BLOCKS * S.M * S.N
    STEP: tl.constexpr = AFTER + 2 * S.M * S.M
    trail = scratch.trail_pointer + tl.program_id(0).to(tl.int64) * (S.STEPS * STEP + 2 * S.M * S.M)
    work = scratch.work_pointer + tl.program_id(0).to(tl.int64) * AFTER
    own = Scratch(trail, work)
    # Not a while: what is hoisted out of one costs the registers that the products need.
    for turn in tl.range(0, S.TURNS, disable_licm=True):
        place = turn * tl.num_programs(0) + tl.program_id(0)
        if place < sizes.count:
            matrix = place.to(tl.int64)
            gradient_by_blocks((matrices, gradients), matrix, norms_pointer, result, table_pointer, own, sizes, S)
            # The next matrix takes the same trail.
            tl.debug_barrier()
