"""The chunks of a segment in Triton, forward and backward: what `impl="triton"` runs for ns_steps = 0.

Replaces the loop of `chunked._chunk_by_chunk`. What follows from the gates alone comes from coefficients.py, sources in
their chunks from windows.py; segments and the state are the torch code's. Dims as there: N chunks, G = B x H memories,
C tokens, I sources, D lifted key, V value, F hidden.
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
from atlas_kernels.gpu.architecture import arch_of
from atlas_kernels.gpu.launch import TRITON_DTYPES, Variant, launch, recording
from atlas_kernels.gpu.scan.forward import read_kernel, write_kernel
from atlas_kernels.gpu.scan.pieces import (
    Matrices,
    Owed,
    ReadGradients,
    Reads,
    Shape,
    Sizes,
    States,
    Tables,
    Tokens,
    WriteGradients,
)
from atlas_kernels.gpu.scan.read_backward import read_backward_kernel
from atlas_kernels.gpu.scan.split import MULTIPROCESSORS, launch_split, slices_of
from atlas_kernels.gpu.scan.split_write import SPLIT_WRITE
from atlas_kernels.gpu.scan.split_write_backward import SPLIT_WRITE_BACKWARD
from atlas_kernels.gpu.scan.write_backward import write_backward_kernel
from atlas_kernels.gpu.segment import segment_scan_of
from atlas_kernels.rule import MemoryRule
from atlas_kernels.writes import Coefficients


def segment_scan(products: torch.dtype) -> SegmentScan:
    """The scan of one segment with its products' operands rounded to `products`; sums and states stay float32."""
    return segment_scan_of(_SegmentScan, products)


KERNELS = {
    "write": write_kernel,
    "read": read_kernel,
    "read_backward": read_backward_kernel,
    "write_backward": write_backward_kernel,
}
# The chains, where there are fewer memories than a GPU could run programs at once.
SPLITS = {"write": SPLIT_WRITE, "write_backward": SPLIT_WRITE_BACKWARD}
# (rows of the hidden width at a time, warps), with over 64 sources and with up to 64; pinned so that equal inputs give
# equal bits. The forward takes the largest that it holds without spilling on compute capability 9.0, the backward the
# smallest, which spills least. Four warps leave room for a second program on a multiprocessor.
CONFIGURATIONS = {
    "write": ((32, 8), (32, 4)),
    "read": ((16, 8), (32, 4)),
    "read_backward": ((16, 8), (16, 8)),
    "write_backward": ((16, 8), (16, 8)),
}
# Constants that a kernel does not use. They are set to their defaults, so that a change of them compiles nothing anew.
UNUSED = {
    "write": ("BLOCK_C", "SHARE", "KEEP"),
    "read": ("SHARE",),
    "read_backward": ("SHARE", "KEEP"),
    "write_backward": ("KEEP",),
}


def padded(n: int) -> int:
    """The rows or columns of the tile that holds n of them."""
    return max(16, triton.next_power_of_2(n))


def shape_of(rule: MemoryRule, products: torch.dtype, sizes: Sizes, D: int, V: int, F: int, keep: bool) -> Shape:
    """The constants of a segment's launches; F the hidden width, keep: for a backward. BLOCK_F is each launch's own."""
    return Shape(
        D=D,
        V=V,
        F=F,
        LAYER=rule.norm == "layer",
        L2=rule.loss == "l2",
        MOMENTUM=rule.momentum,
        GATED=rule.memory == "gated_mlp",
        PRODUCTS=TRITON_DTYPES[products],
        BLOCK_I=padded(sizes.I),
        BLOCK_D=padded(D),
        BLOCK_V=padded(V),
        BLOCK_C=padded(sizes.C),
        SHARE=float(rule.anchor_gradient),
        KEEP=keep,
    )


def _launch(kernel: str, programs: int, arguments: tuple[Any, ...], shape: Shape) -> None:
    """One of KERNELS, with as many rows of the hidden width at a time as CONFIGURATIONS and the sizes allow."""
    small = max(shape.D, shape.V) <= 64 and not shape.GATED and shape.PRODUCTS != triton.language.float32
    block, warps = CONFIGURATIONS[kernel][small and shape.BLOCK_I <= 64]
    if not small:
        block = 16
    while shape.F % block:
        block //= 2
    unused = {name: Shape._field_defaults[name] for name in UNUSED[kernel]}
    shape = shape._replace(BLOCK_F=block, APART=shape.APART and warps > 4, **unused)
    slices = slices_of(programs, shape, arguments[0].x_pointer.device) if kernel in SPLITS else 1
    if slices > 1:
        launch_split(SPLITS[kernel], slices, arguments, shape, warps=warps)
    else:
        launch(KERNELS[kernel], (programs,), arguments, shape, warps=warps)


