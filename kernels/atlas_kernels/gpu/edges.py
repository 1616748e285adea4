"""The edges of a memory, one kernel each way: projection to q, k, v, and read to the output projection's input.

Both are bound by device memory: the floor is their inputs, outputs and gradients, once. Of a channel of one token, in
bytes, with bfloat16 activations and float32 q, k, v, y and gradients of these:

    kernel                           reads                        writes            in torch, by count
    short_convolution                2                            4                 about 30
    its backward                     2, 4 of the gradient         2, 16 a block     about 65
    gated_norm                       4, 2 of the gate             2                 about 32
    its backward                     6, 2 of the gradient         6, 4 a block      about 60

A program has the tokens of a block and the channels of one head's q, k or v, of which nothing crosses to another; the
backward computes everything anew, and a block's sums for taps and gains are added up afterwards, in a fixed order.
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

PARTS = 3  # q, k, v
# Elements of the block of a program, tokens by channels; its warps, and loads in flight in a loop.
BLOCK, WARPS, STAGES = 2048, 8, 3
_SHORTEST: tl.constexpr = tl.constexpr(1e-12)  # as torch.nn.functional.normalize


class Sizes(NamedTuple):
    """And the strides of what the projection leaves, q, k and v or their gate, which is dense along K alone."""

    B: Any
    T: Any
    H: Any
    stride_b: Any
    stride_t: Any
    stride_h: Any
    stride_part: Any = None  # of q, k and v


class Constants(NamedTuple):
    """S of the kernels: a program's tokens and channels beside K and TAPS (0 of the norm)."""

    K: int
    TAPS: int
    BLOCK_T: int
    BLOCK_K: int


class HeadGradients(NamedTuple):
    grad_q_pointer: Any  # [B, T, H, K] float32, as the next two
    grad_k_pointer: Any
    grad_v_pointer: Any


class ConvolutionGradients(NamedTuple):
    grad_x_pointer: Any  # out: [B, T, H, 3, K]
    grad_before_pointer: Any  # out: [B, H, 3, K, TAPS - 1]
    grad_taps_pointer: Any  # out: [B, blocks, H, 3, K, TAPS] float32


class NormGradients(NamedTuple):
    grad_out_pointer: Any  # [T, B, H, K]
    grad_y_pointer: Any  # out: [B, T, H, K]
    grad_gate_pointer: Any  # out: [B, T, H, K]
    grad_gain_pointer: Any  # out: [B, blocks, H, K] float32


class Channels(NamedTuple):
    """The input of a program's convolution: one sequence, the channels of one head's q, k or v."""

    x_pointer: Any  # [T, K]
    before_pointer: Any  # [K, TAPS - 1]
    T: Any
    stride_t: Any


@triton.jit
def channels_of(x_pointer, before_pointer, group, sizes, S: tl.constexpr):
    """`Channels` of q, k or v of a head: group counts them, part before head before sequence."""
    b, h, part = group // (3 * sizes.H), group // 3 % sizes.H, group % 3
    x_at = x_pointer + b * sizes.stride_b + h * sizes.stride_h + part * sizes.stride_part
    return Channels(x_at, before_pointer + group * S.K * (S.TAPS - 1), sizes.T, sizes.stride_t)


