"""The writes and reads of ns_steps > 0 in Triton: what `impl="triton"` runs chunk by chunk.

Of one matrix of a memory and the K writing tokens of a chunk, with W and S as they enter and the gradients' factors:

    S_k = thetas_k S + sum_i sums_ki wide_i narrow_i^T       formed where it is orthogonalised, never in memory
    O_k = NS(S_k)                                            of one chunk at a time
    out_t = alphas_t W x_t + sum_k of_writes_kt O_k x_t      or with the transposes
    W'  = alphas_C W + sum_k of_writes_kC O_k,   S' = S_C

One function with its gradients, because the gradient of each O_k has the form of S_k (of_writes_kC grad_W' + outer
products of the read's two sides) and is formed where it passes back through Newton-Schulz. The gates' products, the
activation and the norms are the torch code's. Dims: G = B x H memories, C tokens of a chunk, I sources, K writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas_kernels.autocast import unrounded_backward
from atlas_kernels.gpu.launch import TRITON_DTYPES, Variant, launch, recording
from atlas_kernels.gpu.newton_schulz import (
    FORMED_OF,
    Source,
    coefficient_table,
    launch_backward,
    launch_forward,
    plan,
    rank_blocks,
)
from atlas_kernels.gpu.stack import (
    Form,
    Meet,
    Stack,
    Through,
    Total,
    form_kernel,
    meet_kernel,
    through_kernel,
    total_kernel,
)
from atlas_kernels.memories import Factors, Matrices
from atlas_kernels.rule import MemoryRule
from atlas_kernels.writes import Leave, orthogonal_coefficients_of

TOKENS, COLUMNS, ELEMENTS = 64, 64, 1024  # of a program, at most


@dataclass(frozen=True)
class Step:
    """What a matrix's step does: Newton-Schulz's table, the dtype of products, and which way the tokens read."""

    steps: int
    coefficients: str
    products: torch.dtype
    widens: bool


class OrthogonalSteps:
    """The map of `writes.OrthogonalWrites`; each matrix is read once, and leaves when it has been."""

    def __init__(
        self,
        rule: MemoryRule,
        alpha: Tensor,
        eta: Tensor,
        theta: Tensor,
        band: Tensor,
        writes: range,
        products: torch.dtype,
    ) -> None:
        """Arguments as of `OrthogonalWrites`; products: the dtype of the factors of matrix products."""
        of, K = orthogonal_coefficients_of(rule, alpha, eta, theta, band, writes), len(writes)
        written, last = (of.thetas[..., :K], of.sums[..., :K, :]), (of.thetas[..., -1], of.sums[..., -1, :])
        tables = of.alphas, of.of_writes, *written, *last
        self.tables = list(zip(*(t.contiguous().unbind() for t in tables), strict=True))
        self.rule, self.products = rule, products

    def advance(self, n: int, weights: Matrices, momentum: Matrices, factors: Factors) -> tuple[_StepReader, Leave]:
        matrices = [(W, S, *pair) for W, S, pair in zip(weights, momentum, factors, strict=True)]
        reader = _StepReader(self.rule, self.products, self.tables[n], matrices)
        return reader, reader.left


class _StepReader:
    def __init__(
        self,
        rule: MemoryRule,
        products: torch.dtype,
        tables: tuple[Tensor, ...],
        matrices: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    ) -> None:
        self.rule, self.products, self.tables, self.matrices = rule, products, tables, matrices
        self.after: dict[int, tuple[Tensor, Tensor]] = {}

    def widen(self, j: int, x: Tensor) -> Tensor:
        return self._read(j, x, True)

    def narrow(self, j: int, h: Tensor) -> Tensor:
        return self._read(j, h, False)

    def _read(self, j: int, x: Tensor, widens: bool) -> Tensor:
        step = Step(self.rule.ns_steps, self.rule.ns_coefficients, self.products, widens)
        out, written, moved = _OrthogonalStep.apply(step, x, *self.tables, *self.matrices[j])
        self.after[j] = written, moved
        return out

    def left(self) -> tuple[Matrices, Matrices]:
        written, moved = zip(*(self.after[j] for j in range(len(self.matrices))), strict=True)
        return written, moved


class ProductReader:
    """As `memories.MatrixView`, the products' factors rounded to `products`."""

    def __init__(self, matrices: Matrices, products: torch.dtype) -> None:
        self.matrices, self.products = matrices, products

    def widen(self, j: int, x: Tensor) -> Tensor:
        return _Product.apply(x, self.matrices[j], self.products, True)

    def narrow(self, j: int, h: Tensor) -> Tensor:
        return _Product.apply(h, self.matrices[j], self.products, False)


