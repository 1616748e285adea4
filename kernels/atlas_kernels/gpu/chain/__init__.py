"""Periodic writes in Triton, all chunks of a segment in four launches: `impl="triton"` with few writes a chunk.

Of one matrix of a memory and the K writing tokens of a chunk, with W and S as they enter and the gradients' factors:

    S_k = thetas_k S + sum_i sums_ki wide_i narrow_i^T,   O_k = NS(S_k)
    out_t = alphas_t W x_t + sum_k of_writes_kt O_k x_t      or with the transposes
    W' = alphas_C W + sum_k of_writes_kC O_k,   S' = S_C

The map of `orthogonal_writes`, which goes chunk by chunk and takes the K matrices of a chunk in parallel. Here a
program goes through the chunks of one memory with Newton-Schulz inside: as many programs as memories, and no launch
more for a longer sequence. Few memories fill a GPU only where the K of a chunk go in parallel (`covers`).
Dims: N chunks, G = B x H memories, C tokens, I sources, D lifted key = value, F hidden.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas_kernels.autocast import unrounded_backward
from atlas_kernels.chunked import SegmentScan
from atlas_kernels.chunked import Tokens as SegmentTokens
from atlas_kernels.gpu.chain.forward import chain_read_kernel, chain_write_kernel
from atlas_kernels.gpu.chain.pieces import (
    Factors,
    Owed,
    ReadGradients,
    Scratch,
    Shape,
    States,
    Tables,
    WriteGradients,
)
from atlas_kernels.gpu.chain.read_backward import chain_read_backward_kernel
from atlas_kernels.gpu.chain.write_backward import chain_write_backward_kernel
from atlas_kernels.gpu.coverage import size_refusal
from atlas_kernels.gpu.launch import TRITON_DTYPES, Variant, launch, recording
from atlas_kernels.gpu.newton_schulz import coefficient_table, plan, rank_blocks
from atlas_kernels.gpu.scan.pieces import Sizes, Tokens
from atlas_kernels.gpu.segment import segment_scan_of
from atlas_kernels.layout import gates_by_chunk
from atlas_kernels.rule import Gates, MemoryRule
from atlas_kernels.writes import OrthogonalCoefficients, orthogonal_coefficients_of, places_of_writes

# Of a chunk. With more, the matrices of a chunk fill a GPU by themselves.
MOST_WRITES = 8
KERNELS = {
    "write": chain_write_kernel,
    "read": chain_read_kernel,
    "read_backward": chain_read_backward_kernel,
    "write_backward": chain_write_backward_kernel,
}
# Hidden rows at a time, and columns of X, pinned so that equal inputs give equal bits. All take 4 warps:
# Newton-Schulz and the reads have 64 rows, which 8 would multiply twice.
CONFIGURATIONS = {"write": (32, 256), "read": (32, 256), "read_backward": (32, 256), "write_backward": (16, 64)}
WARPS = 4
SOURCES = 64  # at a time: more would spill


def covers(rule: MemoryRule, weights: tuple[Tensor, ...], products: torch.dtype) -> bool:
    """Whether the chain takes a call that `coverage.refusal` lets pass; weights as in `omega_memory`."""
    if rule.memory == "linear" or not 1 <= rule.chunk // rule.ns_period <= MOST_WRITES:
        return False
    (V, F), D = weights[0].shape[-2:], weights[1].shape[-1]
    fits = D == V <= F and size_refusal(rule, D, V, F, products) is None
    return fits and plan(D, F, products, backward=False).whole


def held_of_step(rule: MemoryRule, products: torch.dtype) -> float:
    """As `Kernels.held_of_step`: O_k in the products' dtype, and the weights and momentum that enter a chunk."""
    writes = rule.chunk // rule.ns_period
    return (products.itemsize / torch.float32.itemsize + 2 / writes) / rule.ns_steps


