"""The chunks of a segment in Triton, forward and backward: what `impl="triton"` runs for ns_steps = 0.

Replaces the loop of `chunked._chunk_by_chunk`; what follows from the gates alone, segments, halos and the state are
the torch code's. Dims as there: N chunks, G = B x H memories, C tokens, I sources, D lifted key, V value, F hidden.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from atlas_kernels.autocast import unrounded_backward
from atlas_kernels.chunked import SegmentScan, Tokens
from atlas_kernels.gpu.scan_backward import read_backward_kernel
from atlas_kernels.gpu.scan_forward import read_kernel, write_kernel
from atlas_kernels.gpu.scan_write_backward import write_backward_kernel
from atlas_kernels.gpu.variants import Variant
from atlas_kernels.memories import Matrices
from atlas_kernels.rule import MemoryRule
from atlas_kernels.writes import Coefficients

TRITON_DTYPES = {torch.float32: triton.language.float32, torch.bfloat16: triton.language.bfloat16}
TRITON_DTYPES |= {torch.float16: triton.language.float16}


def segment_scan(products: torch.dtype) -> SegmentScan:
    """The scan of one segment with its products' operands rounded to `products`; sums and states stay float32."""

    def scan(
        rule: MemoryRule,
        of: Coefficients,
        tokens: Tokens,
        weights: Matrices,
        momentum: Matrices,
        anchor: Matrices,
    ) -> tuple[Tensor, Matrices, Matrices]:
        matrices = (*weights, *anchor, *(momentum if rule.momentum else ()))
        y, *left = _SegmentScan.apply(rule, products, *vars(tokens).values(), *vars(of).values(), *matrices)
        count = len(weights)
        return y, tuple(left[:count]), tuple(left[count:]) if rule.momentum else momentum

    return scan


@dataclass(frozen=True)
class Shape:
    """The constants of a launch; widths are padded to powers of two."""

    D: int
    V: int
    F: int
    LAYER: bool
    L2: bool
    MOMENTUM: bool
    GATED: bool
    SHARE: float  # of the gradient through the anchor
    PRODUCTS: triton.language.dtype
    BLOCK_C: int
    BLOCK_I: int
    BLOCK_D: int
    BLOCK_V: int
    BLOCK_F: int  # each kernel's own, of CONFIGURATIONS

    @staticmethod
    def of(rule: MemoryRule, products: torch.dtype, C: int, I: int, D: int, V: int, hidden: int) -> Shape:  # noqa: E741
        pad = lambda n: max(16, triton.next_power_of_2(n))  # noqa: E731
        return Shape(
            *(D, V, hidden, rule.norm == "layer", rule.loss == "l2", rule.momentum, rule.memory == "gated_mlp"),
            float(rule.anchor_gradient),
            TRITON_DTYPES[products],
            *(pad(C), pad(I), pad(D), pad(V), 0),
        )

    def launch(self, kernel: str) -> dict[str, object]:
        """Constants, warps and stages of one kernel."""
        block, warps = CONFIGURATIONS[kernel]
        if max(self.D, self.V) > 64 or self.GATED or self.PRODUCTS == triton.language.float32:
            block = 16
        while self.F % block:
            block //= 2
        constants = asdict(replace(self, BLOCK_F=block))
        if kernel == "write":
            del constants["BLOCK_C"]
        if kernel != "write_backward":
            del constants["SHARE"]
        if kernel == "read":
            constants["KEEP"] = True
        # One stage: a block's loads are few, and more would cost shared memory that the chunk's factors take.
        return constants | {"num_warps": warps, "num_stages": 1}


KERNELS = {
    "write": write_kernel,
    "read": read_kernel,
    "read_backward": read_backward_kernel,
    "write_backward": write_backward_kernel,
}
# (rows of the hidden width at a time, warps), pinned so that equal inputs give equal bits: the largest that the
# forward holds without spilling on compute capability 9.0, and the smallest in the backward, which spills least.
CONFIGURATIONS = {"write": (32, 8), "read": (32, 8), "read_backward": (16, 8), "write_backward": (16, 8)}