class _OrthogonalStep(torch.autograd.Function):
    """(out, W', S') of the module's head; x [G, C, narrow] or [G, C, wide], W and S [G, wide, narrow]."""

    @staticmethod
    def forward(
        ctx: Any, step: Step, x: Tensor, alphas: Tensor, of_writes: Tensor, thetas: Tensor, sums: Tensor,
        last_theta: Tensor, last_sums: Tensor, W: Tensor, S: Tensor, wide: Tensor, narrow: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        x, W, S, wide, narrow = (t.contiguous() for t in (x, W, S, wide, narrow))
        smaller, larger = sorted(W.shape[1:])
        # By blocks, Newton-Schulz keeps X in its result between the steps.
        whole = plan(smaller, larger, step.products, backward=False).whole
        O = W.new_empty(*thetas.shape, *W.shape[1:], dtype=step.products if whole else torch.float32)  # noqa: E741
        table = coefficient_table(step.steps, step.coefficients, W.device)
        momenta = _source(S, thetas, sums, wide, narrow)
        norms = launch_forward(momenta, table, step.products, _rows(O)) if thetas.numel() else thetas
        at_last = of_writes[..., -1].contiguous()
        out = _through(x, W, alphas, O, of_writes, step.products, step.widens)
        written = _total(W, alphas[:, -1].contiguous(), O, at_last)
        moved = _form(S, last_theta, last_sums, wide, narrow, step.products)
        ctx.save_for_backward(
            x, alphas, of_writes, thetas, sums, last_theta, last_sums, W, S, wide, narrow, O, norms, table
        )
        ctx.step = step
        return out, written, moved

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, grad_out: Tensor, grad_written: Tensor, grad_moved: Tensor) -> tuple[Tensor | None, ...]:
        x, alphas, of_writes, thetas, sums, last_theta, last_sums, W, S, wide, narrow, O, norms, table = (  # noqa: E741
            ctx.saved_tensors
        )
        products, widens = ctx.step.products, ctx.step.widens
        grad_out, grad_written, grad_moved = (t.contiguous() for t in (grad_out, grad_written, grad_moved))
        left, right = (grad_out, x) if widens else (x, grad_out)
        grad_x = _through(grad_out, W, alphas, O, of_writes, products, not widens)
        grad_of_writes, at_last = _meet(left, right, grad_written, O, products)
        grad_of_writes[..., -1] += at_last
        grad_alphas, at_last = (t[:, 0] for t in _meet(left, right, grad_written, W.unsqueeze(1), products))
        grad_alphas[:, -1] += at_last
        grad_w = _form(grad_written, alphas[:, -1].contiguous(), alphas, left, right, products)

        # float16 would not hold what Newton-Schulz's gradient multiplies by the inverse of a small momentum.
        held = torch.bfloat16 if products == torch.bfloat16 else torch.float32
        grad_momenta = W.new_empty(O.shape, dtype=held)
        if thetas.numel():
            momenta = _source(S, thetas, sums, wide, narrow)
            gradient = _source(grad_written, of_writes[..., -1].contiguous(), of_writes, left, right)
            launch_backward(momenta, gradient, norms, table, products, _rows(grad_momenta))
        grad_sums, grad_thetas = _meet(wide, narrow, S, grad_momenta, products)
        grad_last_sums, grad_last_theta = (t[:, 0] for t in _meet(wide, narrow, S, grad_moved.unsqueeze(1), products))
        grad_wide = _through(narrow, grad_moved, last_sums, grad_momenta, sums, products, True)
        grad_narrow = _through(wide, grad_moved, last_sums, grad_momenta, sums, products, False)
        grad_s = _total(grad_moved, last_theta, grad_momenta, thetas)
        tables = (grad_alphas, grad_of_writes, grad_thetas, grad_sums, grad_last_theta, grad_last_sums)
        return None, grad_x, *tables, grad_w, grad_s, grad_wide, grad_narrow


class _Product(torch.autograd.Function):
    """x M^T (widens) or x M: x [G, T, narrow] or [G, T, wide], M [G, wide, narrow]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, M: Tensor, products: torch.dtype, widens: bool) -> Tensor:
        x, M = x.contiguous(), M.contiguous()
        ctx.save_for_backward(x, M)
        ctx.products, ctx.widens = products, widens
        ones, stack, weights = _alone(x, M)
        return _through(x, M, ones, stack, weights, products, widens)

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, M = ctx.saved_tensors
        grad = grad.contiguous()
        ones, stack, weights = _alone(grad, M)
        grad_x = _through(grad, M, ones, stack, weights, ctx.products, not ctx.widens)
        left, right = (grad, x) if ctx.widens else (x, grad)
        return grad_x, _form(None, None, ones, left, right, ctx.products), None, None


def _alone(x: Tensor, M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `_through`: every token sees M as it stands, beside an empty stack."""
    return x.new_ones(x.shape[:2]), M.new_empty(len(M), 0, *M.shape[1:]), x.new_empty(len(M), 0, x.shape[1])