def chain_coefficients(
    rule: MemoryRule, offset: int, gates: Gates, tokens: int, sources: Tensor | None
) -> OrthogonalCoefficients:
    """A `SegmentCoefficients`: what `segment_chain` takes of the gates."""
    writes = places_of_writes(rule, offset, tokens)
    of_chunks, band = gates_by_chunk(gates, tokens, sources)
    of = orthogonal_coefficients_of(rule, *of_chunks, band, writes)
    if rule.momentum:
        return of
    # Without momentum none leaves.
    return replace(of, thetas=of.thetas[..., : len(writes)], sums=of.sums[..., : len(writes), :])


def segment_chain(products: torch.dtype) -> SegmentScan:
    """The chain of one segment with its products' operands rounded to `products`; sums and states stay float32."""
    return segment_scan_of(_SegmentChain, products)


def shape_of(
    rule: MemoryRule, products: torch.dtype, sizes: Sizes, of: OrthogonalCoefficients, widths: tuple[int, int]
) -> Shape:
    """The constants of a segment's launches; widths D, F. BLOCK_F and X's columns are each launch's own."""
    pad = lambda n: max(16, triton.next_power_of_2(n))  # noqa: E731
    D, F = widths
    return Shape(
        D=D,
        V=D,
        F=F,
        LAYER=rule.norm == "layer",
        L2=rule.loss == "l2",
        MOMENTUM=rule.momentum,
        GATED=rule.memory == "gated_mlp",
        PARTS=3 if rule.memory == "gated_mlp" else 2,
        PRODUCTS=TRITON_DTYPES[products],
        STEPS=rule.ns_steps,
        TURNS=triton.next_power_of_2(sizes.N),
        WRITES=of.of_writes.shape[-2],
        FORMED=of.thetas.shape[-1],
        BLOCK_I=min(SOURCES, pad(sizes.I)),
        TILES=triton.cdiv(sizes.I, min(SOURCES, pad(sizes.I))),
        BLOCK_D=pad(D),
        BLOCK_V=pad(D),
        BLOCK_C=pad(sizes.C),
        BLOCK_J=triton.next_power_of_2(max(1, of.thetas.shape[-1])),
        BLOCK_F=0,
        BLOCK_N=0,
        BLOCKS=0,
        RANKS_I=rank_blocks(sizes.I),
        RANKS_C=rank_blocks(sizes.C),
        SHARE=float(rule.anchor_gradient),
    )


def configured(kernel: str, shape: Shape) -> Shape:
    """`shape` with as many hidden rows at a time and columns of X as CONFIGURATIONS and the sizes allow."""
    block, columns = CONFIGURATIONS[kernel]
    while shape.F % block:
        block //= 2
    if kernel == "write_backward" and shape.PRODUCTS == triton.language.float32:
        columns = 32  # three tf32 products in place of one: of 64, tensor memory would not hold the operands
    columns = min(columns, max(16, triton.next_power_of_2(shape.F)))
    return shape._replace(BLOCK_F=block, BLOCK_N=columns, BLOCKS=triton.cdiv(shape.F, columns))


def _launch(kernel: str, programs: int, arguments: tuple[Any, ...], shape: Shape) -> None:
    launch(KERNELS[kernel], (programs,), arguments, configured(kernel, shape), warps=WARPS)


