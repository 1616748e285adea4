"""What the gates say of every chunk, backward: see `atlas_kernels.gpu.coefficients`."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from atlas_kernels.gpu.coefficients.forward import (
    Gates,
    Kept,
    gate_at,
    gates_in,
    kept_in,
    omega_gates,
    own_gates,
    place_of,
    seen_from,
    tables_in,
)
from atlas_kernels.gpu.scan.pieces import Tables


class GateGradients(NamedTuple):
    grad_alpha_pointer: Any  # [B, N C, H], as the next two
    grad_eta_pointer: Any
    grad_theta_pointer: Any  # None without momentum
    grad_gamma_pointer: Any  # [B, N C, H, W] or, of source gates, [N, G, I]


class Chunk(NamedTuple):
    """What the backward of a program's chunk is given: pointers at its first token, and its `own_gates`."""

    gates: Gates
    tables: Tables
    kept: Kept
    incoming: Tables
    grads: GateGradients
    own: Any
    C: Any
    H: Any


class Owed(NamedTuple):
    """Gradients of what a token leaves to the next one."""

    sources: Any  # [BLOCK_I], as sums: of C_t and S_t
    sums: Any
    alphas: Any
    kappas: Any
    thetas: Any
    own: Any  # [BLOCK_I]: of source gates, the later tokens' part


@triton.jit
def of_token(pointer, t, C, other):
    """What a chunk's table [C] has of token t, `other` outside it."""
    return tl.load(pointer + t, mask=(t >= 0) & (t < C), other=other)


@triton.jit
def grads_in(grads, place, sizes, C, S: tl.constexpr):
    """`GateGradients` from the chunk's first token on."""
    token = (place.b * sizes.N * C + place.first) * sizes.H + place.h
    alpha, eta = grads.grad_alpha_pointer + token, grads.grad_eta_pointer + token
    theta, gamma = alpha, grads.grad_gamma_pointer
    if S.MOMENTUM:
        theta = grads.grad_theta_pointer + token
    if S.PAIR:
        gamma += token * S.WINDOW
    else:
        gamma += place.at * (C + S.WINDOW - 1)
    return GateGradients(alpha, eta, theta, gamma)


