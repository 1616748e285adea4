"""The chunks of a segment in Triton, forward and backward: what `impl="triton"` runs for ns_steps = 0.

Replaces the loop of `chunked._chunk_by_chunk`; what follows from the gates alone, segments, halos and the state are
the torch code's. Dims as there: N chunks, G = B x H memories, C tokens, I sources, D lifted key, V value, F hidden.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas_kernels import memories
from atlas_kernels.autocast import unrounded_backward
from atlas_kernels.chunked import SegmentScan
from atlas_kernels.chunked import Tokens as SegmentTokens
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
from atlas_kernels.gpu.scan.write_backward import write_backward_kernel
from atlas_kernels.rule import MemoryRule
from atlas_kernels.writes import Coefficients


def segment_scan(products: torch.dtype) -> SegmentScan:
    """The scan of one segment with its products' operands rounded to `products`; sums and states stay float32."""

    def scan(
        rule: MemoryRule,
        coefficients: Coefficients,
        tokens: SegmentTokens,
        weights: memories.Matrices,
        momentum: memories.Matrices,
        anchor: memories.Matrices,
    ) -> tuple[Tensor, memories.Matrices, memories.Matrices]:
        matrices = (*weights, *anchor, *(momentum if rule.momentum else ()))
        y, *left = _SegmentScan.apply(rule, products, *vars(tokens).values(), *vars(coefficients).values(), *matrices)
        count = len(weights)
        return y, tuple(left[:count]), tuple(left[count:]) if rule.momentum else momentum

    return scan


KERNELS = {
    "write": write_kernel,
    "read": read_kernel,
    "read_backward": read_backward_kernel,
    "write_backward": write_backward_kernel,
}
# (rows of the hidden width at a time, warps), pinned so that equal inputs give equal bits: the largest that the
# forward holds without spilling on compute capability 9.0, and the smallest in the backward, which spills least.
CONFIGURATIONS = {"write": (32, 8), "read": (32, 8), "read_backward": (16, 8), "write_backward": (16, 8)}
# Constants that a kernel does not use. They are set to their defaults, so that a change of them compiles nothing anew.
UNUSED = {
    "write": ("BLOCK_C", "SHARE", "KEEP"),
    "read": ("SHARE",),
    "read_backward": ("SHARE", "KEEP"),
    "write_backward": ("KEEP",),
}


def shape_of(rule: MemoryRule, products: torch.dtype, sizes: Sizes, D: int, V: int, F: int, keep: bool) -> Shape:
    """The constants of a segment's launches; F the hidden width, keep: for a backward. BLOCK_F is each launch's own."""
    pad = lambda n: max(16, triton.next_power_of_2(n))  # noqa: E731
    return Shape(
        D=D,
        V=V,
        F=F,
        LAYER=rule.norm == "layer",
        L2=rule.loss == "l2",
        MOMENTUM=rule.momentum,
        GATED=rule.memory == "gated_mlp",
        PRODUCTS=TRITON_DTYPES[products],
        BLOCK_I=pad(sizes.I),
        BLOCK_D=pad(D),
        BLOCK_V=pad(V),
        BLOCK_C=pad(sizes.C),
        SHARE=float(rule.anchor_gradient),
        KEEP=keep,
    )


def _launch(kernel: str, programs: int, arguments: tuple[Any, ...], shape: Shape) -> None:
    """One of KERNELS, with as many rows of the hidden width at a time as CONFIGURATIONS and the sizes allow."""
    block, warps = CONFIGURATIONS[kernel]
    if max(shape.D, shape.V) > 64 or shape.GATED or shape.PRODUCTS == triton.language.float32:
        block = 16
    while shape.F % block:
        block //= 2
    unused = {name: Shape._field_defaults[name] for name in UNUSED[kernel]}
    launch(KERNELS[kernel], (programs,), arguments, shape._replace(BLOCK_F=block, **unused), warps=warps)


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
        tokens = Tokens(*(t.contiguous() for t in (q, read_residual, x, v, r)))
        coefficients = (alphas, kappas, _padded(sources, shape), last, to_w, to_s)
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

        grad_weights = Matrices(*(torch.stack([torch.zeros_like(m), m]) for m in grad_matrices[:count]))
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
            *(grads.grad_alphas_pointer, grads.grad_kappas_pointer, grads.grad_sources_pointer[..., :C, :I]),
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


def _padded(sources: Tensor, shape: Shape) -> Tensor:
    """[N, G, C, I] -> [N, G, BLOCK_C, BLOCK_I]: with strides that the kernels know, addresses take no registers."""
    C, I = sources.shape[-2:]  # noqa: E741
    return F.pad(sources, (0, shape.BLOCK_I - I, 0, shape.BLOCK_C - C)).contiguous()


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
    ]


def _variants(title: str, rule: MemoryRule, *kernels: str) -> list[Variant]:
    """Recorded of chunks one token short: of a whole one the kernels would be told that C is a multiple of 16, which
    the last chunk of a sequence is not."""
    N, G, C, D, F = 3, 3, rule.chunk - 1, 64, 256
    I = C + rule.window - 1  # noqa: E741
    empty = partial(torch.empty, device="meta", requires_grad=True)
    tokens = SegmentTokens(empty(N, G, C, D), empty(N, G, C, D), *(empty(N, G, I, D) for _ in range(3)))
    parts = 3 if rule.momentum else 1
    coefficients = Coefficients(
        alphas=empty(N, G, C, 1),
        kappas=empty(N, G, C, 1) if rule.momentum else None,
        sources=empty(N, G, C, I),
        last=empty(N, G, parts, 1),
        to_weights=empty(N, G, I, 1),
        to_momentum=empty(N, G, I, 1) if rule.momentum else None,
    )
    matrices = empty(G, F, D), empty(G, F, D)
    with recording(f"scan {{}}{title} bf16") as found:
        y, weights, momenta = segment_scan(torch.bfloat16)(rule, coefficients, tokens, matrices, matrices, matrices)
        outputs = y, *weights, *(momenta if rule.momentum else ())
        torch.autograd.grad(outputs, tokens.q, [torch.empty_like(t) for t in outputs])
    return [variant for variant in found if variant.kernel in [KERNELS[kernel] for kernel in kernels]]