class _SegmentScan(torch.autograd.Function):
    """(y, weights, momentum that leave). Matrices: all weights, all anchors, all momenta."""

    @staticmethod
    def forward(ctx, rule, products, q, read_residual, x, v, r, alphas, kappas, sources, last, to_w, to_s, *matrices):
        N, G, C, D = q.shape
        I, V = v.shape[-2:]  # noqa: E741
        count = len(matrices) // (3 if rule.momentum else 2)
        shape = Shape.of(rule, products, C, I, D, V, matrices[0].shape[-2])
        inputs = tuple(t.contiguous() if t is not None else None for t in (q, x, v, r, alphas, kappas, sources))
        inputs = (*inputs[:-1], _padded(inputs[-1], shape))
        q, x, v, r, alphas, kappas, sources = inputs
        leaving = tuple(t.contiguous() if t is not None else None for t in (last, to_w, to_s))

        weights = [m.new_empty(N + 2, *m.shape) for m in matrices[:count]]
        momentum = [m.new_empty(N + 2, *m.shape) for m in matrices[2 * count :]]
        for slots, enters, anchor in zip(weights, matrices, matrices[count:], strict=False):
            slots[0].copy_(anchor)
            slots[1].copy_(enters)
        for slots, enters in zip(momentum, matrices[2 * count :], strict=True):
            slots[1].copy_(enters)
        states = _six(weights, momentum)
        o = torch.empty_like(v)
        write_kernel[(G,)](x, v, r, *leaving, *states, o, N, G, I, **shape.launch("write"))

        keep = any(ctx.needs_input_grad)
        y = torch.empty_like(read_residual, memory_format=torch.contiguous_format)
        read = torch.empty_like(y) if keep else None
        scores = torch.empty_like(sources) if keep else None
        outputs = (o, y, read, scores)
        read_kernel[(N * G,)](
            q, read_residual.contiguous(), x, v, r, alphas, kappas, sources, *states, *outputs, G, C, I,
            **shape.launch("read") | {"KEEP": keep},
        )  # fmt: skip
        if keep:
            ctx.save_for_backward(*inputs, *leaving, o, read, scores, *weights, *momentum)
            ctx.shape, ctx.count = shape, count
        # Copies: a view would keep every chunk's matrices alive for as long as the state lives.
        return y, *(m[-1].clone() for m in (*weights, *momentum))

    @staticmethod
    @torch.autograd.function.once_differentiable
    @unrounded_backward
    def backward(ctx, grad_y, *grad_matrices):
        q, x, v, r, alphas, kappas, sources, last, to_w, to_s, o, read, scores, *slots = ctx.saved_tensors
        shape, count = ctx.shape, ctx.count
        N, G, C, _ = q.shape
        I = v.shape[-2]  # noqa: E741
        grad_y = grad_y.contiguous()
        states = _six(slots[:count], slots[count:])
        factors = (q, x, v, r, alphas, kappas, sources)
        like = lambda t: None if t is None else torch.empty_like(t)  # noqa: E731
        grad_q, grad_x, _, grad_e, grad_alphas, grad_kappas, grad_sources = map(like, factors)
        grad_read = torch.empty_like(read)
        products = next(k for k, w in TRITON_DTYPES.items() if w == shape.PRODUCTS)
        sides = [q.new_empty(N, G, C, shape.F, dtype=products) for _ in range(3 if shape.GATED else 2)]
        sides += [None] * (3 - len(sides))
        read_backward_kernel[(N * G,)](
            grad_y, *factors, *states, o, read, scores, grad_q, grad_alphas, grad_kappas, grad_sources, grad_x, grad_e,
            grad_read, *sides, G, C, I, **shape.launch("read_backward"),
        )  # fmt: skip

        grad_value, grad_last = torch.empty_like(v), torch.empty_like(last)
        grad_to_w, grad_to_s = torch.empty_like(to_w), like(to_s)
        grad_weights = [torch.stack([torch.zeros_like(m), m]) for m in grad_matrices[:count]]
        grad_momentum = [m.clone(memory_format=torch.contiguous_format) for m in grad_matrices[count:]]
        parts = [q.new_empty(G, I, shape.F) if i == 0 or shape.GATED else None for i in range(2)]
        write_backward_kernel[(G,)](
            *factors, last, to_w, to_s, *states, o, grad_read, *sides, grad_e, grad_x, grad_value,
            grad_last, grad_to_w, grad_to_s, *_six(grad_weights, grad_momentum), *parts, N, G, C, I,
            **shape.launch("write_backward"),
        )  # fmt: skip
        grad_tokens = (grad_q, grad_y, grad_x, grad_value.neg(), grad_value if shape.L2 else None)
        grad_coefficients = (grad_alphas, grad_kappas, grad_sources[..., :C, :I], grad_last, grad_to_w, grad_to_s)
        of_weights, of_anchor = [m[1] for m in grad_weights], [m[0] for m in grad_weights]
        return None, None, *grad_tokens, *grad_coefficients, *of_weights, *of_anchor, *grad_momentum