@triton.jit
def sums_again(chunk, start, i, S: tl.constexpr):
    """S before token `start` (zeros without momentum) and at each of the STEP tokens from there: STEP + 1 rows."""
    sums = tl.zeros([S.BLOCK_I], tl.float32)
    if S.MOMENTUM:
        sums = tl.load(chunk.kept.sums_pointer + start // S.STEP * S.BLOCK_I + i)
    rows = (sums,)
    for step in tl.static_range(S.STEP):
        sums = omega_gates(chunk.gates, chunk.own, start + step, i, chunk.C, S)
        if S.MOMENTUM:
            sums += gate_at(chunk.gates.theta, start + step, chunk.C, 1.0) * rows[step]
        rows = rows + (sums,)  # type: ignore[assignment]  # noqa: RUF005  the compiler knows no unpacking
    return rows


@triton.jit
def with_outputs(owed, chunk, t, i, S: tl.constexpr):
    """`Owed` by token t: what the next one owes and the gradients of its own row of the tables."""
    incoming, C = chunk.incoming, chunk.C
    # Past the chunk's sources the table and its gradient are zero.
    sources = owed.sources + tl.load(incoming.sources_pointer + t * S.BLOCK_I + i, mask=t < C, other=0.0)
    alphas, kappas = owed.alphas + of_token(incoming.alphas_pointer, t, C, 0.0), owed.kappas
    eta = gate_at(chunk.gates.eta, t, C, 0.0)
    sums, thetas = owed.sums - eta * sources, owed.thetas
    if S.MOMENTUM:
        kappas += of_token(incoming.kappas_pointer, t, C, 0.0)
        thetas -= eta * kappas
    return Owed(sources, sums, alphas, kappas, thetas, owed.own)


@triton.jit
def put_gradients(owed, sums, chunk, t, i, S: tl.constexpr):
    """Gradients of token t's gates, from its `Owed`; sums: S_{t-1} and S_t. Returns those of source gates so far."""
    tables, thetas, grads, C = chunk.tables, chunk.kept.thetas_pointer, chunk.grads, chunk.C
    before = tl.load(tables.sources_pointer + (t - 1) * S.BLOCK_I + i, mask=(t > 0) & (t < C), other=0.0)
    grad_alpha = tl.sum(owed.sources * before, 0) + owed.alphas * of_token(tables.alphas_pointer, t - 1, C, 1.0)
    grad_eta = -tl.sum(owed.sources * sums[1], 0)
    if S.MOMENTUM:
        grad_alpha += owed.kappas * of_token(tables.kappas_pointer, t - 1, C, 0.0)
        grad_eta -= owed.kappas * of_token(thetas, t, C, 0.0)
        grad_theta = tl.sum(owed.sums * sums[0], 0) + owed.thetas * of_token(thetas, t - 1, C, 1.0)
        tl.store(grads.grad_theta_pointer + t * chunk.H, grad_theta, mask=t < C)
    tl.store(grads.grad_alpha_pointer + t * chunk.H, grad_alpha, mask=t < C)
    tl.store(grads.grad_eta_pointer + t * chunk.H, grad_eta, mask=t < C)
    back, inside = seen_from(t, i, C, S)
    own = owed.own
    if S.PAIR:
        tl.store(grads.grad_gamma_pointer + t * chunk.H * S.WINDOW + back, owed.sums, mask=inside)
    else:
        own += tl.where(inside, owed.sums, 0.0)
    return own


@triton.jit
def to_the_token_before(owed, own, chunk, t, S: tl.constexpr):
    """`Owed` by the token before t."""
    alpha = gate_at(chunk.gates.alpha, t, chunk.C, 1.0)
    sums, kappas, thetas = tl.zeros_like(owed.sums), owed.kappas, owed.thetas
    if S.MOMENTUM:
        theta = gate_at(chunk.gates.theta, t, chunk.C, 1.0)
        sums, kappas, thetas = theta * owed.sums, alpha * kappas, theta * thetas
    return Owed(alpha * owed.sources, sums, alpha * owed.alphas, kappas, thetas, own)


@triton.jit
def coefficients_backward_kernel(
    gates,  # Gates
    tables,  # Tables, of which alphas, kappas and sources are read
    kept,  # Kept
    incoming,  # Tables, of gradients
    grads,  # GateGradients, out
    sizes,  # Sizes
    S: tl.constexpr,  # Constants
):
    C, place = S.BLOCK_C if S.WHOLE else sizes.C, place_of(sizes)
    gates, tables = gates_in(gates, place, C, S), tables_in(tables, place, C, S)
    if S.KEEP:
        kept = kept_in(kept, place, C, S)
    incoming, grads = tables_in(incoming, place, C, S), grads_in(grads, place, sizes, C, S)
    i = tl.arange(0, S.BLOCK_I)
    inside = i < C + S.WINDOW - 1
    chunk = Chunk(gates, tables, kept, incoming, grads, own_gates(gates, i, C, S), C, sizes.H)
    sums, own = tl.zeros([S.BLOCK_I], tl.float32), tl.zeros([S.BLOCK_I], tl.float32)
    sources, alphas = tl.load(incoming.to_w_pointer + i, mask=inside, other=0.0), tl.load(incoming.last_pointer)
    kappas, thetas = alphas, alphas  # nothing reads them without momentum
    if S.MOMENTUM:
        sums = tl.load(incoming.to_s_pointer + i, mask=inside, other=0.0)
        kappas, thetas = tl.load(incoming.last_pointer + 1), tl.load(incoming.last_pointer + 2)
    owed = Owed(sources, sums, alphas, kappas, thetas, own)
    for behind in tl.range(S.STEP, S.BLOCK_C + S.STEP, S.STEP):
        start = S.BLOCK_C - behind
        rows = sums_again(chunk, start, i, S)
        for step in tl.static_range(S.STEP):
            t = start + (S.STEP - 1 - step)
            owed = with_outputs(owed, chunk, t, i, S)
            own = put_gradients(owed, (rows[S.STEP - 1 - step], rows[S.STEP - step]), chunk, t, i, S)
            owed = to_the_token_before(owed, own, chunk, t, S)
    if not S.PAIR:
        tl.store(grads.grad_gamma_pointer + i, owed.own, mask=inside)
