"""Products with a stack of matrices M_k [wide, narrow] that the tokens of a chunk see with weights of their own.

The matrices are those that a chunk's writing tokens have orthogonalised, or the gradients of their momenta; beside them
stands a base B, the weights of the chunk's start or what its last token leaves. Of one memory, T tokens, K matrices:

    through    out_t = a_t B x_t + sum_k w_kt M_k x_t           (or with the transposes)
    meet       scores_kt = wide_t . M_k narrow_t,   inner_k = <B, M_k>
    total      out = a B + sum_k w_k M_k
    form       out_k = s_k B + sum_r c_kr wide_r narrow_r^T

Every gradient of one is another of them. A chunk of a memory with F = 256, D = V = 64, C = 64 and 79 sources, with a
write at each of K tokens, by count, for one of its matrices (E: bytes of an element of the stack):

    kernel        programs                   MFLOP  device memory, KB        held on chip
    through       128 tokens, 16 columns     2.1 K  16 E K stack, 80 tokens  x [64, 64], three matrices' columns
                  where F, D <= 64, else 32                                  on their way, out
    sides         the same, both ways        5.2 K  16 E K stack (twice,     the same
                                                    from L2), 200 tokens
    meet          four matrices; one the     2.6 K  16 E K stack, 25 K       narrow [C, 64], scores [C]
                  base, or S's gradient             tokens (L2)
    total         256 elements               0.03 K 16 E K stack, 128 base   16 matrices' block
    form          64 rows                    2.6    128 base, 100 factors    a block [64, 64]
    leave         those of total and form
    act_backward  1024 elements              -      4 (C F) of 3 or 4 passes

`through` sums over the matrices inside of one program, in their order: what is several programs' is the columns, so
nothing is added between programs. Weights are applied to what comes out, [C, 16], in place of the larger x; loads of
the next matrices run beside a product. Chunks of 64 fit one program's tokens, so a causal half of the products meets
weights of zero; they are not left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from atlas_kernels.gpu.newton_schulz.forward import Sizes, columns_of, places
from atlas_kernels.gpu.scan.pieces import column, gelu_curve, gelu_slope, put, tile


class Stack(NamedTuple):
    """The matrices of G memories and what each token sees of them."""

    base_pointer: Any  # [G, F, D]
    alphas_pointer: Any  # [G, T], of the base; None: every token sees it as it stands
    stack_pointer: Any  # [G, K, F, D]
    weights_pointer: Any  # [G, K, T], of the stack


class Seen(NamedTuple):
    """What `through_kernel` gives."""

    out_pointer: Any  # [G, T, A], the activation's argument where there is one
    h_pointer: Any = None  # [G, T, A], the activation
    slope_pointer: Any = None  # [G, T, A], its derivative


class Met(NamedTuple):
    """The matrices of `meet_kernel`, [G, K, F, D] and [G, F, D], and the B of the inner products."""

    stack_pointer: Any
    last_pointer: Any
    base_pointer: Any


class Scores(NamedTuple):
    """What `meet_kernel` gives, of the stack and of the last matrix."""

    scores_pointer: Any  # [G, K, T]
    inner_pointer: Any  # [G, K]
    last_scores_pointer: Any  # [G, T]
    last_inner_pointer: Any  # [G]


class Through(NamedTuple):
    """S of `through_kernel` and `sides_kernel`."""

    F: int
    D: int
    WIDENS: bool
    ACT: bool
    SLOPE: bool
    BLOCK_T: int
    BLOCK_A: int  # of what comes out
    BLOCK_F: int  # of what goes in
    BLOCK_D: int
    TURNS: int  # a power of two that holds K, or 0
    PRODUCTS: tl.dtype


class Meet(NamedTuple):
    """S of `meet_kernel`."""

    F: int
    D: int
    BLOCK_T: int
    BLOCK_F: int
    BLOCK_D: int
    BATCH: int  # matrices of a program
    PRODUCTS: tl.dtype


class Leave(NamedTuple):
    """S of `leave_kernel`, `total_kernel` and `form_kernel`."""

    F: int
    D: int
    BLOCK: int  # elements of a total
    BLOCK_K: int  # matrices that are added at once
    TURNS: int  # of so many
    BLOCK_F: int
    BLOCK_D: int
    RANKS: int  # blocks of the outer products
    PRODUCTS: tl.dtype


class Act(NamedTuple):
    """S of `act_backward_kernel`."""

    BLOCK: int
    PRODUCTS: tl.dtype


@triton.jit
def through_tile(x_pointer, stack, at, T, K, WIDENS: tl.constexpr, S: tl.constexpr):
    """Tokens t and columns a of `through` [t, a]; at: (g, t, a)."""
    g, t, a = at
    A: tl.constexpr = S.F if WIDENS else S.D
    B: tl.constexpr = S.D if WIDENS else S.F
    BLOCK: tl.constexpr = S.BLOCK_D if WIDENS else S.BLOCK_F
    out = tl.zeros([S.BLOCK_T, S.BLOCK_A], tl.float32)
    for start in tl.range(0, B, BLOCK, disable_licm=True):
        b = start + tl.arange(0, BLOCK)
        x = tile(x_pointer + g * T * B, t, b, T, B).to(S.PRODUCTS)
        if WIDENS:
            place = b[:, None] + a[None, :] * S.D
        else:
            place = b[:, None] * S.D + a[None, :]
        inside = (b[:, None] < B) & (a[None, :] < A)
        base = tl.load(stack.base_pointer + g * A * B + place, mask=inside, other=0.0)
        met = tl.dot(x, base.to(S.PRODUCTS), input_precision="ieee")
        if stack.alphas_pointer is not None:
            met *= column(stack.alphas_pointer + g * T, t, T)
        out += met
        if S.TURNS > 0:
            for k in tl.range(0, S.TURNS, num_stages=3):
                at_k = g * K + k
                matrix = tl.load(stack.stack_pointer + at_k * A * B + place, mask=inside & (k < K), other=0.0)
                weights = tl.load(stack.weights_pointer + at_k * T + t, mask=(t < T) & (k < K), other=0.0)[:, None]
                met = tl.dot(x, matrix.to(S.PRODUCTS), input_precision="ieee")
                # A token that sees nothing of a matrix sees no NaN of it. A weight that is NaN comes through.
                out += tl.where(weights != 0.0, weights * met, 0.0)
    return out


@triton.jit
def through_kernel(
    x_pointer,  # [G, T, B]
    stack,  # Stack
    seen,  # Seen, out
    T,
    K,
    S: tl.constexpr,  # Through
):
    blocks = tl.cdiv(T, S.BLOCK_T)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * S.BLOCK_T + tl.arange(0, S.BLOCK_T)
    a = tl.program_id(1) * S.BLOCK_A + tl.arange(0, S.BLOCK_A)
    A: tl.constexpr = S.F if S.WIDENS else S.D
    out = through_tile(x_pointer, stack, (g, t, a), T, K, S.WIDENS, S)
    put(seen.out_pointer + g * T * A, out, t, a, T, A)
    if S.ACT:
        h, slope = gelu_slope(out, S.PRODUCTS)
        put(seen.h_pointer + g * T * A, h, t, a, T, A)
        if S.SLOPE:
            put(seen.slope_pointer + g * T * A, slope, t, a, T, A)


@triton.jit
def sides_kernel(
    wide_pointer,  # [G, T, F]
    narrow_pointer,  # [G, T, D]
    stack,  # Stack
    grad_wide_pointer,  # out: [G, T, F], `through` of narrow
    grad_narrow_pointer,  # out: [G, T, D], of wide
    T,
    K,
    S: tl.constexpr,  # Through
):
    """`through` both ways: what outer products wide narrow^T have of the gradients of what they are summed to."""
    blocks = tl.cdiv(T, S.BLOCK_T)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * S.BLOCK_T + tl.arange(0, S.BLOCK_T)
    first: tl.constexpr = (S.F + S.BLOCK_A - 1) // S.BLOCK_A
    if tl.program_id(1) < first:
        a = tl.program_id(1) * S.BLOCK_A + tl.arange(0, S.BLOCK_A)
        out = through_tile(narrow_pointer, stack, (g, t, a), T, K, True, S)
        put(grad_wide_pointer + g * T * S.F, out, t, a, T, S.F)
    else:
        a = (tl.program_id(1) - first) * S.BLOCK_A + tl.arange(0, S.BLOCK_A)
        out = through_tile(wide_pointer, stack, (g, t, a), T, K, False, S)
        put(grad_narrow_pointer + g * T * S.D, out, t, a, T, S.D)


@triton.jit
def met_tile(matrix_pointer, base_pointer, wide_pointer, narrow, t, inside, T, S: tl.constexpr):
    """Of one matrix at `matrix_pointer`: (scores [t], <B, M>); nothing where not inside."""
    d = tl.arange(0, S.BLOCK_D)
    scores, inner = tl.zeros([S.BLOCK_T], tl.float32), tl.zeros([S.BLOCK_F], tl.float32)
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        mask = inside & (f[:, None] < S.F) & (d[None, :] < S.D)
        matrix = tl.load(matrix_pointer + f[:, None] * S.D + d[None, :], mask=mask, other=0.0)
        met = tl.dot(narrow, tl.trans(matrix.to(S.PRODUCTS)), input_precision="ieee")
        scores += tl.sum(met * tile(wide_pointer, t, f, T, S.F), 1)
        inner += tl.sum(matrix.to(tl.float32) * tile(base_pointer, f, d, S.F, S.D), 1)
    return scores, tl.sum(inner, 0)


@triton.jit
def meet_kernel(
    wide_pointer,  # [G, T, F]
    narrow_pointer,  # [G, T, D]
    matrices,  # Met
    found,  # Scores, out
    T,
    K,
    S: tl.constexpr,  # Meet
):
    groups = tl.cdiv(K, S.BATCH) + 1
    g = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    t, d = tl.program_id(1) * S.BLOCK_T + tl.arange(0, S.BLOCK_T), tl.arange(0, S.BLOCK_D)
    first = tl.program_id(1) == 0
    narrow = tile(narrow_pointer + g * T * S.D, t, d, T, S.D).to(S.PRODUCTS)
    wide_at, base_at = wide_pointer + g * T * S.F, matrices.base_pointer + g * S.F * S.D
    if group == groups - 1:
        last_at = matrices.last_pointer + g * S.F * S.D
        scores, inner = met_tile(last_at, base_at, wide_at, narrow, t, group >= 0, T, S)
        tl.store(found.last_scores_pointer + g * T + t, scores, mask=t < T)
        tl.store(found.last_inner_pointer + g, inner, mask=first)
    else:
        for turn in tl.range(0, S.BATCH, disable_licm=True):
            k = group * S.BATCH + turn
            at = g * K + k
            matrix_at = matrices.stack_pointer + at * S.F * S.D
            scores, inner = met_tile(matrix_at, base_at, wide_at, narrow, t, k < K, T, S)
            tl.store(found.scores_pointer + at * T + t, scores, mask=(t < T) & (k < K))
            tl.store(found.inner_pointer + at, inner, mask=first & (k < K))


@triton.jit
def total_block(stack, out_pointer, g, block, K, S: tl.constexpr):
    """A block of alphas B + sum_k weights_k M_k, of one token."""
    i = block * S.BLOCK + tl.arange(0, S.BLOCK)
    SIZE: tl.constexpr = S.F * S.D
    base = tl.load(stack.base_pointer + g * SIZE + i, mask=i < SIZE, other=0.0)
    out = tl.load(stack.alphas_pointer + g) * base
    if S.TURNS > 0:
        for turn in tl.range(0, S.TURNS, disable_licm=True):
            k = turn * S.BLOCK_K + tl.arange(0, S.BLOCK_K)
            weights = tl.load(stack.weights_pointer + g * K + k, mask=k < K, other=0.0)
            inside = (k < K)[:, None] & (i < SIZE)[None, :]
            matrices = tl.load(stack.stack_pointer + (g * K + k)[:, None] * SIZE + i[None, :], mask=inside, other=0.0)
            out += tl.sum(weights[:, None] * matrices.to(tl.float32), 0)
    tl.store(out_pointer + g * SIZE + i, out, mask=i < SIZE)


@triton.jit
def form_block(outer, out_pointer, g, j, S: tl.constexpr):
    """Rows block j of scales B + sum_r coefficients_r wide_r narrow_r^T; outer: Matrices [D, F]."""
    out = columns_of(outer, g, j, Sizes(1, S.D, S.F, 1), S.BLOCK_D, S.BLOCK_F, S.PRODUCTS)
    d, f = tl.arange(0, S.BLOCK_D), j * S.BLOCK_F + tl.arange(0, S.BLOCK_F)
    inside = (d < S.D)[:, None] & (f < S.F)[None, :]
    tl.store(out_pointer + g * S.F * S.D + places(d, f, 1, S.D), out, mask=inside)


@triton.jit
def total_kernel(
    stack,  # Stack of one token
    out_pointer,  # out: [G, F, D]
    K,
    S: tl.constexpr,  # Leave
):
    total_block(stack, out_pointer, tl.program_id(0).to(tl.int64), tl.program_id(1), K, S)


@triton.jit
def form_kernel(
    outer,  # Matrices
    out_pointer,  # out: [G, F, D]
    S: tl.constexpr,  # Leave
):
    form_block(outer, out_pointer, tl.program_id(0).to(tl.int64), tl.program_id(1), S)


@triton.jit
def leave_kernel(
    stack,  # Stack of one token
    outer,  # Matrices
    written_pointer,  # out: [G, F, D], the total
    moved_pointer,  # out: [G, F, D], what is formed
    K,
    S: tl.constexpr,  # Leave
):
    g = tl.program_id(0).to(tl.int64)
    totals: tl.constexpr = (S.F * S.D + S.BLOCK - 1) // S.BLOCK
    if tl.program_id(1) < totals:
        total_block(stack, written_pointer, g, tl.program_id(1), K, S)
    else:
        form_block(outer, moved_pointer, g, tl.program_id(1) - totals, S)


@triton.jit
def act_backward_kernel(
    z_pointer,  # [SIZE]
    grad_h_pointer,  # [SIZE]
    grad_slope_pointer,  # [SIZE], None where the slope was not asked for
    out_pointer,  # out: [SIZE], z's gradient
    SIZE,
    S: tl.constexpr,  # Act
):
    i = tl.program_id(0).to(tl.int64) * S.BLOCK + tl.arange(0, S.BLOCK)
    inside = i < SIZE
    _, slope, curve = gelu_curve(tl.load(z_pointer + i, mask=inside, other=0.0), S.PRODUCTS)
    grad = slope * tl.load(grad_h_pointer + i, mask=inside, other=0.0)
    if grad_slope_pointer is not None:
        grad += curve * tl.load(grad_slope_pointer + i, mask=inside, other=0.0)
    tl.store(out_pointer + i, grad, mask=inside)