@triton.jit
def inputs_at(channels, t, k, S: tl.constexpr):
    """What goes into the convolution at the tokens t, those from before the first one too: [tokens, channels]."""
    own = (t >= 0) & (t < channels.T)
    inside = own[:, None] & (k < S.K)[None, :]
    at = channels.x_pointer + t.to(tl.int64)[:, None] * channels.stride_t + k[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if S.TAPS > 1:
        earlier = (t < 0) & (t > -S.TAPS)
        at = k[None, :] * (S.TAPS - 1) + (t + S.TAPS - 1)[:, None]
        inside = earlier[:, None] & (k < S.K)[None, :]
        x += tl.load(channels.before_pointer + at, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def tap_of(taps_pointer, k, back, S: tl.constexpr):
    """Of each channel, the tap for the token so many back: [1, channels]."""
    return tl.load(taps_pointer + k * S.TAPS + S.TAPS - 1 - back, mask=k < S.K, other=0.0).to(tl.float32)[None, :]


@triton.jit
def convolved(channels, taps_pointer, positions, t, k, PACKED: tl.constexpr, S: tl.constexpr):
    """The convolution at the tokens t."""
    z = tl.zeros([t.shape[0], k.shape[0]], tl.float32)
    for back in tl.static_range(S.TAPS):
        x = inputs_at(channels, t - back, k, S)
        if PACKED:
            x = tl.where((positions >= back)[:, None], x, 0.0)
        z += tap_of(taps_pointer, k, back, S) * x
    return z


@triton.jit
def short_convolution_kernel(
    x_pointer,  # [B, T, H, 3, K]
    taps_pointer,  # [H, 3, K, TAPS]
    before_pointer,  # [B, H, 3, K, TAPS - 1]
    positions_pointer,  # [B, T], or None
    out_pointer,  # out: [3, B, T, H, K] float32
    sizes,  # Sizes
    S: tl.constexpr,  # Constants
):
    B, T, H = sizes.B, sizes.T, sizes.H
    blocks = tl.cdiv(T, S.BLOCK_T)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, h, part = group // (3 * H), group // 3 % H, group % 3
    t, k = tl.program_id(0) % blocks * S.BLOCK_T + tl.arange(0, S.BLOCK_T), tl.arange(0, S.BLOCK_K)
    PACKED: tl.constexpr = positions_pointer is not None
    positions = t
    if PACKED:
        positions = tl.load(positions_pointer + b * T + t, mask=t < T, other=0)
    channels = channels_of(x_pointer, before_pointer, group, sizes, S)
    z = convolved(channels, taps_pointer + (h * 3 + part) * S.K * S.TAPS, positions, t, k, PACKED, S)
    y = z * tl.sigmoid(z)
    if part < 2:
        y = y / tl.maximum(tl.sqrt(tl.sum(y * y, 1)), _SHORTEST)[:, None]
    at = ((part * B + b) * T + t) * H + h
    tl.store(out_pointer + at[:, None] * S.K + k[None, :], y, mask=(t < T)[:, None] & (k < S.K)[None, :])


@triton.jit
def short_convolution_backward_kernel(
    x_pointer,  # [B, T, H, 3, K]
    taps_pointer,  # [H, 3, K, TAPS]
    before_pointer,  # [B, H, 3, K, TAPS - 1]
    positions_pointer,  # [B, T], or None
    incoming,  # HeadGradients
    grads,  # ConvolutionGradients
    sizes,  # Sizes
    S: tl.constexpr,  # Constants
):
    T, H = sizes.T, sizes.H
    blocks = tl.cdiv(T + S.TAPS - 1, S.BLOCK_T)
    group, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    b, h, part = group // (3 * H), group // 3 % H, group % 3
    # The tokens whose inputs' gradients are computed, from the first one before the sequence on.
    s, k = block * S.BLOCK_T - (S.TAPS - 1) + tl.arange(0, S.BLOCK_T), tl.arange(0, S.BLOCK_K)
    PACKED: tl.constexpr = positions_pointer is not None
    taps_at = taps_pointer + (h * 3 + part) * S.K * S.TAPS
    channels = channels_of(x_pointer, before_pointer, group, sizes, S)
    inputs = inputs_at(channels, s, k, S)
    grad_pointer = incoming.grad_q_pointer
    if part == 1:
        grad_pointer = incoming.grad_k_pointer
    if part == 2:
        grad_pointer = incoming.grad_v_pointer
    grad_taps_at = grads.grad_taps_pointer + (((b * blocks + block) * H + h) * 3 + part) * S.K * S.TAPS
    grad_x = tl.zeros([S.BLOCK_T, S.BLOCK_K], tl.float32)
    for ahead in tl.range(S.TAPS):
        t = s + ahead
        inside = (t >= 0) & (t < T)
        positions = t
        if PACKED:
            positions = tl.load(positions_pointer + b * T + t, mask=inside, other=0)
        z = convolved(channels, taps_at, positions, t, k, PACKED, S)
        gate = tl.sigmoid(z)
        at = (b * T + t) * H + h
        here = inside[:, None] & (k < S.K)[None, :]
        grad = tl.load(grad_pointer + at[:, None] * S.K + k[None, :], mask=here, other=0.0)
        if part < 2:
            y = z * gate
            length = tl.sqrt(tl.sum(y * y, 1))
            inverse = 1.0 / tl.maximum(length, _SHORTEST)
            # Along y a longer input changes nothing, as long as it is not too short to be divided by its length.
            along = tl.where(length > _SHORTEST, tl.sum(grad * y, 1) * inverse * inverse, 0.0)
            grad = (grad - y * along[:, None]) * inverse[:, None]
        grad_z = grad * (gate + z * gate * (1.0 - gate))
        if PACKED:
            grad_z = tl.where((positions >= ahead)[:, None], grad_z, 0.0)
        grad_x += tap_of(taps_at, k, ahead, S) * grad_z
        tl.store(grad_taps_at + k * S.TAPS + S.TAPS - 1 - ahead, tl.sum(grad_z * inputs, 0), mask=k < S.K)
    own, at = (s >= 0) & (s < T), ((b * T + s) * H + h) * 3 + part
    tl.store(grads.grad_x_pointer + at[:, None] * S.K + k[None, :], grad_x, mask=own[:, None] & (k < S.K)[None, :])
    if S.TAPS > 1:
        at = k[None, :] * (S.TAPS - 1) + (s + S.TAPS - 1)[:, None]
        earlier = (s < 0)[:, None] & (k < S.K)[None, :]
        tl.store(grads.grad_before_pointer + group * S.K * (S.TAPS - 1) + at, grad_x, mask=earlier)


@triton.jit
def normed(y_at, gate_at, gain_at, inside, k, epsilon, S: tl.constexpr):
    """Of a block of tokens: y over its root mean square and the inverse of that, the gate, the gain, in float32."""
    y = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(gain_at, mask=k < S.K, other=0.0).to(tl.float32)[None, :]
    inverse = tl.rsqrt(tl.sum(y * y, 1) / S.K + epsilon)[:, None]
    return y * inverse, inverse, gate, gain


@triton.jit
def gated_norm_kernel(
    y_pointer,  # [B, T, H, K]
    gate_pointer,  # [B, T, H, K]
    gain_pointer,  # [H, K]
    out_pointer,  # out: [T, B, H, K]
    epsilon,
    sizes,  # Sizes
    S: tl.constexpr,  # Constants
):
    B, T, H = sizes.B, sizes.T, sizes.H
    blocks = tl.cdiv(T, S.BLOCK_T)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = group // H, group % H
    t, k = (tl.program_id(0) % blocks * S.BLOCK_T + tl.arange(0, S.BLOCK_T)).to(tl.int64), tl.arange(0, S.BLOCK_K)
    inside, at = (t < T)[:, None] & (k < S.K)[None, :], (((b * T + t) * H + h) * S.K)[:, None] + k[None, :]
    gate_at = gate_pointer + b * sizes.stride_b + h * sizes.stride_h + (t * sizes.stride_t)[:, None] + k[None, :]
    n, _, gate, gain = normed(y_pointer + at, gate_at, gain_pointer + h * S.K + k, inside, k, epsilon, S)
    out = n * gain * gate * tl.sigmoid(gate)
    tl.store(out_pointer + (((t * B + b) * H + h) * S.K)[:, None] + k[None, :], out, mask=inside)


@triton.jit
def gated_norm_backward_kernel(
    y_pointer,  # [B, T, H, K]
    gate_pointer,  # [B, T, H, K]
    gain_pointer,  # [H, K]
    grads,  # NormGradients
    epsilon,
    sizes,  # Sizes
    S: tl.constexpr,  # Constants
):
    B, T, H = sizes.B, sizes.T, sizes.H
    blocks = tl.cdiv(T, S.BLOCK_T)
    group, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    b, h = group // H, group % H
    t, k = (block * S.BLOCK_T + tl.arange(0, S.BLOCK_T)).to(tl.int64), tl.arange(0, S.BLOCK_K)
    inside, at = (t < T)[:, None] & (k < S.K)[None, :], (((b * T + t) * H + h) * S.K)[:, None] + k[None, :]
    gate_at = gate_pointer + b * sizes.stride_b + h * sizes.stride_h + (t * sizes.stride_t)[:, None] + k[None, :]
    n, inverse, gate, gain = normed(y_pointer + at, gate_at, gain_pointer + h * S.K + k, inside, k, epsilon, S)
    grad_at = grads.grad_out_pointer + (((t * B + b) * H + h) * S.K)[:, None] + k[None, :]
    grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    opened = grad * gate * share
    grad_n = opened * gain
    grad_y = (grad_n - n * (tl.sum(grad_n * n, 1) / S.K)[:, None]) * inverse
    tl.store(grads.grad_y_pointer + at, grad_y, mask=inside)
    tl.store(grads.grad_gate_pointer + at, grad * n * gain * (share + gate * share * (1.0 - share)), mask=inside)
    grad_gain_at = grads.grad_gain_pointer + ((b * blocks + block) * H + h) * S.K
    tl.store(grad_gain_at + k, tl.sum(opened * n, 0), mask=k < S.K)


def _constants(width: int, taps: int = 0) -> Constants:
    padded = triton.next_power_of_2(width)
    return Constants(width, taps, BLOCK_T=max(1, BLOCK // padded), BLOCK_K=padded)


def _dense(x: Tensor) -> Tensor:
    """x, with its last dimension dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, taps: Tensor, before: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        (batch, tokens, heads, _, width), constants = qkv.shape, _constants(qkv.shape[-1], taps.shape[-1])
        out = qkv.new_empty(PARTS, batch, tokens, heads, width, dtype=torch.float32)
        grid = (batch * heads * PARTS * triton.cdiv(tokens, constants.BLOCK_T),)
        arguments = qkv, taps, before, positions, out, Sizes(batch, tokens, heads, *qkv.stride()[:4])
        launch(short_convolution_kernel, grid, arguments, constants, warps=WARPS, stages=STAGES)
        ctx.save_for_backward(qkv, taps, before, positions)
        q, k, v = out.unbind(0)
        return q, k, v

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, taps, before, positions = ctx.saved_tensors
        batch, tokens, heads, _, width = qkv.shape
        constants = _constants(width, taps.shape[-1])
        blocks = triton.cdiv(tokens + constants.TAPS - 1, constants.BLOCK_T)
        incoming = HeadGradients(*(g.contiguous() for g in gradients))
        grad_x = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        grad_before = torch.empty_like(before)
        grad_taps = qkv.new_empty(batch, blocks, *taps.shape, dtype=torch.float32)
        grads = ConvolutionGradients(grad_x, grad_before, grad_taps)
        sizes = Sizes(batch, tokens, heads, *qkv.stride()[:4])
        arguments = qkv, taps, before, positions, incoming, grads, sizes
        grid = (batch * heads * PARTS * blocks,)
        launch(short_convolution_backward_kernel, grid, arguments, constants, warps=WARPS, stages=STAGES)
        return grad_x, grad_taps.sum((0, 1)).to(taps.dtype), grad_before, None


def short_convolution(
    qkv: Tensor, taps: Tensor, before: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of `atlas_kernels.short_convolution`, float32."""
    return _ShortConvolution.apply(_dense(qkv), taps.contiguous(), before.contiguous(), positions)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        (batch, tokens, heads, width), constants = y.shape, _constants(y.shape[-1])
        # Laid out as the output projection takes it, [T, B, ...].
        out = gate.new_empty(tokens, batch, heads, width)
        grid = (batch * heads * triton.cdiv(tokens, constants.BLOCK_T),)
        arguments = y, gate, gain, out, epsilon, Sizes(batch, tokens, heads, *gate.stride()[:3])
        launch(gated_norm_kernel, grid, arguments, constants, warps=WARPS, stages=STAGES)
        ctx.save_for_backward(y, gate, gain)
        ctx.epsilon = epsilon
        return out.transpose(0, 1)

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, gain = ctx.saved_tensors
        (batch, tokens, heads, width), constants = y.shape, _constants(y.shape[-1])
        blocks = triton.cdiv(tokens, constants.BLOCK_T)
        grad_y, grad_gate = torch.empty_like(y), torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        grad_gain = y.new_empty(batch, blocks, heads, width, dtype=torch.float32)
        grads = NormGradients(gradient.transpose(0, 1).contiguous(), grad_y, grad_gate, grad_gain)
        arguments = y, gate, gain, grads, ctx.epsilon, Sizes(batch, tokens, heads, *gate.stride()[:3])
        launch(gated_norm_backward_kernel, (batch * heads * blocks,), arguments, constants, warps=WARPS, stages=STAGES)
        return grad_y, grad_gate, grad_gain.sum((0, 1)).to(gain.dtype), None


def gated_norm(y: Tensor, gate: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """`atlas_kernels.gated_norm`; its transpose [T, B, H, K] is dense."""
    return _GatedNorm.apply(y.contiguous(), _dense(gate), gain.contiguous(), epsilon)


def variants() -> list[Variant]:
    """As the trainer launches them: bfloat16 activations, heads of 64 and 128, a document a row and packed ones."""
    found = []
    for width in (64, 128):
        both = (_convolution_variants(width, packed) for packed in (False, True))
        found += [variant for pair in zip(*both, strict=True) for variant in pair]
        found += _norm_variants(width)
    return found


# Sequences, tokens and heads, no multiples of 16: nothing is known of them.
SIZES = (3, 100, 3)


def _convolution_variants(width: int, packed: bool) -> list[Variant]:
    (batch, tokens, heads), size = SIZES, 4
    empty = partial(torch.empty, device="meta", dtype=torch.bfloat16)
    qkv = empty(tokens, batch, heads, 4, width).transpose(0, 1)[..., :PARTS, :].requires_grad_()
    taps, before = empty(heads, PARTS, width, size), empty(batch, heads, PARTS, width, size - 1)
    positions = empty(batch, tokens, dtype=torch.int64) if packed else None
    with recording(f"{{}} {width}{' packed' if packed else ''} bf16") as found:
        heads_of = short_convolution(qkv, taps, before, positions)
        torch.autograd.grad(heads_of, qkv, [torch.empty_like(t) for t in heads_of])
    return found


def _norm_variants(width: int) -> list[Variant]:
    batch, tokens, heads = SIZES
    empty = partial(torch.empty, device="meta", dtype=torch.bfloat16)
    y = empty(batch, tokens, heads, width, dtype=torch.float32, requires_grad=True)
    gate = empty(tokens, batch, heads, 4, width).transpose(0, 1)[..., PARTS, :]
    with recording(f"{{}} {width} bf16") as found:
        out = gated_norm(y, gate, empty(heads, width), 1e-5)
        torch.autograd.grad(out, y, torch.empty_like(out))
    return found
