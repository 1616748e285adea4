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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas_kernels.autocast import unrounded_backward
from atlas_kernels.gpu.coefficients.backward import GateGradients, coefficients_backward_kernel
from atlas_kernels.gpu.coefficients.forward import Constants, Gate, Gates, Kept, Sizes, coefficients_kernel
from atlas_kernels.gpu.launch import Variant, launch, recording
from atlas_kernels.gpu.scan import padded
from atlas_kernels.gpu.scan.pieces import Tables
from atlas_kernels.rule import Gates as GivenGates
from atlas_kernels.rule import MemoryRule
from atlas_kernels.writes import Coefficients

# Tokens whose sums the backward holds at once, and warps of a program: a lane has four sources of 128.
STEP, WARPS = 4, 1


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


def coefficients(
    rule: MemoryRule, _offset: int, gates: GivenGates, tokens: int, sources: Tensor | None
) -> Coefficients:
    """A `SegmentCoefficients` for ns_steps = 0, its fields in the shapes of `Tables`, float32.

    _offset: not read, for every token writes. gates: alpha, eta, theta [B, N C, H] and pair gates gamma
    [B, N C, H, W] with any strides; tokens: C; sources: source gates in their place, [N, G, I] and contiguous.
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
        of = coefficients(rule, 0, GivenGates(alpha, eta, theta, gamma), tokens, own)
        made = [t for t in vars(of).values() if t is not None]
        torch.autograd.grad(made, alpha, [torch.empty_like(t) for t in made])
    return found
