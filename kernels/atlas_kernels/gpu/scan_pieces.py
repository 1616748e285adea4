"""What the kernels of the memory scan share: tiles, products, the activation, the output norm, a hidden block.

Matrices and rows are padded to powers of two with zeros; a padded column of a token stays zero through every piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

from atlas_kernels.reference import LAYER_NORM_EPSILON

_EPSILON: tl.constexpr = tl.constexpr(LAYER_NORM_EPSILON)
_C: tl.constexpr = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi), see gelu.py
_A: tl.constexpr = tl.constexpr(0.044715)


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
def product(a, b, PRODUCTS: tl.constexpr):
    """a b in float32; the operands are rounded to PRODUCTS."""
    return tl.dot(a.to(PRODUCTS), b.to(PRODUCTS), input_precision="ieee")


@triton.jit
def add_product(sums, a, b, PRODUCTS: tl.constexpr):
    """sums + a b."""
    return tl.dot(a.to(PRODUCTS), b.to(PRODUCTS), sums, input_precision="ieee")


@triton.jit
def add_flipped(sums, a, b, PRODUCTS: tl.constexpr):
    """sums + (a b)^T: a block of a matrix's rows has fewer of them than columns, its transpose suits tensor cores."""
    return sums + tl.trans(product(a, b, PRODUCTS))


@triton.jit
def flipped(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The transpose of a whole row-major matrix [ROWS, COLUMNS]."""
    return tl.load(pointer + tl.arange(0, ROWS)[None, :] * COLUMNS + tl.arange(0, COLUMNS)[:, None])


@triton.jit
def put_flipped(pointer, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `flipped`."""
    tl.store(pointer + tl.arange(0, ROWS)[None, :] * COLUMNS + tl.arange(0, COLUMNS)[:, None], values)


@triton.jit
def gelu(z):
    """act(z)."""
    return z * tl.sigmoid(_C * z * (1.0 + _A * z * z))


@triton.jit
def gelu_slope(z):
    """act(z), act'(z)."""
    s = tl.sigmoid(_C * z * (1.0 + _A * z * z))
    return z * s, s + s * (1.0 - s) * z * (_C * (1.0 + 3.0 * _A * z * z))


@triton.jit
def gelu_curve(z):
    """act(z), act'(z), act''(z)."""
    s = tl.sigmoid(_C * z * (1.0 + _A * z * z))
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
def inner_error(o, r, v, inside, V: tl.constexpr, LAYER: tl.constexpr, L2: tl.constexpr):
    """The inner loss's gradient at W1's output o (see `Mlp.error`)."""
    if L2:
        u = r - v
    else:
        u = -v
    if LAYER:
        n, inverse_sd = normalised(o, inside, V)
        if L2:
            u += n
        u = jacobian_times(n, inverse_sd, u, inside, V)
    elif L2:
        u += o
    return u


@triton.jit
def inner_error_gradient(o, r, v, grad, inside, V: tl.constexpr, LAYER: tl.constexpr, L2: tl.constexpr):
    """Of `inner_error`, for its gradient: (gradient of o, gradient of r - v with l2, of -v with dot)."""
    if LAYER:
        n, inverse_sd = normalised(o, inside, V)
        if L2:
            u = r - v + n
        else:
            u = -v
        grad_u = jacobian_times(n, inverse_sd, grad, inside, V)
        # Through n, then through sd: d sd / d o = n / V.
        through_n = grad * mean(u * n, V) + u * mean(grad * n, V)
        through_n = -inverse_sd * through_n
        if L2:
            through_n += grad_u
        grad_o = jacobian_times(n, inverse_sd, through_n, inside, V)
        grad_o -= n * mean(u * grad_u, V) * inverse_sd
    else:
        grad_u = grad
        if L2:
            grad_o = grad
        else:
            grad_o = tl.zeros_like(grad)
    return grad_o, grad_u


@triton.jit
def slot_of(first, second, third, slot, D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, GATED: tl.constexpr):
    """Pointers at the matrices of one slot; the second once more for a third that the memory has not."""
    at_third = second
    if GATED:
        at_third = third
    return first + slot * F * V, second + slot * F * D, at_third + slot * F * D


@triton.jit
def source_factors(anchors, x, e, f, d, c, F, D: tl.constexpr, V: tl.constexpr, GATED: tl.constexpr, PRODUCTS):
    """What the sources' outer products are made of in the hidden rows f, at the anchor: h, factor, factor_up [I, f].

    h goes with e into W1, factor and factor_up with x into W2 and W3 (without a gate there is no W3).
    """
    h, slope = gelu_slope(product(x, tl.trans(tile(anchors[1], f, d, F, D)), PRODUCTS))
    back = product(e, tl.trans(tile(anchors[0], f, c, F, V)), PRODUCTS)
    factor_up = back
    if GATED:
        up = product(x, tl.trans(tile(anchors[2], f, d, F, D)), PRODUCTS)
        factor_up = back * h
        h, back = h * up, back * up
    return h, back * slope, factor_up


@triton.jit
def found_in(q, w_pointer, s_pointer, alphas, kappas, f, n, F, N: tl.constexpr, MOMENTUM: tl.constexpr, PRODUCTS):
    """What queries q [C, n] find in rows f of a matrix: alphas q W^T + kappas q S^T [C, f]; and these rows of W and S
    (of a memory without momentum, W's twice)."""
    w = tile(w_pointer, f, n, F, N)
    met, s = alphas * product(q, tl.trans(w), PRODUCTS), w
    if MOMENTUM:
        s = tile(s_pointer, f, n, F, N)
        met += kappas * product(q, tl.trans(s), PRODUCTS)
    return met, w, s
