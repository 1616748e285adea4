"""Newton-Schulz on a GPU: the contract of atlas_kernels.newton_schulz, thousands of small matrices at a time.

What is launched for which size is pinned here (`plan`); the kernels and what they cost are in forward.py
and backward.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas_kernels.autocast import unrounded_backward
from atlas_kernels.gpu.architecture import DEFAULT, arch_of
from atlas_kernels.gpu.launch import TRITON_DTYPES, Variant, launch, recording
from atlas_kernels.gpu.newton_schulz.backward import Scratch, backward_blocks, backward_whole
from atlas_kernels.gpu.newton_schulz.forward import (
    RANK_BLOCK,
    Constants,
    Matrices,
    Sizes,
    Strided,
    forward_blocks,
    forward_whole,
)
from atlas_kernels.newton_schulz import schedule

SMALLER, LARGER = 128, 512
# Past it three tf32 products in place of one fit neither registers nor, on sm_100, tensor memory.
SMALLER_OF_FLOAT32 = 64
INTERPRETED = not isinstance(forward_whole, triton.runtime.JITFunction)


@dataclass(frozen=True)
class Plan:
    """M, N: the powers of two that hold the smaller side and the larger one (`whole`) or a block of the larger."""

    whole: bool
    M: int
    N: int
    warps: int
    at_once: int = 1  # programs of a backward that a multiprocessor has registers and shared memory for

    def constants(self, n: int, products: torch.dtype, steps: int, turns: int = 1) -> Constants:
        return Constants(self.M, self.N, triton.cdiv(n, self.N), TRITON_DTYPES[products], steps, turns)


def plan(m: int, n: int, products: torch.dtype, backward: bool, arch: int = DEFAULT) -> Plan:
    """What a matrix [m, n], m <= n, is launched with on sm_<arch>: chosen so that registers hold it.

    On sm_90 four warps multiply 64 rows together: a program of 64 rows has no more, for others would do the same rows
    again (`executed_over_useful` in kernels/resources.json). sm_80 has no such groups and spills where they do not.
    """
    M, N = max(16, triton.next_power_of_2(m)), max(16, triton.next_power_of_2(n))
    exact, older = products == torch.float32, arch < 90
    # The backward holds G beside E and D, float32 products hold their operands twice.
    room = (2048 if exact else 4096) if backward else (4096 if exact else 16384)
    at_once = {16: 8, 32: 4, 64: 2, 128: 1}[M]
    if M <= 64 and M * N <= room:
        most = 4 if M == 64 and not (older and N > 128) else 8
        warps = min(most, max(1, M * N // (512 if backward else 1024)))
        return Plan(True, M, N, warps, 3 if M == 64 and arch == 90 else at_once)
    if exact:
        return Plan(False, M, 32, 4 if M <= 64 else 8, at_once)
    if backward and older and M >= 64:
        return Plan(False, M, 16, 4 if M == 64 else 8, at_once)
    return Plan(False, M, 32, 8, at_once) if M == 128 else Plan(False, M, 64, 4, at_once)


@dataclass(frozen=True)
class Source:
    """What `Matrices` are made of: base of any strides and dtype, alone or with the outer products of `share` matrices
    an owner, float32 and dense; or these alone. coefficients None: all are one."""

    base: Tensor | None
    scales: Tensor | None = None
    coefficients: Tensor | None = None
    short: Tensor | None = None
    long: Tensor | None = None
    share: int = 1

    @property
    def ranks(self) -> int:
        """Blocks in which a kernel sums the outer products."""
        return 0 if self.short is None else rank_blocks(self.short.shape[-2])

    def matrices(self) -> Matrices:
        """As a kernel takes them."""
        base = Strided(None, 0, 0, 0) if self.base is None else _strided(self.base)
        rank = 0 if self.short is None else self.short.shape[-2]
        outer = self.scales, self.coefficients, self.short, self.long, rank
        return Matrices(base, *outer, RANKS=tl.constexpr(self.ranks))


def rank_blocks(rank: int) -> int:
    """Blocks in which a kernel sums so many outer products."""
    return triton.cdiv(rank, RANK_BLOCK.value)


def _strided(matrices: Tensor) -> Strided:
    return Strided(matrices, *matrices.stride())


def _kernel(at: Plan, backward: bool) -> Any:
    if backward:
        return backward_whole if at.whole else backward_blocks
    return forward_whole if at.whole else forward_blocks


def newton_schulz(S: Tensor, steps: int, coefficients: str = "jordan", products: torch.dtype | None = None) -> Tensor:
    """NS_k(S), differentiable once; NS_0 is the identity and NS_k(0) = 0.

    S [..., m, n] float32, bfloat16 or float16, of any strides (leading dimensions that cannot be merged are copied);
    the result has its shape, dtype and, where it is dense, its strides. The smaller side up to 128, the larger to 512.
    products: the dtype of the factors of matrix products, sums are float32. None is S's own. A float32 momentum is
    trained with products=torch.bfloat16; float32 products are three tf32 products each, smaller side up to 64.
    Raises ValueError for what no kernel covers. Deterministic.
    """
    table = schedule(steps, coefficients)
    products = S.dtype if products is None else products
    _check(S, products)
    if not table or not S.numel():
        return S
    if S.shape[-2] > S.shape[-1]:
        return newton_schulz(S.mT, steps, coefficients, products).mT
    flat = S.reshape(-1, *S.shape[-2:])
    return _NewtonSchulz.apply(flat, steps, coefficients, products).view(S.shape)


def _check(S: Tensor, products: torch.dtype) -> None:
    for name, dtype in (("S", S.dtype), ("products", products)):
        if dtype not in TRITON_DTYPES:
            raise ValueError(f"{name} is {dtype}; the kernels take float32, bfloat16 and float16")
    if S.dim() < 2:
        raise ValueError(f"S has shape {list(S.shape)}; give matrices [..., m, n]")
    smaller, larger = sorted(S.shape[-2:])
    if smaller > SMALLER or larger > LARGER:
        raise ValueError(
            f"S has matrices {list(S.shape[-2:])}; the kernels cover a smaller side up to {SMALLER} and a larger up to "
            f'{LARGER}: take impl="chunked" for others'
        )
    if S.device.type == "meta":
        return
    if INTERPRETED:
        if S.is_cuda:
            raise ValueError("S is on a GPU and the kernels are interpreted; unset TRITON_INTERPRET")
        if products == torch.bfloat16:
            raise ValueError("products=torch.bfloat16 is wrong in Triton's interpreter; take float32 or float16 there")
        return
    if not S.is_cuda:
        raise ValueError(f"S is on {S.device}; the kernels need a GPU, or TRITON_INTERPRET=1 before they are imported")
    major, minor = torch.cuda.get_device_capability(S.device)
    if major < 8:
        raise ValueError(f"S is on a GPU of sm_{major}{minor}; the kernels need sm_80 or newer")
    if products == torch.float32 and smaller > SMALLER_OF_FLOAT32:
        raise ValueError(
            f"S has matrices {list(S.shape[-2:])}; float32 products cover a smaller side up to {SMALLER_OF_FLOAT32}: "
            "pass products=torch.bfloat16"
        )


@lru_cache(maxsize=64)
def coefficient_table(steps: int, coefficients: str, device: torch.device) -> Tensor:
    # Kept for later calls, which may differentiate where this one does not.
    with torch.inference_mode(False):
        return torch.tensor(schedule(steps, coefficients), dtype=torch.float32, device=device)


def _programs(count: int, at_once: int, device: torch.device) -> int:
    """As many as a GPU runs at once, so that what they keep aside does not grow with the batch."""
    if device.type != "cuda":
        return min(count, 2)
    return min(count, at_once * torch.cuda.get_device_properties(device).multi_processor_count)


def launch_forward(source: Source, table: Tensor, products: torch.dtype, result: Tensor) -> Tensor:
    """NS of `source` into `result` [matrices, m, n], of any strides; the norms that the backward takes [matrices]."""
    count, m, n = result.shape
    norms = torch.empty(count, dtype=torch.float32, device=result.device)
    at = plan(m, n, products, False, arch_of(result.device))
    arguments = source.matrices(), _strided(result), norms, table, Sizes(count, m, n, source.share)
    launch(_kernel(at, False), (count,), arguments, at.constants(n, products, len(table)), warps=at.warps)
    return norms


def launch_backward(
    source: Source, gradient: Source, norms: Tensor, table: Tensor, products: torch.dtype, result: Tensor
) -> None:
    """The gradient of each matrix of `source` into `result` [matrices, m, n], of any strides."""
    count, m, n = result.shape
    steps = len(table)
    at = plan(m, n, products, True, arch_of(result.device))
    programs, columns = _programs(count, at.at_once, result.device), triton.cdiv(n, at.N) * at.N
    trail = steps * (at.M * columns + 2 * at.M**2) + (0 if at.whole else 2 * at.M**2)
    scratch = Scratch(
        torch.empty(programs, trail, dtype=products, device=result.device),
        None if at.whole else torch.empty(programs, at.M * columns, dtype=torch.float32, device=result.device),
    )
    # A power of two, so that few batch sizes compile anew.
    turns = triton.next_power_of_2(triton.cdiv(count, programs))
    sizes = Sizes(count, m, n, source.share)
    arguments = source.matrices(), gradient.matrices(), _strided(result), norms, table, scratch, sizes
    launch(_kernel(at, True), (programs,), arguments, at.constants(n, products, steps, turns), warps=at.warps)


class _NewtonSchulz(torch.autograd.Function):
    """S [matrices, m, n] with m <= n."""

    @staticmethod
    def forward(ctx: Any, S: Tensor, steps: int, coefficients: str, products: torch.dtype) -> Tensor:
        result = torch.empty_like(S)
        table = coefficient_table(steps, coefficients, S.device)
        norms = launch_forward(Source(S), table, products, result)
        ctx.save_for_backward(S, norms, table)
        ctx.products = products
        return result

    @staticmethod
    @once_differentiable
    @unrounded_backward
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        S, norms, table = ctx.saved_tensors
        result = torch.empty_like(S)
        launch_backward(Source(S), Source(gradient), norms, table, ctx.products, result)
        return result, None, None, None


# Matrices, and outer products of S and of its gradient: of a chunk of 63 tokens with a window of 17. Of 64 the kernels
# would be told that their number is a multiple of 16, which a last chunk's is not.
COUNT, FORMED_OF = 31, (79, 63)


def variants() -> list[Variant]:
    """A float32 momentum with bfloat16 products, as it is trained; in memory and formed from its factors."""
    return [
        variant
        for m, n in ((64, 64), (64, 256), (128, 128), (128, 512), (48, 80))
        for formed in (False, True)
        if not (formed and m == 48)
        for variant in _variants(m, n, formed)
    ]


def _variants(m: int, n: int, formed: bool) -> list[Variant]:
    """Both ways."""
    products = torch.bfloat16
    empty = partial(torch.empty, device="meta")

    def source(rank: int) -> Source:
        if not formed:
            return Source(empty(COUNT, m, n))
        factors = empty(1, COUNT), empty(1, COUNT, rank), empty(1, rank, m), empty(1, rank, n)
        # A momentum is dense along its narrow side, the smaller one; so are the results.
        return Source(empty(1, n, m).mT, *factors, share=COUNT)

    def result(backward: bool) -> Tensor:
        stored = products if formed and plan(m, n, products, backward).whole else torch.float32
        return empty(COUNT, n, m, dtype=stored).mT if formed else empty(COUNT, m, n)

    table = empty(5, 3)
    with recording(f"{{}}{' formed' if formed else ''} {m}x{n} bf16") as found:
        norms = launch_forward(source(FORMED_OF[0]), table, products, result(False))
        launch_backward(source(FORMED_OF[0]), source(FORMED_OF[1]), norms, table, products, result(True))
    return found