def _source(base: Tensor, scales: Tensor, coefficients: Tensor, wide: Tensor, narrow: Tensor) -> Source:
    """The smaller side first, as Newton-Schulz takes it."""
    flips = narrow.shape[-1] <= wide.shape[-1]
    sides = (narrow, wide) if flips else (wide, narrow)
    return Source(base.mT if flips else base, scales, coefficients, *sides, share=scales.shape[1])


def _rows(stack: Tensor) -> Tensor:
    """[G, K, wide, narrow] as `_source` has its matrices."""
    flat = stack.flatten(0, 1)
    return flat.mT if stack.shape[-1] <= stack.shape[-2] else flat


def _padded(size: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(size)))


def _through(
    x: Tensor, base: Tensor, alphas: Tensor, stack: Tensor, weights: Tensor, products: torch.dtype, widens: bool
) -> Tensor:
    """alphas_t B x_t + sum_k weights_kt M_k x_t, or with the transposes: [G, T, wide] or [G, T, narrow]."""
    G, T, B = x.shape
    wide, narrow = base.shape[1:]
    A, strides = (wide, (narrow, 1)) if widens else (narrow, (1, narrow))
    out = x.new_empty(G, T, A)
    blocks = _padded(T, TOKENS), _padded(A, COLUMNS), _padded(B, COLUMNS)
    constants = Through(A, B, *strides, *blocks, TRITON_DTYPES[products])
    grid = G * triton.cdiv(T, constants.BLOCK_T), triton.cdiv(A, constants.BLOCK_A)
    arguments = x, Stack(base, alphas, stack, weights), out, T, stack.shape[1]
    launch(through_kernel, grid, arguments, constants, warps=4)
    return out


def _meet(wide: Tensor, narrow: Tensor, base: Tensor, stack: Tensor, products: torch.dtype) -> tuple[Tensor, Tensor]:
    """(wide_t . M_k narrow_t [G, K, T], <B, M_k> [G, K])."""
    G, T, F = wide.shape
    K, D = stack.shape[1], narrow.shape[-1]
    scores, inner = wide.new_empty(G, K, T), wide.new_empty(G, K)
    if K:
        constants = Meet(F, D, _padded(T, TOKENS), _padded(F, COLUMNS), _padded(D, 128), TRITON_DTYPES[products])
        arguments = wide, narrow, Stack(base, None, stack, None), scores, inner, T, K
        launch(meet_kernel, (G * K, triton.cdiv(T, constants.BLOCK_T)), arguments, constants, warps=4)
    return scores, inner


def _total(base: Tensor, alphas: Tensor, stack: Tensor, weights: Tensor) -> Tensor:
    """alphas B + sum_k weights_k M_k [G, wide, narrow]."""
    out, size = torch.empty_like(base), base[0].numel()
    constants = Total(size, _padded(size, ELEMENTS))
    arguments = Stack(base, alphas, stack, weights), out, stack.shape[1]
    launch(total_kernel, (len(base), triton.cdiv(size, constants.BLOCK)), arguments, constants, warps=4)
    return out


def _form(
    base: Tensor | None,
    scales: Tensor | None,
    coefficients: Tensor,
    wide: Tensor,
    narrow: Tensor,
    products: torch.dtype,
) -> Tensor:
    """scales B + sum_r coefficients_r wide_r narrow_r^T [G, wide, narrow]; the sum alone without B."""
    (G, R, F), D = wide.shape, narrow.shape[-1]
    out = wide.new_empty(G, F, D)
    constants = Form(F, D, _padded(F, COLUMNS), _padded(D, 128), TRITON_DTYPES[products], rank_blocks(R))
    arguments = base, scales, coefficients, narrow, wide, out, R
    launch(form_kernel, (G, triton.cdiv(F, constants.BLOCK_F)), arguments, constants, warps=4)
    return out


def variants() -> list[Variant]:
    """One matrix of the presets' shape, F = 256 and D = 64, of a chunk of 63 tokens with a write at each."""
    products, (sources, T) = torch.bfloat16, FORMED_OF
    empty = partial(torch.empty, device="meta")
    wide, narrow, alphas, weights = empty(1, T, 256), empty(1, T, 64), empty(1, T), empty(1, T, T)
    base, stack = empty(1, 256, 64), empty(1, T, 256, 64, dtype=products)
    form = empty(1, sources), empty(1, sources, 256), empty(1, sources, 64), products
    calls = {
        "widen": lambda: _through(narrow, base, alphas, stack, weights, products, True),
        "narrow": lambda: _through(wide, base, alphas, stack, weights, products, False),
        "meet": lambda: _meet(wide, narrow, base, stack, products),
        "total": lambda: _total(base, alphas[:, 0], stack, weights[:, 0]),
        "form": lambda: _form(base, alphas[:, 0], *form),
        "form alone": lambda: _form(None, None, alphas, wide, narrow, products),
    }
    found = []
    for name, call in calls.items():
        with recording(f"stack {name} bf16") as launches:
            call()
        found += launches
    return found
