"""What the kernels of the periodic chain share: their arguments, the sources' factors, a matrix with its writes.

Dims: N chunks, G = B x H memories, P matrices of a memory, all [F, D] here (V = D), C tokens, I sources, F hidden,
K writes of a chunk, J momenta formed of it (K, or K + 1 where the last token does not write).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from atlas_kernels.gpu.scan.pieces import Matrices, add_product, column, product, put, source_factors, tile


class Tables(NamedTuple):
    """What the gates say, as `writes.OrthogonalCoefficients`, and Newton-Schulz's coefficients."""

    alphas_pointer: Any  # [N, G, C]
    of_writes_pointer: Any  # [N, G, K, C]
    at_last_pointer: Any  # [N, G, K], of_writes of the last token
    thetas_pointer: Any  # [N, G, J]
    sums_pointer: Any  # [N, G, J, I]
    steps_pointer: Any  # [STEPS, 3]


class States(NamedTuple):
    """Slots: 0 the first chunk's anchor (of weights alone), n + 1 what enters chunk n. stack and norms by chunk."""

    weights_pointer: Any  # [N + 2, G, P, F, D]
    momenta_pointer: Any  # [N + 2, G, P, F, D]; without momentum the weights, of which S_k then takes nothing
    stack_pointer: Any  # [N, G, P, K, F, D] in PRODUCTS, the orthogonalised
    norms_pointer: Any  # [N, G, P, K], of the S_k
    o_pointer: Any  # [N, G, I, D], what the anchor gives to each source


class Factors(NamedTuple):
    """Scratch of each memory: the sides of its sources' outer products, of one chunk; x is the tokens'."""

    e_pointer: Any  # [G, I, D] float32, of the first matrix; of the others it is x
    wide_pointer: Any  # [G, P, I, F] in PRODUCTS


class Owed(NamedTuple):
    """What the reads' backward leaves to the chain's: the sides of the outer products that a read owes a matrix."""

    grad_read_pointer: Any  # [N, G, C, D], of the first matrix; of the others it is q
    wide_pointer: Any  # [N, G, P, C, F] in PRODUCTS: h of the read, gradients of z and of up


class ReadGradients(NamedTuple):
    grad_q_pointer: Any  # [N, G, C, D]
    grad_alphas_pointer: Any  # [N, G, C]
    grad_of_writes_pointer: Any  # [N, G, K, C]
    owed: Owed


class WriteGradients(NamedTuple):
    """Those of tables are parts, one a matrix."""

    grad_value_pointer: Any  # [N, G, I, D], of r - v with l2, of -v with dot
    grad_x_pointer: Any  # [N, G, I, D]
    grad_keep_pointer: Any  # [N, G, P], of the last token's alphas
    grad_at_last_pointer: Any  # [N, G, P, K]
    grad_thetas_pointer: Any  # [N, G, P, J]
    grad_sums_pointer: Any  # [N, G, P, J, I]
    # Two slots: 0 the first chunk's anchor, out; 1 in: of what leaves the segment, out: of what enters it.
    grad_weights_pointer: Any  # [2, G, P, F, D]
    grad_momenta_pointer: Any  # [G, P, F, D], in and out as slot 1; the weights' without momentum


class Scratch(NamedTuple):
    """Of each memory, for one chunk after the other."""

    factors: Factors
    trail_pointer: Any  # [G, TRAIL] of PRODUCTS, as in newton_schulz/backward.py
    work_pointer: Any  # [G, D padded x columns] float32
    formed_pointer: Any  # [G, K, F, D], gradients of one matrix's S_k
    # Gradients of the wide factors; of the second and third then of z and up, without what passes through o.
    grad_wide_pointer: Any  # [G, P, I, F] float32


class Shape(NamedTuple):
    """S of the kernels; widths are padded to powers of two."""

    D: int
    V: int  # = D, as BLOCK_V = BLOCK_D: the scan's pieces know it
    F: int
    LAYER: bool
    L2: bool
    MOMENTUM: bool
    GATED: bool
    PARTS: int  # P
    PRODUCTS: tl.dtype
    STEPS: int
    TURNS: int  # a power of two that holds N, so that few lengths compile anew
    WRITES: int  # K
    FORMED: int  # J
    BLOCK_I: int  # sources at a time
    TILES: int  # of them
    BLOCK_D: int
    BLOCK_V: int
    BLOCK_C: int
    BLOCK_J: int  # holds J
    BLOCK_F: int  # hidden rows at a time
    BLOCK_N: int  # columns of X at a time
    BLOCKS: int  # of them
    RANKS_I: int  # blocks of the outer products of the sources
    RANKS_C: int  # and of the reads
    APART: bool = False  # of the scan's pieces, whose 64 rows eight warps would multiply twice
    SHARE: float = 0.0  # of the gradient through the anchor
    KEEP: bool = False  # what the backward takes


@triton.jit
def parts_of(pointer, at, S: tl.constexpr):
    """Pointers at the matrices of place `at` of [places, P, F, D]; of two the second stands for a third."""
    SIZE: tl.constexpr = S.F * S.D
    pointer += at * S.PARTS * SIZE
    return Matrices(pointer, pointer + SIZE, pointer + (S.PARTS - 1) * SIZE)


@triton.jit
def stack_of(pointer, at, S: tl.constexpr):
    """As `parts_of`, of [places, P, K, F, D]."""
    SIZE: tl.constexpr = S.WRITES * S.F * S.D
    pointer += at * S.PARTS * SIZE
    return Matrices(pointer, pointer + SIZE, pointer + (S.PARTS - 1) * SIZE)


@triton.jit
def write_factors(factors, anchors, x, e, g, at, S: tl.constexpr):
    """e and the factors of some sources, x [i, D] in PRODUCTS, at the anchor, into memory g's scratch. at: i, and I."""
    i, I = at  # noqa: E741
    d = tl.arange(0, S.BLOCK_D)
    put(factors.e_pointer + g * I * S.D, e, i, d, I, S.D)
    e = e.to(S.PRODUCTS)
    wide = factors.wide_pointer + g * S.PARTS * I * S.F
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        h, factor, factor_up = source_factors(anchors, x, e, f, d, d, S)
        put(wide, h.to(S.PRODUCTS), i, f, I, S.F)
        put(wide + I * S.F, factor.to(S.PRODUCTS), i, f, I, S.F)
        if S.GATED:
            put(wide + 2 * I * S.F, factor_up.to(S.PRODUCTS), i, f, I, S.F)


@triton.jit
def found_in(q, pointers, gates, at, t, S: tl.constexpr):
    """What q [C, d] finds in a matrix with its writes: alphas W q + sum_k of_writes_k O_k q [C, f].

    pointers: at W and at its O_k; gates: alphas [C, 1], the pointer at of_writes [K, C], C; at: rows f and columns d;
    t: rows of q.
    """
    w_pointer, stack_pointer = pointers
    alphas, of_writes_pointer, C = gates
    f, d = at
    met = product(alphas * q, tl.trans(tile(w_pointer, f, d, S.F, S.D)), S)
    for k in tl.range(0, S.WRITES, disable_licm=True):
        seen = column(of_writes_pointer + k * C, t, C) * q
        met = add_product(met, seen, tl.trans(tile(stack_pointer + k * S.F * S.D, f, d, S.F, S.D)), S)
    return met