def _padded(sources: Tensor, shape: Shape) -> Tensor:
    """[N, G, C, I] -> [N, G, BLOCK_C, BLOCK_I]: with strides that the kernels know, addresses take no registers."""
    C, I = sources.shape[-2:]  # noqa: E741
    return F.pad(sources, (0, shape.BLOCK_I - I, 0, shape.BLOCK_C - C)).contiguous()


def _six(weights: list[Tensor], momentum: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Three weights and three momenta, as the kernels take them, None where the memory has fewer."""
    none: list[Tensor | None] = [None]
    return (*weights, *none * (3 - len(weights)), *momentum, *none * (3 - len(momentum)))


def variants() -> list[Variant]:
    """The kernels of the presets' shape with momentum and a window; the chain's, the slowest, with neither too; and
    with the longest chunk whose sources need no padding beside 64."""
    rule = MemoryRule(norm="layer", ns_steps=0)
    least = replace(rule, momentum=False, window=1)
    chain = [_variant(kernel, " sum window 1", least) for kernel in ("write", "write_backward")]
    damped = replace(rule, anchor_gradient=0.3)
    chain.append(_variant("write_backward", " damped", damped))
    chain.append(_variant("write_backward", " first order", replace(rule, anchor_gradient=0.0)))
    chain += [_variant(kernel, " chunk 48", replace(damped, chunk=48)) for kernel in KERNELS]
    return [_variant(kernel, "", rule) for kernel in KERNELS] + chain


def _variant(kernel: str, title: str, rule: MemoryRule) -> Variant:
    width, hidden = 64, 256
    shape = Shape.of(rule, torch.bfloat16, rule.chunk, rule.chunk + rule.window - 1, width, width, hidden)
    constants = shape.launch(kernel)
    warps, stages = (int(str(constants.pop(name))) for name in ("num_warps", "num_stages"))
    signature = {}
    # An argument that the rule has no use for is None, which is a constant.
    absent = r"_?(w3|s3|up)_pointer" if rule.momentum else r"_?(w3|s\d|up|kappas|to_s)_pointer"
    for name in KERNELS[kernel].arg_names:
        if name in ("h_pointer", "grad_z_pointer"):
            signature[name] = "*bf16"
        elif name.endswith("_pointer"):
            signature[name] = "*fp32"
            if re.search(f"(^|grad|part){absent}$", name):
                del signature[name]
                constants[name] = None
        elif name not in constants:
            signature[name] = "i32"
    return Variant(f"scan {kernel}{title} bf16", KERNELS[kernel], signature, constants, warps, stages)
