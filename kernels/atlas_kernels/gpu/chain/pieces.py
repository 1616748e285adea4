"""What the kernels of the periodic chain share: their arguments, what the anchor gives, a matrix with its writes.

Dims: N chunks, G = B x H memories, C tokens, I sources, D lifted key, V value, F hidden, K writes of a chunk, J momenta
formed of it (K, or K + 1 where the last token does not write), P matrices of a memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from atlas_kernels.gpu.newton_schulz.forward import Matrices as Formed
from atlas_kernels.gpu.newton_schulz.forward import Strided
from atlas_kernels.gpu.scan.pieces import Matrices, add_product, column, gelu, product, put, source_factors, tile


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

    weights: Matrices  # [N + 2, G, F, ...]
    momenta: Matrices  # [N + 2, G, F, ...]; without momentum the weights, of which S_k then takes nothing
    stack: Matrices  # [N, G, K, F, ...] in PRODUCTS, the orthogonalised
    norms_pointer: Any  # [N, G, P, K], of the S_k
    o_pointer: Any  # [N, G, I, V], what the anchor gives to each source


class Factors(NamedTuple):
    """Scratch of each memory: the two sides of its sources' outer products, of one chunk; x is the tokens'."""

    h_pointer: Any  # [G, I, F] in PRODUCTS, with e, as the next two with x
    factor_pointer: Any
    factor_up_pointer: Any  # None without a gate
    e_pointer: Any  # [G, I, V] float32


class Owed(NamedTuple):
    """What the reads' backward leaves to the chain's: both sides of the outer products that a read owes a matrix."""

    grad_read_pointer: Any  # [N, G, C, V]
    h_pointer: Any  # [N, G, C, F] in PRODUCTS, as the next two
    grad_z_pointer: Any
    grad_up_pointer: Any  # None without a gate


class ReadGradients(NamedTuple):
    grad_q_pointer: Any  # [N, G, C, D]
    grad_alphas_pointer: Any  # [N, G, C]
    grad_of_writes_pointer: Any  # [N, G, K, C]
    owed: Owed


class WriteGradients(NamedTuple):
    """Those of tables are parts, one a matrix."""

    grad_value_pointer: Any  # [N, G, I, V], of r - v with l2, of -v with dot
    grad_x_pointer: Any  # [N, G, I, D]
    grad_keep_pointer: Any  # [N, G, P], of the last token's alphas
    grad_at_last_pointer: Any  # [N, G, P, K]
    grad_thetas_pointer: Any  # [N, G, P, J]
    grad_sums_pointer: Any  # [N, G, P, J, I]
    # Two slots: 0 the first chunk's anchor, out; 1 in: of what leaves the segment, out: of what enters it.
    grad_weights: Matrices
    grad_momenta: Matrices | None  # one slot, in and out as slot 1; None without momentum


class Scratch(NamedTuple):
    """Of each memory, for one chunk after the other."""

    factors: Factors
    trail_pointer: Any  # [G, TRAIL] of PRODUCTS, as in newton_schulz/backward.py
    work_pointer: Any  # [G, M x columns] float32
    grad_momenta_pointer: Any  # [G, K, F, wider of D and V]: gradients of one matrix's S_k
    grad_h_pointer: Any  # [G, I, F] float32, gradients of the factors
    grad_factor_pointer: Any  # and then of z, without what passes through o
    grad_factor_up_pointer: Any  # and then of up; None without a gate


class Shape(NamedTuple):
    """S of the kernels; widths are padded to powers of two."""

    D: int
    V: int
    F: int
    LAYER: bool
    L2: bool
    MOMENTUM: bool
    GATED: bool
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
    SHARE: float = 0.0  # of the gradient through the anchor
    KEEP: bool = False  # what the backward takes


@triton.jit
def write_factors(factors, anchors, x, e, g, at, S: tl.constexpr):
    """e and the factors of some sources, x [i, D] in PRODUCTS, at the anchor, into memory g's scratch. at: i, and I."""
    i, I = at  # noqa: E741
    d, c = tl.arange(0, S.BLOCK_D), tl.arange(0, S.BLOCK_V)
    put(factors.e_pointer + g * I * S.V, e, i, c, I, S.V)
    e = e.to(S.PRODUCTS)
    for start in tl.range(0, S.F, S.BLOCK_F, disable_licm=True):
        f = start + tl.arange(0, S.BLOCK_F)
        h, factor, factor_up = source_factors(anchors, x, e, f, d, c, S)
        put(factors.h_pointer + g * I * S.F, h.to(S.PRODUCTS), i, f, I, S.F)
        put(factors.factor_pointer + g * I * S.F, factor.to(S.PRODUCTS), i, f, I, S.F)
        if S.GATED:
            put(factors.factor_up_pointer + g * I * S.F, factor_up.to(S.PRODUCTS), i, f, I, S.F)


@triton.jit
def found_in(q, pointers, gates, at, N: tl.constexpr, t, S: tl.constexpr):
    """What q [C, n] finds in a matrix with its writes: alphas W q + sum_k of_writes_k O_k q [C, f].

    pointers: at W and at its O_k; gates: alphas [C, 1], the pointer at of_writes [K, C], C; at: rows f and columns n
    of N; t: rows of q.
    """
    w_pointer, stack_pointer = pointers
    alphas, of_writes_pointer, C = gates
    f, n = at
    met = product(alphas * q, tl.trans(tile(w_pointer, f, n, S.F, N)), S.PRODUCTS)
    for k in tl.range(0, S.WRITES, disable_licm=True):
        seen = column(of_writes_pointer + k * C, t, C) * q
        met = add_product(met, seen, tl.trans(tile(stack_pointer + k * S.F * N, f, n, S.F, N)), S.PRODUCTS)
    return met


@triton.jit
def slot_of_stack(stack, at, S: tl.constexpr):
    """Pointers at the O_k of one chunk and memory; the second once more for a third that the memory has not."""
    third = stack.second_pointer
    if S.GATED:
        third = stack.third_pointer
    at *= S.WRITES * S.F
    return Matrices(stack.first_pointer + at * S.V, stack.second_pointer + at * S.D, third + at * S.D)
