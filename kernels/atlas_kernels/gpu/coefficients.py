"""What the gates say of every chunk (`writes.Coefficients`), one kernel each way: what `impl="triton"` runs for it.

They run the recurrences themselves, token by token in float32, with no matrix of decays. At the sources of a chunk

    S_t = theta_t S_{t-1} + Gm_t      C_t = alpha_t C_{t-1} - eta_t S_t          (S_t = Gm_t without momentum)

take five FLOPs a token and source, where C = TA diag(eta) TT Gm takes two products of matrices. A gate of exactly 0
needs no care, and the gradient is exact there. One program is a chunk of a memory, with a lane for each source. Lanes
meet in the backward's sums alone, which have one order.

A chunk of a memory at C = 64, W = 16 (79 sources, padded to 128), momentum, pair gates; by count, not measured:

    kernel                   KFLOP  device memory, KB                            registers (sm_80 / 90 / 100)
    coefficients             25     5 gates in; 33 tables, 8 kept out            62 / 64 / 64
    coefficients_backward    66     5 gates, 33 tables, 33 of their gradients,   168 / 136 / 104
                                    8 kept in; 5 gradients of gates out

In torch the same is some forty passes over tables of 20 KB. The sums S_t of all tokens would be 32 KB a chunk. The
forward keeps one in `STEP`, from which the backward computes the next ones again; it goes from a chunk's last token to
its first. Gates are read by their strides, in the caller's layout.
"""

from __future__ import annotations

from dataclasses import replace
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
STEP, WARPS = 4, 1


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
def of_token(pointer, t, C, other):
    """What a chunk's table [C] has of token t, `other` outside it."""
    return tl.load(pointer + t, mask=(t >= 0) & (t < C), other=other)


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


def constants_of(rule: MemoryRule, tokens: int, pair: bool, keep: bool) -> Constants:
    """tokens: of a chunk; keep: for a backward."""
    block_c, block_i = padded(tokens), padded(tokens + rule.window - 1)
    keep = keep and rule.momentum
    return Constants(rule.window, rule.momentum, pair, tokens == block_c, block_c, block_i, STEP, keep)


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
    """Whole chunks of the presets' shape, with momentum and pair gates, without momentum, and with source gates; and
    one token short, which a sequence's last chunk may be."""
    rule = MemoryRule(norm="layer", ns_steps=0)
    return [
        *_variants("", rule, rule.chunk, pair=True),
        *_variants(" sum", replace(rule, momentum=False), rule.chunk, pair=True),
        *_variants(" source window 1", replace(rule, window=1), rule.chunk, pair=False),
        *_variants(" source 63", rule, rule.chunk - 1, pair=False),
        *_variants(" 63", rule, rule.chunk - 1, pair=True),
    ]


def _variants(title: str, rule: MemoryRule, tokens: int, pair: bool) -> list[Variant]:
    """Both ways. Of so few heads and chunks nothing is known: they are no multiples of 16."""
    batch, chunks, heads = 1, 3, 3
    empty = partial(torch.empty, device="meta", requires_grad=True)
    alpha, eta, theta = (empty(batch, chunks * tokens, heads) for _ in range(3))
    gamma = empty(batch, chunks * tokens, heads, *([rule.window] if pair else []))
    own = None if pair else empty(chunks, batch * heads, tokens + rule.window - 1)
    with recording(f"{{}}{title}") as found:
        of = coefficients(rule, GivenGates(alpha, eta, theta, gamma), tokens, own)
        made = [t for t in vars(of).values() if t is not None]
        torch.autograd.grad(made, alpha, [torch.empty_like(t) for t in made])
    return found
