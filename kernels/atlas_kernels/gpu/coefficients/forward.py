"""What the gates say of every chunk, forward: see `atlas_kernels.gpu.coefficients`."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from atlas_kernels.gpu.scan.pieces import Tables


class Gate(NamedTuple):
    pointer: Any  # [B, N C, H], in the caller's layout
    stride_b: Any
    stride_t: Any
    stride_h: Any


class Gates(NamedTuple):
    alpha: Gate
    eta: Gate
    theta: Gate | None  # None without momentum
    gamma: Gate  # pair gates [B, N C, H, W]; source gates are [N, G, I] and have no strides
    stride_w: Any = None  # of pair gates


class Kept(NamedTuple):
    """For the backward; None without momentum."""

    sums_pointer: Any  # [N, G, BLOCK_C / STEP, BLOCK_I], S before every STEP-th token
    thetas_pointer: Any  # [N, G, C], products of theta from the chunk's first token


class Sizes(NamedTuple):
    N: Any
    G: Any  # B x H
    H: Any
    C: Any


class Constants(NamedTuple):
    """S of the kernels."""

    WINDOW: int
    MOMENTUM: bool
    PAIR: bool
    WHOLE: bool  # C is BLOCK_C
    BLOCK_C: int
    BLOCK_I: int
    STEP: int
    KEEP: bool  # for a backward, with momentum


class Place(NamedTuple):
    """Where a program's chunk lies."""

    at: Any  # of chunk and memory, [N, G]
    b: Any
    h: Any
    first: Any  # token of the sequence's N C


@triton.jit
def place_of(sizes):
    """The program's `Place`."""
    at = tl.program_id(0).to(tl.int64)
    g = at % sizes.G
    return Place(at, g // sizes.H, g % sizes.H, at // sizes.G * sizes.C)


@triton.jit
def gate_in(gate, place):
    """The gate, from the chunk's first token on. From there on offsets are small: they take few registers."""
    at = gate.pointer + place.b * gate.stride_b + place.h * gate.stride_h + place.first * gate.stride_t
    return Gate(at, gate.stride_b, gate.stride_t, gate.stride_h)


@triton.jit
def gates_in(gates, place, C, S: tl.constexpr):
    """`Gates` from the chunk's first token on."""
    alpha, eta, gamma = gate_in(gates.alpha, place), gate_in(gates.eta, place), gates.gamma
    theta, stride_w = alpha, alpha.stride_t  # no function returns None: of what there is not, something stands in
    if S.PAIR:
        gamma, stride_w = gate_in(gamma, place), gates.stride_w
    else:
        at = gamma.pointer + place.at * (C + S.WINDOW - 1)
        gamma = Gate(at, alpha.stride_b, alpha.stride_t, alpha.stride_h)
    if S.MOMENTUM:
        theta = gate_in(gates.theta, place)
    return Gates(alpha, eta, theta, gamma, stride_w)


@triton.jit
def tables_in(tables, place, C, S: tl.constexpr):
    """`Tables` of the chunk."""
    at, I = place.at, C + S.WINDOW - 1  # noqa: E741
    alphas, sources = tables.alphas_pointer + at * C, tables.sources_pointer + at * (S.BLOCK_C * S.BLOCK_I)
    kappas, last, to_w, to_s = alphas, alphas, alphas, alphas
    if S.MOMENTUM:
        kappas = tables.kappas_pointer + at * C
    if tables.last_pointer is not None:
        last, to_w = tables.last_pointer + at * (3 if S.MOMENTUM else 1), tables.to_w_pointer + at * I
        if S.MOMENTUM:
            to_s = tables.to_s_pointer + at * I
    return Tables(alphas, kappas, sources, last, to_w, to_s)


@triton.jit
def kept_in(kept, place, C, S: tl.constexpr):
    """`Kept` of the chunk."""
    return Kept(kept.sums_pointer + place.at * (S.BLOCK_C // S.STEP * S.BLOCK_I), kept.thetas_pointer + place.at * C)


@triton.jit
def gate_at(gate, t, C, other):
    """The gate of the chunk's token t, `other` past its end."""
    return tl.load(gate.pointer + t * gate.stride_t, mask=t < C, other=other)


@triton.jit
def seen_from(t, i, C, S: tl.constexpr):
    """(how many tokens source i stands before token t, whether it is inside t's window)."""
    back = t + S.WINDOW - 1 - i
    return back, (back >= 0) & (back < S.WINDOW) & (t < C)


@triton.jit
def own_gates(gates, i, C, S: tl.constexpr):
    """Source gates of the chunk [BLOCK_I]; of pair gates, which each token has of its own, zeros."""
    own = tl.zeros([S.BLOCK_I], tl.float32)
    if not S.PAIR:
        own = tl.load(gates.gamma.pointer + i, mask=i < C + S.WINDOW - 1, other=0.0)
    return own


@triton.jit
def omega_gates(gates, own, t, i, C, S: tl.constexpr):
    """Gm_t: what token t takes of the sources i."""
    back, inside = seen_from(t, i, C, S)
    if S.PAIR:
        gamma = gates.gamma
        band = tl.load(gamma.pointer + t * gamma.stride_t + back * gates.stride_w, mask=inside, other=0.0)
    else:
        band = tl.where(inside, own, 0.0)
    return band


@triton.jit
def coefficients_kernel(
    gates,  # Gates
    tables,  # Tables, out
    kept,  # Kept, out where KEEP
    sizes,  # Sizes
    S: tl.constexpr,  # Constants
):
    C, place = S.BLOCK_C if S.WHOLE else sizes.C, place_of(sizes)
    gates, tables = gates_in(gates, place, C, S), tables_in(tables, place, C, S)
    if S.KEEP:
        kept = kept_in(kept, place, C, S)
    i = tl.arange(0, S.BLOCK_I)
    own = own_gates(gates, i, C, S)
    sums, sources = tl.zeros([S.BLOCK_I], tl.float32), tl.zeros([S.BLOCK_I], tl.float32)
    alphas, kappas, thetas = 1.0, 0.0, 1.0
    for start in tl.range(0, S.BLOCK_C, S.STEP):
        if S.KEEP:
            tl.store(kept.sums_pointer + start // S.STEP * S.BLOCK_I + i, sums)
        for step in tl.static_range(S.STEP):
            # Past the chunk's last token gates are 1, steps and Omega gates 0: nothing changes there.
            t = start + step
            alpha, eta = gate_at(gates.alpha, t, C, 1.0), gate_at(gates.eta, t, C, 0.0)
            band = omega_gates(gates, own, t, i, C, S)
            if S.MOMENTUM:
                theta = gate_at(gates.theta, t, C, 1.0)
                sums = theta * sums + band
                thetas *= theta
                kappas = alpha * kappas - eta * thetas
                tl.store(tables.kappas_pointer + t, kappas, mask=t < C)
                if S.KEEP:
                    tl.store(kept.thetas_pointer + t, thetas, mask=t < C)
            else:
                sums = band
            sources = alpha * sources - eta * sums
            alphas *= alpha
            tl.store(tables.alphas_pointer + t, alphas, mask=t < C)
            tl.store(tables.sources_pointer + t * S.BLOCK_I + i, tl.where(t < C, sources, 0.0))
    inside = i < C + S.WINDOW - 1
    tl.store(tables.to_w_pointer + i, sources, mask=inside)
    tl.store(tables.last_pointer, alphas)
    if S.MOMENTUM:
        tl.store(tables.to_s_pointer + i, sums, mask=inside)
        tl.store(tables.last_pointer + 1, kappas)
        tl.store(tables.last_pointer + 2, thetas)