class _SegmentChain(torch.autograd.Function):
    """(y, weights, momentum that leave). Matrices: all weights, all anchors, all momenta."""

    @staticmethod
    def forward(
        ctx: Any, rule: MemoryRule, products: torch.dtype, q: Tensor, read_residual: Tensor, x: Tensor, v: Tensor,
        r: Tensor, alphas: Tensor, of_writes: Tensor, thetas: Tensor, sums: Tensor, *matrices: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        count, keep = len(matrices) // (3 if rule.momentum else 2), any(ctx.needs_input_grad)
        (N, G, C, D), I, F = q.shape, x.shape[2], matrices[0].shape[1]  # noqa: E741
        sizes = Sizes(N, G, C, I)
        of = OrthogonalCoefficients(alphas, of_writes, thetas, sums)
        shape = shape_of(rule, products, sizes, of, (D, F))._replace(KEEP=keep)
        tokens = Tokens(*(t.contiguous() for t in (q, read_residual, x, v, r)))
        steps = coefficient_table(rule.ns_steps, rule.ns_coefficients, q.device)
        gates = alphas, of_writes, of_writes[..., -1], thetas, sums, steps
        tables = Tables(*(t.contiguous() for t in gates))
        states = _entering(sizes, shape, products, *(matrices[i * count : (i + 1) * count] for i in range(3)))

        y = torch.empty_like(tokens.read_residual_pointer)
        read = torch.empty_like(y) if keep and shape.LAYER else None
        written = tokens._replace(q_pointer=None, read_residual_pointer=None)
        _launch("write", G, (written, tables, states, _factors(sizes, shape, products, y), sizes), shape)
        _launch("read", N * G, (tokens, tables, states, y, read, sizes._replace(N=None)), shape)
        if keep:
            ctx.save_for_backward(*tokens._replace(read_residual_pointer=None), *tables, read, *states)
            ctx.shape, ctx.sizes, ctx.products = shape, sizes, products
        # Copies: a view would keep every chunk's matrices alive for as long as the state lives.
        left = [states.weights_pointer, *([states.momenta_pointer] if rule.momentum else [])]
        return y, *(slots[-1, :, part].clone() for slots in left for part in range(count))

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, grad_y: Tensor, *grad_matrices: Tensor) -> tuple[Tensor | None, ...]:
        shape, sizes, saved, products = ctx.shape, ctx.sizes, ctx.saved_tensors, ctx.products
        N, G, C, I = sizes  # noqa: E741
        tokens, tables, read, states = Tokens(*saved[:5]), Tables(*saved[5:11]), saved[11], States(*saved[12:])
        grad_y = grad_y.contiguous()
        owed = Owed(torch.empty_like(grad_y), grad_y.new_empty(N, G, shape.PARTS, C, shape.F, dtype=products))
        grad_q, grad_alphas, grad_of_writes = map(
            torch.empty_like, (tokens.q_pointer, tables.alphas_pointer, tables.of_writes_pointer)
        )
        grads = ReadGradients(grad_q, grad_alphas, grad_of_writes, owed)
        arguments = grad_y, tokens, tables, states, read, grads, sizes._replace(N=None)
        _launch("read_backward", N * G, arguments, shape)

        part = lambda t: t.new_empty(N, G, shape.PARTS, *t.shape[2:])  # noqa: E731
        grad_weights = torch.stack(grad_matrices[: shape.PARTS], 1).unsqueeze(0)
        grad_weights = torch.cat([torch.zeros_like(grad_weights), grad_weights])
        grad_momenta = torch.stack(grad_matrices[shape.PARTS :], 1) if shape.MOMENTUM else grad_weights
        write = WriteGradients(
            grad_value_pointer=torch.empty_like(tokens.v_pointer),
            grad_x_pointer=torch.empty_like(tokens.x_pointer),
            grad_keep_pointer=grad_y.new_empty(N, G, shape.PARTS),
            grad_at_last_pointer=part(tables.at_last_pointer),
            grad_thetas_pointer=part(tables.thetas_pointer),
            grad_sums_pointer=part(tables.sums_pointer),
            grad_weights_pointer=grad_weights,
            grad_momenta_pointer=grad_momenta,
        )
        scratch = _scratch(sizes, shape, products, grad_y)
        _launch("write_backward", G, (tokens, tables, states, owed, write, scratch, sizes), shape)
        grad_alphas[..., -1].add_(write.grad_keep_pointer.sum(2))
        grad_of_writes[..., -1].add_(write.grad_at_last_pointer.sum(2))
        grad_value = write.grad_value_pointer
        return (
            *(None, None, grad_q, grad_y, write.grad_x_pointer),
            *(grad_value.neg(), grad_value if shape.L2 else None),
            *(grad_alphas, grad_of_writes),
            *(write.grad_thetas_pointer.sum(2) if shape.MOMENTUM else None, write.grad_sums_pointer.sum(2)),
            *(*grad_weights[1].unbind(1), *grad_weights[0].unbind(1)),
            *(grad_momenta.unbind(1) if shape.MOMENTUM else ()),
        )


