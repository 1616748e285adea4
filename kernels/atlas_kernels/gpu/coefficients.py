"""What the gates say of every chunk (`writes.Coefficients`), one kernel each way: what `impl="triton"` runs for it.

The recurrences themselves, token by token, in float32, and no matrix of decays: at the sources of a chunk

    S_t = theta_t S_{t-1} + Gm_t      C_t = alpha_t C_{t-1} - eta_t S_t          (S_t = Gm_t without momentum)

are two multiplications and two additions each, where TA diag(eta) TT Gm are two products of matrices. A gate of exactly
0 needs no care, and the gradient is exact there. One program is a chunk of a memory and has a lane for each source; no
lane meets another but in the backward's sums, so nothing is added up in an order that could change.

A chunk of a memory at C = 64, W = 16 (79 sources, padded to 128), momentum, pair gates; by count, not measured:

    kernel                    KFLOP   device memory, KB                                        registers, no spills
    coefficients              33      5 gates in; 32 sources, 1 other tables, 5 kept out       32 / 34 / 34
    coefficients_backward     115     5 gates, 64 sources and gradient, 6 in; 5 gates out      96 / 96 / 96

In torch, matrices of decays and all, a segment's [C, I] tables are passed over some forty times, 20 KB each. The backward
goes from a chunk's last token to its first. It computes S_t again, `STEP` tokens at a time, from one in `STEP` that
the forward keeps. Gates lie in the caller's layout and are read by their strides.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas_kernels.autocast import unrounded_backward
from atlas_kernels.gpu.launch import Variant, launch, recording
from atlas_kernels.gpu.scan import padded
from atlas_kernels.gpu.scan.pieces import Tables
from atlas_kernels.rule import Gates as GivenGates
from atlas_kernels.rule import MemoryRule
from atlas_kernels.writes import Coefficients

# Tokens whose sums the backward holds at once, and warps of a program: a lane has four sources of 128.
STEP, WARPS = 8, 1


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


class GateGradients(NamedTuple):
    grad_alpha_pointer: Any  # [B, N C, H], as the next two
    grad_eta_pointer: Any
    grad_theta_pointer: Any  # None without momentum
    grad_gamma_pointer: Any  # [B, N C, H, W] or, of source gates, [N, G, I]


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
    BLOCK_C: int
    BLOCK_I: int
    STEP: int
    KEEP: bool = False


class Place(NamedTuple):
    """Where a program's chunk lies: chunk and memory, sequence, head, first token of the sequence's N C."""

    at: Any
    b: Any
    h: Any
    first: Any


@triton.jit
def place_of(sizes):
    """The program's `Place`."""
    at = tl.program_id(0).to(tl.int64)
    g = at % sizes.G
    return Place(at, g // sizes.H, g % sizes.H, at // sizes.G * sizes.C)


@triton.jit
def gate_at(gate, place, t, C, other):
    """The gate of the chunk's token t, `other` past its end."""
    at = gate.pointer + place.b * gate.stride_b + place.h * gate.stride_h + (place.first + t) * gate.stride_t
    return tl.load(at, mask=t < C, other=other)


@triton.jit
def seen_from(t, i, C, S: tl.constexpr):
    """(how many tokens source i stands before token t, whether it is inside t's window)."""
    back = t + S.WINDOW - 1 - i
    return back, (back >= 0) & (back < S.WINDOW) & (t < C)


@triton.jit
def own_gates(gates, place, i, C, S: tl.constexpr):
    """Source gates of the chunk [BLOCK_I]; of pair gates, which each token has of its own, zeros."""
    own = tl.zeros([S.BLOCK_I], tl.float32)
    if not S.PAIR:
        I = C + S.WINDOW - 1  # noqa: E741
        own = tl.load(gates.gamma.pointer + place.at * I + i, mask=i < I, other=0.0)
    return own


@triton.jit
def omega_gates(gates, own, place, t, i, C, S: tl.constexpr):
    """Gm_t: what token t takes of the sources i."""
    back, inside = seen_from(t, i, C, S)
    if S.PAIR:
        gamma = gates.gamma
        at = gamma.pointer + place.b * gamma.stride_b + place.h * gamma.stride_h + (place.first + t) * gamma.stride_t
        return tl.load(at + back * gates.stride_w, mask=inside, other=0.0)
    else:
        return tl.where(inside, own, 0.0)


@triton.jit
def coefficients_kernel(
    gates,  # Gates
    tables,  # Tables, out
    kept,  # Kept, out where KEEP
    sizes,  # Sizes
    S: tl.constexpr,  # Constants
):
    C = sizes.C
    I = C + S.WINDOW - 1  # noqa: E741
    place = place_of(sizes)
    i = tl.arange(0, S.BLOCK_I)
    own = own_gates(gates, place, i, C, S)
    token, block = place.at * C, place.at * S.BLOCK_C
    sums, sources = tl.zeros([S.BLOCK_I], tl.float32), tl.zeros([S.BLOCK_I], tl.float32)
    alphas, kappas, thetas = 1.0, 0.0, 1.0
    for start in tl.range(0, S.BLOCK_C, S.STEP):
        if S.KEEP:
            tl.store(kept.sums_pointer + (block + start) // S.STEP * S.BLOCK_I + i, sums)
        for step in tl.static_range(S.STEP):
            # Past the chunk's last token gates are 1, steps and Omega gates 0: nothing changes there.
            t = start + step
            alpha, eta = gate_at(gates.alpha, place, t, C, 1.0), gate_at(gates.eta, place, t, C, 0.0)
            band = omega_gates(gates, own, place, t, i, C, S)
            if S.MOMENTUM:
                theta = gate_at(gates.theta, place, t, C, 1.0)
                sums = theta * sums + band
                thetas *= theta
                kappas = alpha * kappas - eta * thetas
                tl.store(tables.kappas_pointer + token + t, kappas, mask=t < C)
                if S.KEEP:
                    tl.store(kept.thetas_pointer + token + t, thetas, mask=t < C)
            else:
                sums = band
            sources = alpha * sources - eta * sums
            alphas *= alpha
            tl.store(tables.alphas_pointer + token + t, alphas, mask=t < C)
            tl.store(tables.sources_pointer + (block + t) * S.BLOCK_I + i, tl.where(t < C, sources, 0.0))
    tl.store(tables.to_w_pointer + place.at * I + i, sources, mask=i < I)
    if S.MOMENTUM:
        tl.store(tables.to_s_pointer + place.at * I + i, sums, mask=i < I)
        last_at = tables.last_pointer + place.at * 3
        tl.store(last_at, alphas)
        tl.store(last_at + 1, kappas)
        tl.store(last_at + 2, thetas)
    else:
        tl.store(tables.last_pointer + place.at, alphas)


class Chunk(NamedTuple):
    """What the backward of a program's chunk is given, its `Place` and `own_gates`."""

    gates: Gates
    tables: Tables
    kept: Kept
    incoming: Tables
    grads: GateGradients
    sizes: Sizes
    place: Place
    own: Any


class Owed(NamedTuple):
    """Gradients of what a token leaves to the next one."""

    sources: Any  # [BLOCK_I], as sums: of C_t and S_t
    sums: Any
    alphas: Any
    kappas: Any
    thetas: Any
    own: Any  # [BLOCK_I]: of source gates, the later tokens' part


@triton.jit
def sums_again(chunk, start, i, S: tl.constexpr):
    """S before token `start` (zeros without momentum) and at each of the STEP tokens from there: STEP + 1 rows."""
    gates, place, C = chunk.gates, chunk.place, chunk.sizes.C
    sums = tl.zeros([S.BLOCK_I], tl.float32)
    if S.MOMENTUM:
        sums = tl.load(chunk.kept.sums_pointer + (place.at * S.BLOCK_C + start) // S.STEP * S.BLOCK_I + i)
    rows = (sums,)
    for step in tl.static_range(S.STEP):
        band = omega_gates(gates, chunk.own, place, start + step, i, C, S)
        if S.MOMENTUM:
            band += gate_at(gates.theta, place, start + step, C, 1.0) * rows[step]
        rows = rows + (band,)
    return rows


@triton.jit
def of_token(pointer, place, t, C, other):
    """What a table [N, G, C] has of token t, `other` outside the chunk."""
    return tl.load(pointer + place.at * C + t, mask=(t >= 0) & (t < C), other=other)


@triton.jit
def with_outputs(owed, chunk, t, i, S: tl.constexpr):
    """`Owed` by token t: what the next one owes and the gradients of its own row of the tables."""
    incoming, place, C = chunk.incoming, chunk.place, chunk.sizes.C
    inside = (i < C + S.WINDOW - 1) & (t < C)
    row = incoming.sources_pointer + (place.at * S.BLOCK_C + t) * S.BLOCK_I
    sources = owed.sources + tl.load(row + i, mask=inside, other=0.0)
    alphas, kappas = owed.alphas + of_token(incoming.alphas_pointer, place, t, C, 0.0), owed.kappas
    eta = gate_at(chunk.gates.eta, place, t, C, 0.0)
    sums, thetas = owed.sums - eta * sources, owed.thetas
    if S.MOMENTUM:
        kappas += of_token(incoming.kappas_pointer, place, t, C, 0.0)
        thetas -= eta * kappas
    return Owed(sources, sums, alphas, kappas, thetas, owed.own)


@triton.jit
def put_gradients(owed, sums, chunk, t, i, S: tl.constexpr):
    """Gradients of token t's gates, from its `Owed`; sums: S_{t-1} and S_t. Returns those of source gates so far."""
    tables, kept, grads, place, C = chunk.tables, chunk.kept, chunk.grads, chunk.place, chunk.sizes.C
    token = (place.b * chunk.sizes.N * C + place.first + t) * chunk.sizes.H + place.h
    row = tables.sources_pointer + (place.at * S.BLOCK_C + t - 1) * S.BLOCK_I
    before = tl.load(row + i, mask=(i < C + S.WINDOW - 1) & (t > 0), other=0.0)
    grad_alpha = tl.sum(owed.sources * before, 0) + owed.alphas * (
        of_token(tables.alphas_pointer, place, t - 1, C, 1.0)
    )
    grad_eta = -tl.sum(owed.sources * sums[1], 0)
    if S.MOMENTUM:
        grad_alpha += owed.kappas * of_token(tables.kappas_pointer, place, t - 1, C, 0.0)
        grad_eta -= owed.kappas * of_token(kept.thetas_pointer, place, t, C, 0.0)
        grad_theta = tl.sum(owed.sums * sums[0], 0)
        grad_theta += owed.thetas * of_token(kept.thetas_pointer, place, t - 1, C, 1.0)
        tl.store(grads.grad_theta_pointer + token, grad_theta, mask=t < C)
    tl.store(grads.grad_alpha_pointer + token, grad_alpha, mask=t < C)
    tl.store(grads.grad_eta_pointer + token, grad_eta, mask=t < C)
    back, inside = seen_from(t, i, C, S)
    own = owed.own
    if S.PAIR:
        tl.store(grads.grad_gamma_pointer + token * S.WINDOW + back, owed.sums, mask=inside)
    else:
        own += tl.where(inside, owed.sums, 0.0)
    return own


@triton.jit
def to_the_token_before(owed, own, chunk, t, S: tl.constexpr):
    """`Owed` by the token before t."""
    place, C = chunk.place, chunk.sizes.C
    alpha = gate_at(chunk.gates.alpha, place, t, C, 1.0)
    sums, kappas, thetas = tl.zeros_like(owed.sums), owed.kappas, owed.thetas
    if S.MOMENTUM:
        theta = gate_at(chunk.gates.theta, place, t, C, 1.0)
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
    C = sizes.C
    I = C + S.WINDOW - 1  # noqa: E741
    place = place_of(sizes)
    i = tl.arange(0, S.BLOCK_I)
    chunk = Chunk(gates, tables, kept, incoming, grads, sizes, place, own_gates(gates, place, i, C, S))
    sums, own = tl.zeros([S.BLOCK_I], tl.float32), tl.zeros([S.BLOCK_I], tl.float32)
    sources = tl.load(incoming.to_w_pointer + place.at * I + i, mask=i < I, other=0.0)
    if S.MOMENTUM:
        sums = tl.load(incoming.to_s_pointer + place.at * I + i, mask=i < I, other=0.0)
        last_at = incoming.last_pointer + place.at * 3
        alphas, kappas, thetas = tl.load(last_at), tl.load(last_at + 1), tl.load(last_at + 2)
    else:
        alphas = tl.load(incoming.last_pointer + place.at)
        kappas, thetas = alphas, alphas  # nothing reads them
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
        tl.store(grads.grad_gamma_pointer + place.at * I + i, owed.own, mask=i < I)


def constants_of(rule: MemoryRule, tokens: int, pair: bool, keep: bool) -> Constants:
    """tokens: of a chunk; keep: for a backward."""
    block_c, block_i = padded(tokens), padded(tokens + rule.window - 1)
    return Constants(rule.window, rule.momentum, pair, block_c, block_i, STEP, KEEP=keep and rule.momentum)


def _gates(alpha: Tensor, eta: Tensor, theta: Tensor | None, gamma: Tensor) -> Gates:
    pair = gamma.dim() == 4
    return Gates(
        alpha=Gate(alpha, *alpha.stride()),
        eta=Gate(eta, *eta.stride()),
        theta=None if theta is None else Gate(theta, *theta.stride()),
        gamma=Gate(gamma, *gamma.stride()[:3]) if pair else Gate(gamma, None, None, None),
        stride_w=gamma.stride(3) if pair else None,
    )


class _Coefficients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rule: MemoryRule, tokens: int, alpha: Tensor, eta: Tensor, theta: Tensor | None, gamma: Tensor
    ) -> tuple[Tensor | None, ...]:
        batch, length, heads = alpha.shape
        sizes = Sizes(length // tokens, batch * heads, heads, tokens)
        S = constants_of(rule, tokens, gamma.dim() == 4, any(ctx.needs_input_grad))
        empty = partial(alpha.new_empty, sizes.N, sizes.G)
        sources, momentum = tokens + rule.window - 1, rule.momentum
        tables = Tables(
            alphas_pointer=empty(tokens),
            kappas_pointer=empty(tokens) if momentum else None,
            sources_pointer=empty(S.BLOCK_C, S.BLOCK_I),
            last_pointer=empty(3 if momentum else 1),
            to_w_pointer=empty(sources),
            to_s_pointer=empty(sources) if momentum else None,
        )
        kept = Kept(empty(S.BLOCK_C // STEP, S.BLOCK_I), empty(tokens)) if S.KEEP else Kept(None, None)
        gates = alpha, eta, theta, gamma
        programs = (sizes.N * sizes.G,)
        launch(coefficients_kernel, programs, (_gates(*gates), tables, kept, sizes), S, warps=WARPS)
        ctx.save_for_backward(*gates, *tables[:3], *kept)
        ctx.sizes, ctx.constants = sizes, S
        return tuple(tables)

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gates, kept = saved[:4], Kept(*saved[7:])
        tables = Tables(saved[4], saved[5], saved[6], None, None, None)
        like = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in gates]
        incoming = Tables(*(None if g is None else g.contiguous() for g in gradients))
        arguments = _gates(*gates), tables, kept, incoming, GateGradients(*like), ctx.sizes
        programs = (ctx.sizes.N * ctx.sizes.G,)
        launch(coefficients_backward_kernel, programs, arguments, ctx.constants, warps=WARPS)
        return None, None, *like


def coefficients(rule: MemoryRule, gates: GivenGates, tokens: int, sources: Tensor | None) -> Coefficients:
    """A `SegmentCoefficients` for ns_steps = 0, its fields in the shapes of `Tables`, float32.

    gates: alpha, eta, theta [B, N C, H] and pair gates gamma [B, N C, H, W] with any strides; tokens: C; sources:
    source gates in their place, [N, G, I] and contiguous.
    """
    theta = gates.theta if rule.momentum else None
    gamma = gates.gamma if sources is None else sources.contiguous()
    return Coefficients(*_Coefficients.apply(rule, tokens, gates.alpha, gates.eta, theta, gamma))


def variants() -> list[Variant]:
    """The presets' shape with momentum and pair gates, without both, and with source gates, one token short."""
    rule = MemoryRule(norm="layer", ns_steps=0)
    found = []
    for title, momentum, pair in (("", True, True), (" sum", False, True), (" source", True, False)):
        of = MemoryRule(norm="layer", ns_steps=0, momentum=momentum)
        batch, chunks, tokens, heads = 1, 3, rule.chunk - 1, 3
        empty = partial(torch.empty, device="meta", requires_grad=True)
        one = (batch, chunks * tokens, heads)
        gates = GivenGates(empty(*one), empty(*one), empty(*one), empty(*one, rule.window) if pair else empty(*one))
        own = None if pair else empty(chunks, batch * heads, tokens + rule.window - 1)
        with recording(f"{{}}{title}") as recorded:
            made = [t for t in vars(coefficients(of, gates, tokens, own)).values() if t is not None]
            torch.autograd.grad(made, gates.alpha, [torch.empty_like(t) for t in made])
        found += recorded
    return found
