"""What the kernels of the memory scan share: their arguments, and tiles, products, activation, norm, a hidden block.

Matrices and rows are padded to powers of two with zeros; a padded column of a token stays zero through every piece.
Dims: N chunks, G = B x H memories, C tokens, I sources, D lifted key, V value, F hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from atlas_kernels.gelu import CUBIC, SCALE
from atlas_kernels.reference import LAYER_NORM_EPSILON

_EPSILON: tl.constexpr = tl.constexpr(LAYER_NORM_EPSILON)
_C: tl.constexpr = tl.constexpr(SCALE)
_A: tl.constexpr = tl.constexpr(CUBIC)
_INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


class Tokens(NamedTuple):
    q_pointer: Any  # [N, G, C, D]
    read_residual_pointer: Any  # [N, G, C, V], of the read alone, else None
    x_pointer: Any  # [N, G, I, D]
    v_pointer: Any  # [N, G, I, V]
    r_pointer: Any  # [N, G, I, V]


class Tables(NamedTuple):
    """What the gates say, as `writes.Coefficients`; kappas and to_s are None without momentum."""

    alphas_pointer: Any  # [N, G, C]
    kappas_pointer: Any  # [N, G, C]
    sources_pointer: Any  # [N, G, BLOCK_C, BLOCK_I]
    last_pointer: Any  # [N, G, 3], or [N, G, 1] without momentum
    to_w_pointer: Any  # [N, G, I]
    to_s_pointer: Any  # [N, G, I]


class Matrices(NamedTuple):
    """The two or three matrices of the memories, or their momenta, or gradients of these, in slots."""

    first_pointer: Any  # [slots, G, F, V]
    second_pointer: Any  # [slots, G, F, D]
    third_pointer: Any = None  # [slots, G, F, D] of a gated memory


class States(NamedTuple):
    """N + 2 slots: 0 the first chunk's anchor (of weights alone), n + 1 what enters chunk n."""

    weights: Matrices
    momenta: Matrices | None  # None without momentum


class Reads(NamedTuple):
    """What the read gives, and keeps for the backward."""

    o_pointer: Any  # [N, G, I, V], what the anchor gives to each source, of the write
    y_pointer: Any  # [N, G, C, V], None in the backward
    read_pointer: Any  # [N, G, C, V], y before its norm and residual
    scores_pointer: Any  # [N, G, BLOCK_C, BLOCK_I], h of the reads times h of the sources


class ReadGradients(NamedTuple):
    grad_q_pointer: Any  # [N, G, C, D]
    grad_alphas_pointer: Any  # [N, G, C]
    grad_kappas_pointer: Any  # [N, G, C]
    grad_sources_pointer: Any  # [N, G, BLOCK_C, BLOCK_I]
    grad_x_pointer: Any  # [N, G, I, D], the reads' part, as the next
    grad_e_pointer: Any  # [N, G, I, V]
    grad_read_pointer: Any  # [N, G, C, V]
    h_pointer: Any  # [N, G, C, F] in PRODUCTS, as the next two
    grad_z_pointer: Any
    grad_up_pointer: Any  # None without a gate


class Owed(NamedTuple):
    """What the reads' backward leaves to the writes', as in `ReadGradients`.

    In this order, of all: a compiler deals out registers by the order of the arguments.
    """

    grad_read_pointer: Any
    h_pointer: Any
    grad_z_pointer: Any
    grad_up_pointer: Any
    grad_e_pointer: Any
    grad_x_pointer: Any  # in: the reads' part; out: the whole


class WriteGradients(NamedTuple):
    grad_value_pointer: Any  # [N, G, I, V], of r - v with l2, of -v with dot
    grad_last_pointer: Any  # as last, and the next two as theirs
    grad_to_w_pointer: Any
    grad_to_s_pointer: Any
    # Two slots: 0 the first chunk's anchor, out; 1 in: of what leaves the segment, out: of what enters it.
    grad_weights: Matrices
    grad_momenta: Matrices | None  # one slot, in and out as slot 1
    part_z_pointer: Any  # scratch [G, I, F]: the gradient of z without what passes through o
    part_up_pointer: Any  # scratch [G, I, F], None without a gate


class Sizes(NamedTuple):
    N: Any
    G: Any
    C: Any
    I: Any  # noqa: E741


class Shape(NamedTuple):
    """S of the kernels; widths are padded to powers of two. A kernel that has no use for one is given its default."""

    D: int
    V: int
    F: int
    LAYER: bool
    L2: bool
    MOMENTUM: bool
    GATED: bool
    PRODUCTS: tl.dtype
    BLOCK_I: int
    BLOCK_D: int
    BLOCK_V: int
    BLOCK_C: int = 0
    BLOCK_F: int = 0  # each kernel's own
    APART: bool = False  # see `add_product`
    SHARE: float = 0.0  # of the gradient through the anchor
    KEEP: bool = False  # what the backward takes
    SLICES: int = 1  # of a memory's hidden rows, F each, see split.py