def _entering(
    sizes: Sizes,
    shape: Shape,
    products: torch.dtype,
    weights: tuple[Tensor, ...],
    anchors: tuple[Tensor, ...],
    momenta: tuple[Tensor, ...],
) -> States:
    """N + 2 slots of all matrices, the first two filled; room for what the chain leaves to the reads."""
    (N, G, _, I), matrix = sizes, (shape.F, shape.D)  # noqa: E741
    empty = weights[0].new_empty

    def slots(matrices: tuple[Tensor, ...]) -> Tensor:
        filled = empty(N + 2, G, shape.PARTS, *matrix)
        torch.stack(matrices, 1, out=filled[1])
        return filled

    of_weights = slots(weights)
    torch.stack(anchors, 1, out=of_weights[0])
    return States(
        weights_pointer=of_weights,
        momenta_pointer=slots(momenta) if momenta else of_weights,
        stack_pointer=empty(N, G, shape.PARTS, shape.WRITES, *matrix, dtype=products),
        norms_pointer=empty(N, G, shape.PARTS, shape.WRITES),
        o_pointer=empty(N, G, I, shape.D),
    )


def _factors(sizes: Sizes, shape: Shape, products: torch.dtype, like: Tensor) -> Factors:
    e = like.new_empty(sizes.G, sizes.I, shape.D)
    return Factors(e, like.new_empty(sizes.G, shape.PARTS, sizes.I, shape.F, dtype=products))


def _scratch(sizes: Sizes, shape: Shape, products: torch.dtype, like: Tensor) -> Scratch:
    """What the backward of each memory puts aside; like: a float32 tensor on its device."""
    G, I = sizes.G, sizes.I  # noqa: E741
    x = configured("write_backward", shape)
    work = x.BLOCKS * x.BLOCK_N * x.BLOCK_D
    trail = shape.STEPS * (work + 2 * x.BLOCK_D**2) + 2 * x.BLOCK_D**2
    # float16 would not hold what Newton-Schulz's gradient multiplies by the inverse of a small momentum.
    held = torch.bfloat16 if products == torch.bfloat16 else torch.float32
    return Scratch(
        factors=_factors(sizes, shape, products, like),
        trail_pointer=like.new_empty(G, trail, dtype=products),
        work_pointer=like.new_empty(G, work),
        formed_pointer=like.new_empty(G, shape.WRITES, shape.F, shape.D, dtype=held),
        grad_wide_pointer=like.new_empty(G, shape.PARTS, I, shape.F),
    )


def variants() -> list[Variant]:
    """The kernels of the presets' shape with four writes a chunk; the chain's with one."""
    rule = MemoryRule(ns_period=16)
    alone = _variants(" one write", replace(rule, ns_period=64))
    return [
        *_variants("", rule),
        *(variant for variant in alone if variant.kernel in (KERNELS["write"], KERNELS["write_backward"])),
        *_variants(" gated layer", replace(rule, memory="gated_mlp", norm="layer")),
    ]


def _variants(title: str, rule: MemoryRule) -> list[Variant]:
    """Recorded of chunks one token short, as those of the scan, with the writes of a whole one."""
    N, G, C, D, F = 3, 3, rule.chunk - 1, 64, 256
    I = C + rule.window - 1  # noqa: E741
    empty = partial(torch.empty, device="meta", requires_grad=True)
    tokens = SegmentTokens(empty(N, G, C, D), empty(N, G, C, D), *(empty(N, G, I, D) for _ in range(3)))
    K = len(places_of_writes(rule, 0, rule.chunk))
    of = OrthogonalCoefficients(empty(N, G, C), empty(N, G, K, C), empty(N, G, K), empty(N, G, K, I))
    matrices = (empty(G, F, D),) * (3 if rule.memory == "gated_mlp" else 2)
    with recording(f"{{}}{title} bf16") as found:
        y, weights, momenta = segment_chain(torch.bfloat16)(rule, of, tokens, matrices, matrices, matrices)
        outputs = y, *weights, *momenta
        torch.autograd.grad(outputs, tokens.q, [torch.empty_like(t) for t in outputs])
    return found
