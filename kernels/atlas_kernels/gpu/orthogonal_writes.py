"""The writes and reads of ns_steps > 0 in Triton: what `impl="triton"` runs chunk by chunk.

Of one matrix of a memory and the K writing tokens of a chunk, with W and S as they enter and the gradients' factors:

    S_k = thetas_k S + sum_i sums_ki wide_i narrow_i^T       formed where it is orthogonalised, never in memory
    O_k = NS(S_k)                                            of one chunk at a time
    out_t = alphas_t W x_t + sum_k of_writes_kt O_k x_t      or with the transposes
    W'  = alphas_C W + sum_k of_writes_kC O_k,   S' = S_C

One function with its gradients, because the gradient of each O_k has the form of S_k (of_writes_kC grad_W' + outer
products of the read's two sides) and is formed where it passes back through Newton-Schulz. The activation is part of
the products that it follows; the gates' products and the norms are the torch code's. Launches are counted: of a chunk
and a memory of two matrices 9 forward and 22 backward, at most 500 of a layer of 16 chunks, beside some 30 of torch's
a chunk. Dims: G = B x H memories, C tokens of a chunk, I sources, K writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from atlas_kernels import memories
from atlas_kernels.autocast import unrounded_backward
from atlas_kernels.gpu.launch import TRITON_DTYPES, Variant, launch, recording
from atlas_kernels.gpu.newton_schulz import (
    FORMED_OF,
    Source,
    coefficient_table,
    launch_backward,
    launch_forward,
    plan,
)
from atlas_kernels.gpu.stack import (
    Act,
    Leave,
    Meet,
    Met,
    Scores,
    Seen,
    Stack,
    Through,
    act_backward_kernel,
    form_kernel,
    leave_kernel,
    meet_kernel,
    sides_kernel,
    through_kernel,
    total_kernel,
)
from atlas_kernels.rule import MemoryRule
from atlas_kernels.writes import Leave as Left
from atlas_kernels.writes import orthogonal_coefficients_of

# Of a program, at most: tokens (with float32 products), elements of a total and of its matrices at once, matrices met.
TOKENS, TOKENS_FLOAT32, ELEMENTS, AT_ONCE, BATCH = 128, 64, 256, 16, 4

# Elements: a table that begins at no multiple of 16 bytes would be another compilation of each kernel.
ALIGNED = 4


@dataclass(frozen=True)
class Step:
    """What a matrix's step does: Newton-Schulz's table, the dtype of products, which way the tokens read and whether
    the activation follows; writes: K."""

    steps: int
    coefficients: str
    products: torch.dtype
    writes: int
    widens: bool = False
    act: bool = False


class Tables(NamedTuple):
    """What the gates say of one chunk; in one tensor one after the other, so that autograd has one to sum."""

    alphas: Tensor  # [G, C]
    of_writes: Tensor  # [G, K, C]
    last_alpha: Tensor  # [G], alphas at the last token
    last_of_writes: Tensor  # [G, K], of_writes at the last token
    thetas: Tensor  # [G, K]
    sums: Tensor  # [G, K, I]
    last_theta: Tensor  # [G]
    last_sums: Tensor  # [G, I]


def _tables(flat: Tensor, G: int, C: int, K: int, I: int) -> Tables:  # noqa: E741
    """Views of `flat`."""
    shapes = ((G, C), (G, K, C), (G,), (G, K), (G, K), (G, K, I), (G,), (G, I))
    sizes = [math.prod(shape) for shape in shapes]
    parts = flat.split([size + -size % ALIGNED for size in sizes])
    views = (part[:size].view(shape) for part, size, shape in zip(parts, sizes, shapes, strict=True))
    return Tables(*views)


def _flattened(table: Tensor) -> Tensor:
    """[N, G, ...] as [N, so many that the next table is aligned]."""
    flat = table.flatten(1)
    spare = -flat.shape[1] % ALIGNED
    return pad(flat, (0, spare)) if spare else flat


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
        tables = Tables(
            of.alphas, of.of_writes, of.alphas[..., -1:], of.of_writes[..., -1], of.thetas[..., :K],
            of.sums[..., :K, :], of.thetas[..., -1:], of.sums[..., -1, :],
        )  # fmt: skip
        self.tables = torch.cat([_flattened(t) for t in tables], 1).unbind()
        self.rule = rule
        self.step = Step(rule.ns_steps, rule.ns_coefficients, products, K)

    def advance(
        self, n: int, weights: memories.Matrices, momentum: memories.Matrices, factors: memories.Factors
    ) -> tuple[_StepReader, Left]:
        matrices = [(W, S, *pair) for W, S, pair in zip(weights, momentum, factors, strict=True)]
        reader = _StepReader(self.step, self.tables[n], matrices)
        return reader, reader.left


class _StepReader(memories.ActivatingView):
    def __init__(self, step: Step, tables: Tensor, matrices: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
        self.step, self.tables, self.matrices = step, tables, matrices
        self.after: dict[int, tuple[Tensor, Tensor]] = {}

    def widen(self, j: int, x: Tensor) -> Tensor:
        return self._read(j, x, True)

    def narrow(self, j: int, h: Tensor) -> Tensor:
        return self._read(j, h, False)

    def act(self, j: int, x: Tensor) -> Tensor:
        return self._read(j, x, True, act=True)

    def _read(self, j: int, x: Tensor, widens: bool, act: bool = False) -> Tensor:
        step = replace(self.step, widens=widens, act=act)
        out, written, moved = _OrthogonalStep.apply(step, x, self.tables, *self.matrices[j])
        self.after[j] = written, moved
        return out

    def left(self) -> tuple[memories.Matrices, memories.Matrices]:
        written, moved = zip(*(self.after[j] for j in range(len(self.matrices))), strict=True)
        return written, moved


class ProductReader(memories.ActivatingView):
    """As `memories.MatrixView`, the products' factors rounded to `products`."""

    def __init__(self, matrices: memories.Matrices, products: torch.dtype) -> None:
        self.matrices, self.products = matrices, products

    def widen(self, j: int, x: Tensor) -> Tensor:
        return _Product.apply(x, self.matrices[j], self.products, True)

    def narrow(self, j: int, h: Tensor) -> Tensor:
        return _Product.apply(h, self.matrices[j], self.products, False)

    def act_with_slope(self, j: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return _ActiveProduct.apply(x, self.matrices[j], self.products)


class _OrthogonalStep(torch.autograd.Function):
    """(out, W', S') of the module's head; x [G, C, narrow] or [G, C, wide], W and S [G, wide, narrow]."""

    @staticmethod
    def forward(
        ctx: Any, step: Step, x: Tensor, flat: Tensor, W: Tensor, S: Tensor, wide: Tensor, narrow: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, W, S, wide, narrow = (t.contiguous() for t in (x, W, S, wide, narrow))
        (G, C), I, K = x.shape[:2], wide.shape[1], step.writes  # noqa: E741
        t = _tables(flat, G, C, K, I)
        # By blocks, Newton-Schulz keeps X in its result between the steps.
        smaller, larger = sorted(W.shape[1:])
        whole = plan(smaller, larger, step.products, backward=False).whole
        O = W.new_empty(G, K, *W.shape[1:], dtype=step.products if whole else torch.float32)  # noqa: E741
        table = coefficient_table(step.steps, step.coefficients, W.device)
        momenta = _source(S, t.thetas, t.sums, wide, narrow)
        norms = launch_forward(momenta, table, step.products, _rows(O)) if K else None
        seen = _through(x, Stack(W, t.alphas, O, t.of_writes), step.products, step.widens, step.act)
        outer = Source(S.mT, t.last_theta, t.last_sums, narrow, wide)
        written, moved = _leave(Stack(W, t.last_alpha, O, t.last_of_writes), outer, step.products)
        ctx.save_for_backward(x, flat, W, S, wide, narrow, O, norms, table, seen.out_pointer if step.act else None)
        ctx.step = step
        return seen.h_pointer if step.act else seen.out_pointer, written, moved

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, grad_out: Tensor, grad_written: Tensor, grad_moved: Tensor) -> tuple[Tensor | None, ...]:
        x, flat, W, S, wide, narrow, O, norms, table, z = ctx.saved_tensors  # noqa: E741
        step, products = ctx.step, ctx.step.products
        grad_out, grad_written, grad_moved = (t.contiguous() for t in (grad_out, grad_written, grad_moved))
        if z is not None:
            grad_out = _act_backward(z, grad_out, None, products)
        grad_flat = torch.empty_like(flat)
        sizes = *x.shape[:2], step.writes, wide.shape[1]
        t, grad = _tables(flat, *sizes), _tables(grad_flat, *sizes)
        left, right = (grad_out, x) if step.widens else (x, grad_out)
        grad_x = _through(grad_out, Stack(W, t.alphas, O, t.of_writes), products, not step.widens).out_pointer
        scores = Scores(grad.of_writes, grad.last_of_writes, grad.alphas, grad.last_alpha)
        _meet(left, right, Met(O, W, grad_written), scores, products)
        grad_w = _form(Source(grad_written.mT, t.last_alpha, t.alphas, right, left), products)

        # float16 would not hold what Newton-Schulz's gradient multiplies by the inverse of a small momentum.
        held = torch.bfloat16 if products == torch.bfloat16 else torch.float32
        grad_momenta = W.new_empty(O.shape, dtype=held)
        if step.writes:
            momenta = _source(S, t.thetas, t.sums, wide, narrow)
            gradient = _source(grad_written, t.last_of_writes, t.of_writes, left, right)
            launch_backward(momenta, gradient, norms, table, products, _rows(grad_momenta))
        scores = Scores(grad.sums, grad.thetas, grad.last_sums, grad.last_theta)
        _meet(wide, narrow, Met(grad_momenta, grad_moved, S), scores, products)
        grad_wide, grad_narrow = _sides(wide, narrow, Stack(grad_moved, t.last_sums, grad_momenta, t.sums), products)
        grad_s = _total(Stack(grad_moved, t.last_theta, grad_momenta, t.thetas), products)
        return None, grad_x, grad_flat, grad_w, grad_s, grad_wide, grad_narrow


class _Product(torch.autograd.Function):
    """x M^T (widens) or x M: x [G, T, narrow] or [G, T, wide], M [G, wide, narrow]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, M: Tensor, products: torch.dtype, widens: bool) -> Tensor:
        x, M = x.contiguous(), M.contiguous()
        ctx.save_for_backward(x, M)
        ctx.products, ctx.widens = products, widens
        return _through(x, Stack(M, None, None, None), products, widens).out_pointer

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, M = ctx.saved_tensors
        return *_product_backward(grad.contiguous(), x, M, ctx.products, ctx.widens), None, None


class _ActiveProduct(torch.autograd.Function):
    """gelu and its derivative at z = x M^T: x [G, T, narrow], M [G, wide, narrow]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, M: Tensor, products: torch.dtype) -> tuple[Tensor, Tensor]:
        x, M = x.contiguous(), M.contiguous()
        seen = _through(x, Stack(M, None, None, None), products, True, act=True, slope=True)
        ctx.save_for_backward(x, M, seen.out_pointer)
        ctx.products = products
        return seen.h_pointer, seen.slope_pointer

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, grad_h: Tensor, grad_slope: Tensor) -> tuple[Tensor | None, ...]:
        x, M, z = ctx.saved_tensors
        grad = _act_backward(z, grad_h.contiguous(), grad_slope.contiguous(), ctx.products)
        return *_product_backward(grad, x, M, ctx.products, True), None