@triton.jit
def tile(pointer, rows, columns, ROWS, COLUMNS: tl.constexpr):
    """[rows, columns] of a row-major matrix [ROWS, COLUMNS], zero outside it."""
    inside = (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS)
    return tl.load(pointer + rows[:, None] * COLUMNS + columns[None, :], mask=inside, other=0.0)


@triton.jit
def put(pointer, values, rows, columns, ROWS, COLUMNS: tl.constexpr):
    """The inverse of `tile`."""
    inside = (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS)
    tl.store(pointer + rows[:, None] * COLUMNS + columns[None, :], values, mask=inside)


@triton.jit
def column(pointer, rows, ROWS):
    """[rows] of a vector as a column [rows, 1], zero outside it."""
    return tl.load(pointer + rows, mask=rows < ROWS, other=0.0)[:, None]


@triton.jit
def product(a, b, S: tl.constexpr):
    """a b in float32; the operands are rounded to PRODUCTS."""
    return add_product(tl.zeros([a.shape[0], b.shape[1]], tl.float32), a, b, S)


@triton.jit
def add_product(sums, a, b, S: tl.constexpr):
    """sums + a b.

    On sm_90 a product that another one takes up gets all warps along its rows, so 8 warps would multiply 64 rows twice.
    What takes it up is not looked for outside of a branch. APART: those of 64 rows have one, that is always taken.
    """
    a, b = a.to(S.PRODUCTS), b.to(S.PRODUCTS)
    if S.APART and sums.shape[0] == 64:
        if tl.num_programs(0) > 0:
            sums = tl.dot(a, b, sums, input_precision="ieee")
    else:
        sums = tl.dot(a, b, sums, input_precision="ieee")
    return sums


@triton.jit
def two_products(a, b, c, S: tl.constexpr):
    """a b^T and a c^T, the second only with momentum (else the first once more); in one branch, as above."""
    a, b, c = a.to(S.PRODUCTS), tl.trans(b.to(S.PRODUCTS)), tl.trans(c.to(S.PRODUCTS))
    first = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    if S.APART and a.shape[0] == 64:
        second = first
        if tl.num_programs(0) > 0:
            first = tl.dot(a, b, input_precision="ieee")
            if S.MOMENTUM:
                second = tl.dot(a, c, input_precision="ieee")
    else:
        first = tl.dot(a, b, input_precision="ieee")
        second = first
        if S.MOMENTUM:
            second = tl.dot(a, c, input_precision="ieee")
    return first, second


@triton.jit
def add_flipped(sums, a, b, S: tl.constexpr):
    """sums + (a b)^T: a block of a matrix's rows has fewer of them than columns, its transpose suits tensor cores."""
    return sums + tl.trans(tl.dot(a.to(S.PRODUCTS), b.to(S.PRODUCTS), input_precision="ieee"))


@triton.jit
def flipped(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The transpose of a whole row-major matrix [ROWS, COLUMNS]."""
    return tl.load(pointer + tl.arange(0, ROWS)[None, :] * COLUMNS + tl.arange(0, COLUMNS)[:, None])


@triton.jit
def put_flipped(pointer, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `flipped`."""
    tl.store(pointer + tl.arange(0, ROWS)[None, :] * COLUMNS + tl.arange(0, COLUMNS)[:, None], values)


@triton.jit
def sigmoid(u, PRODUCTS: tl.constexpr):
    """1 / (1 + exp(-u)); where products are of half precision on a GPU, through its own tanh.

    One instruction in place of an exponential and a division. It errs by 2^-11 of tanh at most, so by 2^-12 here, and
    act(z) by |z| 2^-12. Its product's rounding is four times that in bfloat16 (2^-9 of act(z) >= z / 2, z > 0) and half
    of it in float16. Of a negative z, where act(z) is small, the error is |z| 2^-12 all the same.
    """
    if PRODUCTS == tl.float32 or _INTERPRETED:
        s = tl.sigmoid(u)
    else:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * u], dtype=tl.float32, is_pure=True, pack=1
        )
        s = 0.5 * tanh + 0.5
    return s


@triton.jit
def gelu(z, PRODUCTS: tl.constexpr = tl.float32):
    """act(z)."""
    return z * sigmoid(_C * z * (1.0 + _A * z * z), PRODUCTS)


@triton.jit
def gelu_slope(z, PRODUCTS: tl.constexpr = tl.float32):
    """act(z), act'(z)."""
    s = sigmoid(_C * z * (1.0 + _A * z * z), PRODUCTS)
    return z * s, s + s * (1.0 - s) * z * (_C * (1.0 + 3.0 * _A * z * z))


