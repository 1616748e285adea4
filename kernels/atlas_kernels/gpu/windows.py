"""The sources of every chunk, its tokens and their halo, one kernel each way: `chunked.Layout.with_halo` on a GPU.

Both only move bytes. Of a chunk of 64 tokens and a halo of 15, of a head of 64, in float32; by count, not measured:

    kernel     programs                            device memory, KB     in torch    registers (sm_80 / 90 / 100)
    windows    32 sources of a chunk and memory    16 in, 20 out         72          44 / 40 / 40
    fold       32 tokens of a memory               20 in, 16 out         116         52 / 52 / 54

The backward adds what the chunks that see a token owe it, the last chunk first: one program owns a token. In torch that
takes two operators a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas_kernels.gpu.launch import Variant, launch, recording

# Elements of a program's block, sources by channels, and its warps.
BLOCK, WARPS = 2048, 4


class Sequence(NamedTuple):
    """Tokens and their halo; both are dense along their channels."""

    halo_pointer: Any  # [B, W-1, H, K] and contiguous
    tokens_pointer: Any  # [B, N C, H, K]
    stride_b: Any  # of the tokens, as the next two
    stride_t: Any
    stride_h: Any


class Gradients(NamedTuple):
    grad_windows_pointer: Any  # [N, G, I, K]
    grad_following_pointer: Any  # [B, W-1, H, K]; None where nobody asked for the halo that follows
    grad_halo_pointer: Any  # out: [B, W-1, H, K]
    grad_tokens_pointer: Any  # out: [B, N C, H, K]


class Sizes(NamedTuple):
    N: Any
    G: Any  # B x H
    H: Any
    C: Any


class Constants(NamedTuple):
    """S of the kernels."""

    BEFORE: int  # W - 1
    K: int
    BLOCK_T: int
    BLOCK_K: int


@triton.jit
def windows_kernel(
    sequence,  # Sequence
    out_pointer,  # out: [N, G, I, K]
    sizes,  # Sizes
    S: tl.constexpr,  # Constants
):
    I = sizes.C + S.BEFORE  # noqa: E741
    blocks = tl.cdiv(I, S.BLOCK_T)
    at = (tl.program_id(0) // blocks).to(tl.int64)
    n, g = at // sizes.G, at % sizes.G
    b, h = g // sizes.H, g % sizes.H
    i, k = tl.program_id(0) % blocks * S.BLOCK_T + tl.arange(0, S.BLOCK_T), tl.arange(0, S.BLOCK_K)
    t = n * sizes.C + i - S.BEFORE
    inside = (i < I)[:, None] & (k < S.K)[None, :]
    own = inside & (t >= 0)[:, None]
    tokens_at = sequence.tokens_pointer + b * sequence.stride_b + h * sequence.stride_h
    x = tl.load(tokens_at + (t * sequence.stride_t)[:, None] + k[None, :], mask=own, other=0.0)
    if S.BEFORE > 0:
        rows = ((b * S.BEFORE + t + S.BEFORE) * sizes.H + h) * S.K
        x += tl.load(sequence.halo_pointer + rows[:, None] + k[None, :], mask=inside & (t < 0)[:, None], other=0.0)
    tl.store(out_pointer + ((at * I + i) * S.K)[:, None] + k[None, :], x, mask=inside)


@triton.jit
def fold_kernel(
    grads,  # Gradients
    sizes,  # Sizes
    S: tl.constexpr,  # Constants
):
    N, G, H, C = sizes.N, sizes.G, sizes.H, sizes.C
    I, T = C + S.BEFORE, N * C  # noqa: E741
    blocks = tl.cdiv(S.BEFORE + T, S.BLOCK_T)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = g // H, g % H
    # Counted from the halo's first token, as a chunk's sources are.
    p, k = tl.program_id(0) % blocks * S.BLOCK_T + tl.arange(0, S.BLOCK_T), tl.arange(0, S.BLOCK_K)
    n, channels = p // C, (k < S.K)[None, :]
    total = tl.zeros([S.BLOCK_T, S.BLOCK_K], tl.float32)
    behind = 0
    while behind * C < I:
        i = p - (n - behind) * C
        seen = (n >= behind) & (n - behind < N) & (i < I)
        rows = (((n - behind) * G + g) * I + i) * S.K
        at = grads.grad_windows_pointer + rows[:, None] + k[None, :]
        total += tl.load(at, mask=seen[:, None] & channels, other=0.0)
        behind += 1
    halo_rows = ((b * S.BEFORE + p) * H + h) * S.K
    if S.BEFORE > 0:
        if grads.grad_following_pointer is not None:
            follows = (p >= T) & (p < T + S.BEFORE)
            rows = ((b * S.BEFORE + p - T) * H + h) * S.K
            at = grads.grad_following_pointer + rows[:, None] + k[None, :]
            total += tl.load(at, mask=follows[:, None] & channels, other=0.0)
        at = grads.grad_halo_pointer + halo_rows[:, None] + k[None, :]
        tl.store(at, total, mask=(p < S.BEFORE)[:, None] & channels)
    rows = ((b * T + p - S.BEFORE) * H + h) * S.K
    own = (p >= S.BEFORE) & (p < S.BEFORE + T)
    tl.store(grads.grad_tokens_pointer + rows[:, None] + k[None, :], total, mask=own[:, None] & channels)


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, halo: Tensor, tokens: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
        batch, length, heads, width = tokens.shape
        sizes = Sizes(chunks, batch * heads, heads, length // chunks)
        sources, padded = sizes.C + halo.shape[1], triton.next_power_of_2(width)
        rows = min(max(1, BLOCK // padded), triton.next_power_of_2(sources))
        S = Constants(halo.shape[1], width, BLOCK_T=rows, BLOCK_K=padded)
        out = tokens.new_empty(chunks, sizes.G, sources, width)
        sequence = Sequence(halo.contiguous(), tokens, *tokens.stride()[:3])
        grid = (chunks * sizes.G * triton.cdiv(sources, S.BLOCK_T),)
        launch(windows_kernel, grid, (sequence, out, sizes), S, warps=WARPS)
        ctx.set_materialize_grads(False)
        ctx.constants, ctx.sizes = S, sizes
        # The last chunk's last sources; a copy, for a view would keep every chunk's alive as long as the state lives.
        following = out[-1, :, sizes.C :].unflatten(0, (batch, heads)).transpose(1, 2)
        return out, following.clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_windows: Tensor | None, grad_following: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        S, sizes = ctx.constants, ctx.sizes
        batch, sources, length = sizes.G // sizes.H, sizes.C + S.BEFORE, sizes.N * sizes.C
        given = grad_windows if grad_windows is not None else grad_following
        if given is None:
            return None, None, None
        if grad_windows is None:
            grad_windows = given.new_zeros(sizes.N, sizes.G, sources, S.K)
        empty = partial(given.new_empty, dtype=torch.float32)
        grads = Gradients(
            grad_windows_pointer=grad_windows.contiguous(),
            grad_following_pointer=None if grad_following is None else grad_following.contiguous(),
            grad_halo_pointer=empty(batch, S.BEFORE, sizes.H, S.K),
            grad_tokens_pointer=empty(batch, length, sizes.H, S.K),
        )
        grid = (sizes.G * triton.cdiv(S.BEFORE + length, S.BLOCK_T),)
        launch(fold_kernel, grid, (grads, sizes), S, warps=WARPS)
        return grads.grad_halo_pointer, grads.grad_tokens_pointer, None


def windows(halo: Tensor, tokens: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """As `chunked.windows`, float32."""
    width = tokens.shape[3:]
    if not width:
        halo, tokens = halo.unsqueeze(-1), tokens.unsqueeze(-1)
    elif tokens.stride(-1) != 1:
        tokens = tokens.contiguous()
    out, following = _Windows.apply(halo, tokens, chunks)
    return (out, following) if width else (out.squeeze(-1), following.squeeze(-1))


def variants() -> list[Variant]:
    """Heads of 64, and one gate a token."""
    batch, chunks, tokens, heads, before = 1, 3, 63, 3, 15
    found = []
    for width in (64, 1):
        empty = partial(torch.empty, device="meta", requires_grad=True)
        given = empty(batch, before, heads, width), empty(batch, chunks * tokens, heads, width)
        with recording(f"{{}} of {width}") as recorded:
            made = windows(*given, chunks)
            torch.autograd.grad(made, given, [torch.empty_like(t) for t in made])
        found += recorded
    return found