class _SegmentScan(torch.autograd.Function):
    """(y, weights, momentum that leave). Matrices: all weights, all anchors, all momenta."""

    @staticmethod
    def forward(
        ctx: Any, rule: MemoryRule, products: torch.dtype, q: Tensor, read_residual: Tensor, x: Tensor, v: Tensor,
        r: Tensor, alphas: Tensor, kappas: Tensor | None, sources: Tensor, last: Tensor, to_w: Tensor,
        to_s: Tensor | None, *matrices: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        count, keep = len(matrices) // (3 if rule.momentum else 2), any(ctx.needs_input_grad)
        N, G, C, D = q.shape
        I, V = v.shape[-2:]  # noqa: E741
        sizes = Sizes(N, G, C, I)
        shape = shape_of(rule, products, sizes, D, V, matrices[0].shape[-2], keep)
        shape = shape._replace(APART=90 <= arch_of(q.device) < 100)
        tokens = Tokens(*(t.contiguous() for t in (q, read_residual, x, v, r)))
        coefficients = (alphas, kappas, sources, last, to_w, to_s)
        tables = Tables(*(None if t is None else t.contiguous() for t in coefficients))
        states = _entering(N, *(matrices[i * count : (i + 1) * count] for i in range(3)))

        o, y = torch.empty_like(tokens.v_pointer), torch.empty_like(tokens.read_residual_pointer)
        written = tokens._replace(q_pointer=None, read_residual_pointer=None)
        leaving = tables._replace(alphas_pointer=None, kappas_pointer=None, sources_pointer=None)
        _launch("write", G, (written, leaving, states, o, sizes._replace(C=None)), shape)
        kept = map(torch.empty_like, (y, tables.sources_pointer)) if keep else (None, None)
        reads = Reads(o, y, *kept)
        _launch("read", N * G, (tokens, _of_reads(tables), states, reads, sizes._replace(N=None)), shape)
        left = (*states.weights[:count], *(states.momenta[:count] if states.momenta else ()))
        if keep:
            tokens, reads = tokens._replace(read_residual_pointer=None), reads._replace(y_pointer=None)
            ctx.save_for_backward(*tokens, *tables, *reads, *left)
            ctx.shape, ctx.sizes, ctx.products = shape, sizes, products
        # Copies: a view would keep every chunk's matrices alive for as long as the state lives.
        return y, *(m[-1].clone() for m in left)

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, grad_y: Tensor, *grad_matrices: Tensor) -> tuple[Tensor | None, ...]:
        shape, sizes, saved = ctx.shape, ctx.sizes, ctx.saved_tensors
        N, G, C, I = sizes  # noqa: E741
        tokens, tables, reads = Tokens(*saved[:5]), Tables(*saved[5:11]), Reads(*saved[11:15])
        count = 3 if shape.GATED else 2
        states = States(Matrices(*saved[15 : 15 + count]), Matrices(*saved[15 + count :]) if shape.MOMENTUM else None)
        like = lambda t: None if t is None else torch.empty_like(t)  # noqa: E731
        side = partial(tokens.q_pointer.new_empty, N, G, C, shape.F, dtype=ctx.products)
        grad_y = grad_y.contiguous()
        grads = ReadGradients(
            grad_q_pointer=torch.empty_like(tokens.q_pointer),
            grad_x_pointer=torch.empty_like(tokens.x_pointer),
            grad_e_pointer=torch.empty_like(tokens.r_pointer),
            grad_read_pointer=torch.empty_like(reads.read_pointer),
            grad_alphas_pointer=torch.empty_like(tables.alphas_pointer),
            grad_kappas_pointer=like(tables.kappas_pointer),
            grad_sources_pointer=torch.empty_like(tables.sources_pointer),
            h_pointer=side(),
            grad_z_pointer=side(),
            grad_up_pointer=side() if shape.GATED else None,
        )
        read = grad_y, tokens, _of_reads(tables), states, reads, grads, sizes._replace(N=None)
        _launch("read_backward", N * G, read, shape)

        grad_weights = _owed(grad_matrices[:count])
        grad_momenta = [m.clone(memory_format=torch.contiguous_format) for m in grad_matrices[count:]]
        part = partial(tokens.q_pointer.new_empty, G, I, shape.F)
        write = WriteGradients(
            grad_value_pointer=torch.empty_like(tokens.v_pointer),
            grad_last_pointer=torch.empty_like(tables.last_pointer),
            grad_to_w_pointer=torch.empty_like(tables.to_w_pointer),
            grad_to_s_pointer=like(tables.to_s_pointer),
            grad_weights=grad_weights,
            grad_momenta=Matrices(*grad_momenta) if shape.MOMENTUM else None,
            part_z_pointer=part(),
            part_up_pointer=part() if shape.GATED else None,
        )
        owed = Owed(**{name: getattr(grads, name) for name in Owed._fields})
        _launch("write_backward", G, (tokens, tables, states, reads.o_pointer, owed, write, sizes), shape)
        grad_value = write.grad_value_pointer
        return (
            *(None, None, grads.grad_q_pointer, grad_y, grads.grad_x_pointer),
            *(grad_value.neg(), grad_value if shape.L2 else None),
            *(grads.grad_alphas_pointer, grads.grad_kappas_pointer, grads.grad_sources_pointer),
            *(write.grad_last_pointer, write.grad_to_w_pointer, write.grad_to_s_pointer),
            *(m[1] for m in grad_weights[:count]),
            *(m[0] for m in grad_weights[:count]),
            *grad_momenta,
        )


