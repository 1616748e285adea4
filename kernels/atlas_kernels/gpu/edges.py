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

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas_kernels.autocast import unrounded_backward
from atlas_kernels.gpu.variants import Variant

PARTS = 3  # q, k, v
# Elements of the block of a program, tokens by channels, and its warps.
BLOCK, WARPS = 2048, 8
_SHORTEST: tl.constexpr = tl.constexpr(1e-12)  # as torch.nn.functional.normalize


@triton.jit
def inputs_at(x_pointer, before_pointer, t, k, T, stride_t, K: tl.constexpr, TAPS: tl.constexpr):
    """What goes into the convolution at the tokens t, those from before the first one too: [tokens, channels]."""
    own = (t >= 0) & (t < T)
    x = tl.load(
        x_pointer + t.to(tl.int64)[:, None] * stride_t + k[None, :], mask=own[:, None] & (k < K)[None, :], other=0.0
    ).to(tl.float32)
    if TAPS > 1:
        earlier = (t < 0) & (t > -TAPS)
        at = k[None, :] * (TAPS - 1) + (t + TAPS - 1)[:, None]
        x += tl.load(before_pointer + at, mask=earlier[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    return x


@triton.jit
def tap_of(taps_pointer, k, back, K: tl.constexpr, TAPS: tl.constexpr):
    """Of each channel, the tap for the token so many back: [1, channels]."""
    return tl.load(taps_pointer + k * TAPS + TAPS - 1 - back, mask=k < K, other=0.0).to(tl.float32)[None, :]


@triton.jit
def convolved(source, taps_pointer, positions, t, k, K: tl.constexpr, TAPS: tl.constexpr, PACKED: tl.constexpr):
    """The convolution at the tokens t; source: the arguments of `inputs_at` around t and k."""
    x_pointer, before_pointer, T, stride_t = source
    z = tl.zeros([t.shape[0], k.shape[0]], tl.float32)
    for back in tl.static_range(TAPS):
        x = inputs_at(x_pointer, before_pointer, t - back, k, T, stride_t, K, TAPS)
        if PACKED:
            x = tl.where((positions >= back)[:, None], x, 0.0)
        z += tap_of(taps_pointer, k, back, K, TAPS) * x
    return z


@triton.jit
def short_convolution_kernel(
    x_pointer,  # [B, T, H, 3, K]
    taps_pointer,  # [H, 3, K, TAPS]
    before_pointer,  # [B, H, 3, K, TAPS - 1]
    positions_pointer,  # [B, T], or not there
    out_pointer,  # out: [3, B, T, H, K] float32
    B,
    T,
    H,
    stride_b,
    stride_t,
    stride_h,
    stride_part,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_T)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, h, part = group // (3 * H), group // 3 % H, group % 3
    t, k = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    PACKED: tl.constexpr = positions_pointer is not None
    positions = t
    if PACKED:
        positions = tl.load(positions_pointer + b * T + t, mask=t < T, other=0)
    x_at = x_pointer + b * stride_b + h * stride_h + part * stride_part
    source = (x_at, before_pointer + group * K * (TAPS - 1), T, stride_t)
    z = convolved(source, taps_pointer + (h * 3 + part) * K * TAPS, positions, t, k, K, TAPS, PACKED)
    y = z * tl.sigmoid(z)
    if part < 2:
        y = y / tl.maximum(tl.sqrt(tl.sum(y * y, 1)), _SHORTEST)[:, None]
    at = ((part * B + b) * T + t) * H + h
    tl.store(out_pointer + at[:, None] * K + k[None, :], y, mask=(t < T)[:, None] & (k < K)[None, :])


@triton.jit
def short_convolution_backward_kernel(
    x_pointer,  # [B, T, H, 3, K]
    taps_pointer,  # [H, 3, K, TAPS]
    before_pointer,  # [B, H, 3, K, TAPS - 1]
    positions_pointer,  # [B, T], or not there
    q_gradient,  # [B, T, H, K], as the next two
    k_gradient,
    v_gradient,
    x_gradient,  # out: [B, T, H, 3, K]
    before_gradient,  # out: [B, H, 3, K, TAPS - 1]
    taps_sums,  # out: [B, blocks, H, 3, K, TAPS] float32
    T,
    H,
    stride_b,
    stride_t,
    stride_h,
    stride_part,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(T + TAPS - 1, BLOCK_T)
    group, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    b, h, part = group // (3 * H), group // 3 % H, group % 3
    # The tokens whose inputs' gradients are computed, from the first one before the sequence on.
    s, k = block * BLOCK_T - (TAPS - 1) + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    PACKED: tl.constexpr = positions_pointer is not None
    taps_at = taps_pointer + (h * 3 + part) * K * TAPS
    x_at = x_pointer + b * stride_b + h * stride_h + part * stride_part
    source = (x_at, before_pointer + group * K * (TAPS - 1), T, stride_t)
    x = inputs_at(source[0], source[1], s, k, T, stride_t, K, TAPS)
    gradient = q_gradient
    if part == 1:
        gradient = k_gradient
    if part == 2:
        gradient = v_gradient
    sums_at = taps_sums + (((b * blocks + block) * H + h) * 3 + part) * K * TAPS
    grad_x = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for ahead in tl.range(TAPS):
        t = s + ahead
        inside = (t >= 0) & (t < T)
        positions = t
        if PACKED:
            positions = tl.load(positions_pointer + b * T + t, mask=inside, other=0)
        z = convolved(source, taps_at, positions, t, k, K, TAPS, PACKED)
        gate = tl.sigmoid(z)
        at = (b * T + t) * H + h
        grad = tl.load(gradient + at[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
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
        grad_x += tap_of(taps_at, k, ahead, K, TAPS) * grad_z
        tl.store(sums_at + k * TAPS + TAPS - 1 - ahead, tl.sum(grad_z * x, 0), mask=k < K)
    own, at = (s >= 0) & (s < T), ((b * T + s) * H + h) * 3 + part
    tl.store(x_gradient + at[:, None] * K + k[None, :], grad_x, mask=own[:, None] & (k < K)[None, :])
    if TAPS > 1:
        at = k[None, :] * (TAPS - 1) + (s + TAPS - 1)[:, None]
        earlier = (s < 0)[:, None] & (k < K)[None, :]
        tl.store(before_gradient + group * K * (TAPS - 1) + at, grad_x, mask=earlier)


@triton.jit
def normed(y_at, gate_at, gain_at, inside, k, epsilon, K: tl.constexpr):
    """Of a block of tokens: y over its root mean square and the inverse of that, the gate, the gain, in float32."""
    y = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(gain_at, mask=k < K, other=0.0).to(tl.float32)[None, :]
    inverse = tl.rsqrt(tl.sum(y * y, 1) / K + epsilon)[:, None]
    return y * inverse, inverse, gate, gain


@triton.jit
def gated_norm_kernel(
    y_pointer,  # [B, T, H, K]
    gate_pointer,  # [B, T, H, K]
    gain_pointer,  # [H, K]
    out_pointer,  # out: [T, B, H, K]
    epsilon,
    B,
    T,
    H,
    stride_b,  # of the gate
    stride_t,
    stride_h,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_T)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = group // H, group % H
    t, k = (tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64), tl.arange(0, BLOCK_K)
    inside, at = (t < T)[:, None] & (k < K)[None, :], (((b * T + t) * H + h) * K)[:, None] + k[None, :]
    gate_at = gate_pointer + b * stride_b + h * stride_h + (t * stride_t)[:, None] + k[None, :]
    n, _, gate, gain = normed(y_pointer + at, gate_at, gain_pointer + h * K + k, inside, k, epsilon, K)
    out = n * gain * gate * tl.sigmoid(gate)
    tl.store(out_pointer + (((t * B + b) * H + h) * K)[:, None] + k[None, :], out, mask=inside)


@triton.jit
def gated_norm_backward_kernel(
    y_pointer,  # [B, T, H, K]
    gate_pointer,  # [B, T, H, K]
    gain_pointer,  # [H, K]
    gradient,  # [T, B, H, K]
    y_gradient,  # out: [B, T, H, K]
    gate_gradient,  # out: [B, T, H, K]
    gain_sums,  # out: [B, blocks, H, K] float32
    epsilon,
    B,
    T,
    H,
    stride_b,  # of the gate
    stride_t,
    stride_h,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_T)
    group, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    b, h = group // H, group % H
    t, k = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64), tl.arange(0, BLOCK_K)
    inside, at = (t < T)[:, None] & (k < K)[None, :], (((b * T + t) * H + h) * K)[:, None] + k[None, :]
    gate_at = gate_pointer + b * stride_b + h * stride_h + (t * stride_t)[:, None] + k[None, :]
    n, inverse, gate, gain = normed(y_pointer + at, gate_at, gain_pointer + h * K + k, inside, k, epsilon, K)
    grad_at = gradient + (((t * B + b) * H + h) * K)[:, None] + k[None, :]
    grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    opened = grad * gate * share
    grad_n = opened * gain
    grad_y = (grad_n - n * (tl.sum(grad_n * n, 1) / K)[:, None]) * inverse
    tl.store(y_gradient + at, grad_y, mask=inside)
    tl.store(gate_gradient + at, grad * n * gain * (share + gate * share * (1.0 - share)), mask=inside)
    sums_at = gain_sums + ((b * blocks + block) * H + h) * K
    tl.store(sums_at + k, tl.sum(opened * n, 0), mask=k < K)


def _block(width: int) -> dict[str, int]:
    """A program's tokens and channels."""
    padded = triton.next_power_of_2(width)
    return {"BLOCK_T": max(1, BLOCK // padded), "BLOCK_K": padded}


def _dense(x: Tensor) -> Tensor:
    """x, with its last dimension dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, taps: Tensor, before: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        (batch, tokens, heads, _, width), block = qkv.shape, _block(qkv.shape[-1])
        out = qkv.new_empty(PARTS, batch, tokens, heads, width, dtype=torch.float32)
        grid = (batch * heads * PARTS * triton.cdiv(tokens, block["BLOCK_T"]),)
        short_convolution_kernel[grid](
            qkv, taps, before, positions, out, batch, tokens, heads, *qkv.stride()[:4],
            K=width, TAPS=taps.shape[-1], **block, num_warps=WARPS,
        )  # fmt: skip
        ctx.save_for_backward(qkv, taps, before, positions)
        q, k, v = out.unbind(0)
        return q, k, v

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, taps, before, positions = ctx.saved_tensors
        (batch, tokens, heads, _, width), block = qkv.shape, _block(qkv.shape[-1])
        size = taps.shape[-1]
        blocks = triton.cdiv(tokens + size - 1, block["BLOCK_T"])
        grad_x = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        grad_before = torch.empty_like(before)
        sums = qkv.new_empty(batch, blocks, *taps.shape, dtype=torch.float32)
        short_convolution_backward_kernel[(batch * heads * PARTS * blocks,)](
            qkv, taps, before, positions, *(g.contiguous() for g in gradients), grad_x, grad_before, sums,
            tokens, heads, *qkv.stride()[:4], K=width, TAPS=size, **block, num_warps=WARPS,
        )  # fmt: skip
        return grad_x, sums.sum((0, 1)).to(taps.dtype), grad_before, None


def short_convolution(
    qkv: Tensor, taps: Tensor, before: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of `atlas_kernels.short_convolution`, float32."""
    return _ShortConvolution.apply(_dense(qkv), taps.contiguous(), before.contiguous(), positions)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        (batch, tokens, heads, width), block = y.shape, _block(y.shape[-1])
        # Laid out as the output projection takes it, [T, B, ...].
        out = gate.new_empty(tokens, batch, heads, width)
        gated_norm_kernel[(batch * heads * triton.cdiv(tokens, block["BLOCK_T"]),)](
            y, gate, gain, out, epsilon, batch, tokens, heads, *gate.stride()[:3], K=width, **block, num_warps=WARPS
        )
        ctx.save_for_backward(y, gate, gain)
        ctx.epsilon = epsilon
        return out.transpose(0, 1)

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, gain = ctx.saved_tensors
        (batch, tokens, heads, width), block = y.shape, _block(y.shape[-1])
        blocks = triton.cdiv(tokens, block["BLOCK_T"])
        grad_y, grad_gate = torch.empty_like(y), torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        sums = y.new_empty(batch, blocks, heads, width, dtype=torch.float32)
        gated_norm_backward_kernel[(batch * heads * blocks,)](
            y, gate, gain, gradient.transpose(0, 1).contiguous(), grad_y, grad_gate, sums, ctx.epsilon,
            batch, tokens, heads, *gate.stride()[:3], K=width, **block, num_warps=WARPS,
        )  # fmt: skip
        return grad_y, grad_gate, sums.sum((0, 1)).to(gain.dtype), None


def gated_norm(y: Tensor, gate: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """`atlas_kernels.gated_norm`; its transpose [T, B, H, K] is dense."""
    return _GatedNorm.apply(y.contiguous(), _dense(gate), gain.contiguous(), epsilon)


def variants() -> list[Variant]:
    """As the trainer launches them: bfloat16 activations, heads of 64 and 128, a document a row and packed ones."""
    found = []
    for width in (64, 128):
        for kernel in (short_convolution_kernel, short_convolution_backward_kernel):
            found += [_variant(kernel, width, packed) for packed in (False, True)]
        found += [_variant(kernel, width, False) for kernel in (gated_norm_kernel, gated_norm_backward_kernel)]
    return found


FLOATS = ("out_pointer", "y_pointer", "y_gradient", "q_gradient", "k_gradient", "v_gradient", "taps_sums", "gain_sums")


def _variant(kernel: Any, width: int, packed: bool) -> Variant:
    constants: dict[str, object] = {"K": width, **_block(width)}
    if "TAPS" in kernel.arg_names:
        constants["TAPS"] = 4
        if not packed:
            constants["positions_pointer"] = None
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name.startswith("stride"):
            signature[name] = "i32:16"
        elif name in ("B", "T", "H"):
            signature[name] = "i32"
        elif name == "epsilon":
            signature[name] = "fp32"
        elif name == "positions_pointer":
            signature[name] = "*i64"
        elif name in FLOATS and not (name == "out_pointer" and kernel is gated_norm_kernel):
            signature[name] = "*fp32"
        else:
            signature[name] = "*bf16"
    title = f"{kernel.__name__.removesuffix('_kernel')} {width}{' packed' if packed else ''} bf16"
    return Variant(title, kernel, signature, constants, WARPS, 3)
