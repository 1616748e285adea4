"""Newton-Schulz of thousands of matrices, five steps: the kernel, each plan of it, and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atlas_kernels import newton_schulz as in_torch
from atlas_kernels.gpu import newton_schulz as kernels
from benchmarks.gpu.bench import SIDE, Bench, Call

COUNT, STEPS = 8192, 5
WARPS = (4, 8)


def matrices(bench: Bench, m: int, n: int, stored: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(COUNT, m, n, device=bench.device, dtype=stored).requires_grad_()


def forward(S: Tensor) -> Tensor:
    return kernels.newton_schulz(S.detach(), STEPS)


def both(S: Tensor, products: torch.dtype | None = None) -> Tensor:
    """Forward and backward."""
    return torch.autograd.grad(kernels.newton_schulz(S, STEPS, products=products), S, S.detach())[0]


@contextmanager
def planned_with(warps: int) -> Iterator[None]:
    """Every launch within takes so many warps."""
    usual = kernels.plan

    def plan(*given: Any, **named: Any) -> kernels.Plan:
        return replace(usual(*given, **named), warps=warps)

    kernels.plan = plan
    try:
        yield
    finally:
        kernels.plan = usual


def with_warps(run: Call, warps: int) -> Call:
    def planned() -> None:
        with planned_with(warps):
            run()

    return planned


def size(bench: Bench, m: int, n: int) -> None:
    """As it is planned, then with 4 and with 8 warps; shares are of the rate of one large product, FLOPs of the direct
    form. A backward computes the forward again; its FLOPs are not counted as useful."""
    at, S = f"{m} x {n}", matrices(bench, m, n)
    contenders: dict[str, Call] = {"kernel": partial(forward, S), "kernel, with backward": partial(both, S)}
    seconds = bench.times(at, contenders=contenders | {"matmul": bench.product()})
    rate = 2 * SIDE**3 / seconds["matmul"]
    useful = COUNT * STEPS * (4.0 * m * m * n + 2 * m**3)
    bench.figure(at, "useful_flops", value=useful)
    bench.measured(at, "share_of_matmul_rate", value=useful / seconds["kernel"] / rate)
    for warps in WARPS:
        planned = {f"{name}, {warps} warps": with_warps(run, warps) for name, run in contenders.items()}
        bench.times(at, contenders=planned)


def compiled(bench: Bench, m: int, n: int) -> None:
    """The kernel beside torch's products, compiled, eager and as CUDA graphs."""
    at, S = f"{m} x {n}", matrices(bench, m, n).detach()
    contenders: dict[str, Call] = {"kernel": partial(forward, S)}
    contenders["torch.compile"] = partial(bench.compiled(in_torch), S, STEPS)
    contenders |= bench.graphs(at, contenders=contenders)
    seconds = bench.times(at, contenders=contenders | {"torch": lambda: in_torch(S, STEPS)})
    yardstick = min(seconds[name] for name in seconds if name.startswith("torch.compile"))
    bench.measured(at, "times_torch_compile", value=yardstick / seconds["kernel"])