def _product_backward(
    grad: Tensor, x: Tensor, M: Tensor, products: torch.dtype, widens: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and M."""
    left, right = (grad, x) if widens else (x, grad)
    alone = Source(None, None, None, right, left)
    return _through(grad, Stack(M, None, None, None), products, not widens).out_pointer, _form(alone, products)


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


def _tokens(T: int, products: torch.dtype) -> int:
    return _padded(T, TOKENS_FLOAT32 if products == torch.float32 else TOKENS)


def _through_constants(
    stack: Stack, T: int, products: torch.dtype, widens: bool = False, act: bool = False, slope: bool = False
) -> Through:
    (F, D), K = stack.base_pointer.shape[1:], _matrices(stack)
    # So few columns, that several programs share a multiprocessor and a memory: their products wait for loads.
    columns = 16 if max(F, D) <= 64 else 32
    sides = _padded(F, 64), _padded(D, 64)
    turns = triton.next_power_of_2(K) if K else 0
    return Through(F, D, widens, act, slope, _tokens(T, products), columns, *sides, turns, TRITON_DTYPES[products])


def _through(
    x: Tensor, stack: Stack, products: torch.dtype, widens: bool, act: bool = False, slope: bool = False
) -> Seen:
    """alphas_t B x_t + sum_k weights_kt M_k x_t, or with the transposes: [G, T, wide] or [G, T, narrow].

    act, slope: and the activation of it, and its derivative.
    """
    (G, T, _), (F, D) = x.shape, stack.base_pointer.shape[1:]
    constants = _through_constants(stack, T, products, widens, act, slope)
    A = F if widens else D
    seen = Seen(*(x.new_empty(G, T, A) if wanted else None for wanted in (True, act, slope)))
    grid = G * triton.cdiv(T, constants.BLOCK_T), triton.cdiv(A, constants.BLOCK_A)
    launch(through_kernel, grid, (x, stack, seen, T, _matrices(stack)), constants, warps=4)
    return seen


def _matrices(stack: Stack) -> int:
    return 0 if stack.stack_pointer is None else stack.stack_pointer.shape[1]


def _sides(wide: Tensor, narrow: Tensor, stack: Stack, products: torch.dtype) -> tuple[Tensor, Tensor]:
    """`_through` of narrow and of wide: [G, T, wide], [G, T, narrow]."""
    G, T, F = wide.shape
    constants = _through_constants(stack, T, products)
    columns = triton.cdiv(F, constants.BLOCK_A) + triton.cdiv(constants.D, constants.BLOCK_A)
    found = torch.empty_like(wide), torch.empty_like(narrow)
    grid = G * triton.cdiv(T, constants.BLOCK_T), columns
    launch(sides_kernel, grid, (wide, narrow, stack, *found, T, _matrices(stack)), constants, warps=4)
    return found


def _meet(wide: Tensor, narrow: Tensor, matrices: Met, found: Scores, products: torch.dtype) -> None:
    """Into `found` wide_t . M_k narrow_t and <B, M_k>, of the stack and of the last matrix."""
    (G, T, F), D, K = wide.shape, narrow.shape[-1], matrices.stack_pointer.shape[1]
    tokens = _tokens(T, products)
    constants = Meet(F, D, tokens, _padded(F, 64), _padded(D, 128), BATCH, TRITON_DTYPES[products])
    grid = G * (triton.cdiv(K, BATCH) + 1), triton.cdiv(T, tokens)
    launch(meet_kernel, grid, (wide, narrow, matrices, found, T, K), constants, warps=8 if tokens > 64 else 4)


def _leave_constants(matrix: Tensor, K: int, outer: Source | None, products: torch.dtype) -> Leave:
    F, D = matrix.shape[1:]
    turns = triton.next_power_of_2(triton.cdiv(K, AT_ONCE)) if K else 0
    ranks = outer.ranks if outer else 0
    block = _padded(F * D, ELEMENTS)
    return Leave(F, D, block, AT_ONCE, turns, _padded(F, 64), _padded(D, 128), ranks, TRITON_DTYPES[products])


def _leave(stack: Stack, outer: Source, products: torch.dtype) -> tuple[Tensor, Tensor]:
    """`_total` of `stack` and `_form` of `outer`."""
    base, K = stack.base_pointer, _matrices(stack)
    constants = _leave_constants(base, K, outer, products)
    written, moved = torch.empty_like(base), torch.empty_like(base)
    grid = len(base), triton.cdiv(base[0].numel(), constants.BLOCK) + triton.cdiv(constants.F, constants.BLOCK_F)
    launch(leave_kernel, grid, (stack, outer.matrices(), written, moved, K), constants, warps=4)
    return written, moved


def _total(stack: Stack, products: torch.dtype) -> Tensor:
    """alphas B + sum_k weights_k M_k [G, wide, narrow], alphas [G], weights [G, K]."""
    base, K = stack.base_pointer, _matrices(stack)
    out, constants = torch.empty_like(base), _leave_constants(base, K, None, products)
    grid = len(base), triton.cdiv(base[0].numel(), constants.BLOCK)
    launch(total_kernel, grid, (stack, out, K), constants, warps=4)
    return out


def _form(outer: Source, products: torch.dtype) -> Tensor:
    """scales B + sum_r coefficients_r wide_r narrow_r^T [G, wide, narrow]; the sum alone without B."""
    assert outer.short is not None and outer.long is not None
    out = outer.long.new_empty(len(outer.long), outer.long.shape[-1], outer.short.shape[-1])
    constants = _leave_constants(out, 0, outer, products)
    grid = len(out), triton.cdiv(constants.F, constants.BLOCK_F)
    launch(form_kernel, grid, (outer.matrices(), out), constants, warps=4)
    return out


def _act_backward(z: Tensor, grad_h: Tensor, grad_slope: Tensor | None, products: torch.dtype) -> Tensor:
    """The gradient of z, where the activation's is grad_h and its derivative's grad_slope."""
    out, constants = torch.empty_like(z), Act(1024, TRITON_DTYPES[products])
    grid = (triton.cdiv(z.numel(), constants.BLOCK),)
    launch(act_backward_kernel, grid, (z, grad_h, grad_slope, out, z.numel()), constants, warps=4)
    return out


def variants() -> list[Variant]:
    """One matrix of the presets' shape, F = 256 and D = 64, of a chunk of 63 tokens with a write at each; and, of the
    largest, F = 64."""
    small = [v for v in _variants(64, " 64x64") if v.kernel in (through_kernel, sides_kernel, meet_kernel)]
    return _variants(256, "") + small


def _variants(F: int, title: str) -> list[Variant]:
    products, (sources, T), D = torch.bfloat16, FORMED_OF, 64
    empty = partial(torch.empty, device="meta")
    wide, narrow, more_wide, more_narrow = empty(1, T, F), empty(1, T, D), empty(1, sources, F), empty(1, sources, D)
    base, written = empty(1, F, D), empty(1, T, F, D, dtype=products)
    read, owed = (Stack(base, empty(1, n), written, empty(1, T, n)) for n in (T, sources))
    alone, last = Stack(base, None, None, None), Stack(base, empty(1), written, empty(1, T))
    outer = Source(base.mT, empty(1), empty(1, sources), more_narrow, more_wide)
    met = Met(written, base, base)
    scores = [Scores(empty(1, T, n), empty(1, T), empty(1, n), empty(1)) for n in (T, sources)]
    calls = {
        "through to wide": lambda: _through(narrow, read, products, True, act=True),
        "through to narrow": lambda: _through(wide, read, products, False),
        "anchor to wide": lambda: _through(more_narrow, alone, products, True, act=True, slope=True),
        "anchor to narrow": lambda: _through(more_wide, alone, products, False),
        "sides": lambda: _sides(more_wide, more_narrow, owed, products),
        "meet of reads": lambda: _meet(wide, narrow, met, scores[0], products),
        "meet of sources": lambda: _meet(more_wide, more_narrow, met, scores[1], products),
        "leave": lambda: _leave(last, outer, products),
        "total": lambda: _total(last, products),
        "form": lambda: _form(outer, products),
        "form alone": lambda: _form(Source(None, None, None, more_narrow, more_wide), products),
        "act_backward": lambda: _act_backward(more_wide, more_wide, more_wide, products),
    }
    found = []
    for name, call in calls.items():
        with recording(f"stack {name}{title} bf16") as launches:
            call()
        found += launches
    return found