def _of_reads(tables: Tables) -> Tables:
    """What the reads use of the tables. An argument that a kernel has no use for would cost it registers."""
    return tables._replace(last_pointer=None, to_w_pointer=None, to_s_pointer=None)


def _entering(N: int, weights: tuple[Tensor, ...], anchors: tuple[Tensor, ...], momenta: tuple[Tensor, ...]) -> States:
    """N + 2 slots of each matrix, the first two filled."""

    def slots(matrices: tuple[Tensor, ...]) -> Matrices:
        filled = Matrices(*(m.new_empty(N + 2, *m.shape) for m in matrices))
        for slot, enters in zip(filled, matrices, strict=False):
            slot[1].copy_(enters)
        return filled

    states = States(slots(weights), slots(momenta) if momenta else None)
    for slot, anchor in zip(states.weights, anchors, strict=False):
        slot[0].copy_(anchor)
    return states


def _owed(grads: tuple[Tensor, ...]) -> Matrices:
    """Two slots: nothing yet for the first chunk's anchor, and the gradient of what leaves."""
    slots = Matrices(*(m.new_empty(2, *m.shape) for m in grads))
    for slot, leaving in zip(slots, grads, strict=False):
        slot[0].zero_()
        slot[1].copy_(leaving)
    return slots


def variants() -> list[Variant]:
    """The kernels of the presets' shape with momentum and a window; the chain's, the slowest, with neither too; and
    with the longest chunk whose sources need no padding beside 64."""
    rule = MemoryRule(norm="layer", ns_steps=0)
    least, damped = replace(rule, momentum=False, window=1), replace(rule, anchor_gradient=0.3)
    return [
        *_variants("", rule, *KERNELS),
        *_variants(" sum window 1", least, "write", "write_backward"),
        *_variants(" damped", damped, "write_backward"),
        *_variants(" first order", replace(rule, anchor_gradient=0.0), "write_backward"),
        *_variants(" chunk 48", replace(damped, chunk=48), *KERNELS),
        *(v for slices in (8, 2) for v in _variants(f" {slices} slices", rule, *SPLITS, slices=slices)),
    ]


def _variants(title: str, rule: MemoryRule, *kernels: str, slices: int = 1) -> list[Variant]:
    """Recorded of chunks one token short: of a whole one the kernels would be told that C is a multiple of 16, which
    the last chunk of a sequence is not. Of as many memories as leave room for so many slices of each, and no more."""
    N, G, C, D, F = 3, MULTIPROCESSORS // slices - 1, rule.chunk - 1, 64, 256
    I = C + rule.window - 1  # noqa: E741
    empty = partial(torch.empty, device="meta", requires_grad=True)
    tokens = SegmentTokens(empty(N, G, C, D), empty(N, G, C, D), *(empty(N, G, I, D) for _ in range(3)))
    parts = 3 if rule.momentum else 1
    coefficients = Coefficients(
        alphas=empty(N, G, C),
        kappas=empty(N, G, C) if rule.momentum else None,
        sources=empty(N, G, padded(C), padded(I)),
        last=empty(N, G, parts),
        to_weights=empty(N, G, I),
        to_momentum=empty(N, G, I) if rule.momentum else None,
    )
    matrices = empty(G, F, D), empty(G, F, D)
    with recording(f"scan {{}}{title} bf16") as found:
        y, weights, momenta = segment_scan(torch.bfloat16)(rule, coefficients, tokens, matrices, matrices, matrices)
        outputs = y, *weights, *(momenta if rule.momentum else ())
        torch.autograd.grad(outputs, tokens.q, [torch.empty_like(t) for t in outputs])
    wanted = [SPLITS[kernel].kernel if slices > 1 else KERNELS[kernel] for kernel in kernels]
    return [variant for variant in found if variant.kernel in wanted]