@triton.jit
def gelu_curve(z, PRODUCTS: tl.constexpr = tl.float32):
    """act(z), act'(z), act''(z)."""
    s = sigmoid(_C * z * (1.0 + _A * z * z), PRODUCTS)
    p = _C * (1.0 + 3.0 * _A * z * z)
    bend = s * (1.0 - s)
    return z * s, s + bend * z * p, bend * (4.0 * p - 2.0 * _C + z * p * p * (1.0 - 2.0 * s))


@triton.jit
def mean(a, V: tl.constexpr):
    """Over the V columns of [rows, padded V]."""
    return tl.sum(a, 1)[:, None] / V


@triton.jit
def normalised(o, inside, V: tl.constexpr):
    """(n, 1 / sd) of the layer norm of o [rows, padded V]; inside: [1, padded V], the true columns."""
    centred = tl.where(inside, o - mean(o, V), 0.0)
    inverse_sd = tl.rsqrt(mean(centred * centred, V) + _EPSILON)
    return centred * inverse_sd, inverse_sd


@triton.jit
def jacobian_times(n, inverse_sd, u, inside, V: tl.constexpr):
    """J u, J the layer norm's symmetric Jacobian."""
    return tl.where(inside, u - mean(u, V) - n * mean(u * n, V), 0.0) * inverse_sd


@triton.jit
def inner_error(o, r, v, inside, S: tl.constexpr):
    """The inner loss's gradient at W1's output o (see `Mlp.error`)."""
    if S.L2:
        u = r - v
    else:
        u = -v
    if S.LAYER:
        n, inverse_sd = normalised(o, inside, S.V)
        if S.L2:
            u += n
        u = jacobian_times(n, inverse_sd, u, inside, S.V)
    elif S.L2:
        u += o
    return u


@triton.jit
def inner_error_gradient(o, r, v, grad, inside, S: tl.constexpr):
    """Of `inner_error`, for its gradient: (gradient of o, gradient of r - v with l2, of -v with dot)."""
    if S.LAYER:
        n, inverse_sd = normalised(o, inside, S.V)
        if S.L2:
            u = r - v + n
        else:
            u = -v
        grad_u = jacobian_times(n, inverse_sd, grad, inside, S.V)
        # Through n, then through sd: d sd / d o = n / V.
        through_n = grad * mean(u * n, S.V) + u * mean(grad * n, S.V)
        through_n = -inverse_sd * through_n
        if S.L2:
            through_n += grad_u
        grad_o = jacobian_times(n, inverse_sd, through_n, inside, S.V)
        grad_o -= n * mean(u * grad_u, S.V) * inverse_sd
    else:
        grad_u = grad
        if S.L2:
            grad_o = grad
        else:
            grad_o = tl.zeros_like(grad)
    return grad_o, grad_u


@triton.jit
def slot_of(matrices, slot, S: tl.constexpr):
    """Pointers at the matrices of one slot; the second once more for a third that the memory has not."""
    third = matrices.second_pointer
    if S.GATED:
        third = matrices.third_pointer
    first, second = matrices.first_pointer + slot * S.F * S.V, matrices.second_pointer + slot * S.F * S.D
    return Matrices(first, second, third + slot * S.F * S.D)


@triton.jit
def source_factors(anchors, x, e, f, d, c, S: tl.constexpr):
    """What the sources' outer products are made of in the hidden rows f, at the anchor: h, factor, factor_up [I, f].

    h goes with e into W1, factor and factor_up with x into W2 and W3 (without a gate there is no W3).
    """
    h, slope = gelu_slope(product(x, tl.trans(tile(anchors.second_pointer, f, d, S.F, S.D)), S), S.PRODUCTS)
    back = product(e, tl.trans(tile(anchors.first_pointer, f, c, S.F, S.V)), S)
    factor_up = back
    if S.GATED:
        up = product(x, tl.trans(tile(anchors.third_pointer, f, d, S.F, S.D)), S)
        factor_up = back * h
        h, back = h * up, back * up
    return h, back * slope, factor_up


@triton.jit
def found_in(q, pointers, gates, f, d, S: tl.constexpr):
    """What queries q [C, d] find in rows f of W2 or W3: alphas q W^T + kappas q S^T [C, f]; and these rows of W and S
    (of a memory without momentum, W's twice).

    pointers: at W and S; gates: alphas and kappas [C, 1].
    """
    w_pointer, s_pointer = pointers
    alphas, kappas = gates
    w = tile(w_pointer, f, d, S.F, S.D)
    s = tile(s_pointer, f, d, S.F, S.D) if S.MOMENTUM else w
    met, met_s = two_products(q, w, s, S)
    met *= alphas
    if S.MOMENTUM:
        met += kappas * met_s
    return met, w, s
