"""What others have made for the same purpose, at the shape of omeganet's op and beside it in the same rounds."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import goals
from benchmarks.gpu.bench import MEMBERS, Bench, Call

NEEDS = {goals.GATED_DELTA: "fla", goals.TITANS: "titans_pytorch"}


def peer(bench: Bench, name: str) -> None:
    if importlib.util.find_spec(NEEDS[name]) is None:
        bench.figure(name, "not run", value=f"{NEEDS[name]} is not installed")
        return
    if bench.dry:
        bench.figure(name, "not run", value="peers do not run on the fake GPU")
        return
    run = gated_delta() if name == goals.GATED_DELTA else titans()
    if name == goals.GATED_DELTA:
        bench.figure(name, "plans", value="the first of each kernel's, not its best one")
    bench.times(name, contenders={name: run, goals.OMEGANET: bench.op("omeganet")})


def _shape() -> tuple[int, int, int, int]:
    memory, batch, tokens = MEMBERS["omeganet"]
    return batch, tokens, memory.heads, memory.head_dim


def gated_delta() -> Call:
    """flash-linear-attention's Gated DeltaNet. Its kernels try dozens of plans each, which takes minutes: the first one
    of each is taken."""
    import triton

    usual = triton.autotune

    def first_plan(configs: list[Any], *given: Any, **named: Any) -> Any:
        return usual(configs[:1], *given, **named)

    triton.autotune = first_plan
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    finally:
        triton.autotune = usual
    shape = _shape()
    make = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = (make(*shape).requires_grad_() for _ in range(3))
    beta = make(*shape[:3]).sigmoid().requires_grad_()
    decay = F.logsigmoid(make(*shape[:3]).float()).requires_grad_()
    normal = lambda t: F.normalize(t, dim=-1)  # noqa: E731

    def run() -> object:
        out = chunk_gated_delta_rule(normal(q), normal(k), v, decay, beta)[0]
        return torch.autograd.grad(out.float().square().mean(), (q, k, v, beta, decay))

    return run


def titans() -> Call:
    """titans-pytorch's NeuralMemory of as many heads; with its projections."""
    from titans_pytorch import NeuralMemory

    batch, tokens, heads, size = _shape()
    memory = NeuralMemory(dim=heads * size, heads=heads, dim_head=size, chunk_size=64).cuda()
    x = torch.randn(batch, tokens, heads * size, device="cuda", requires_grad=True)
    return lambda: torch.autograd.grad(memory(x)[0].square().mean(), (x, *memory.parameters()), allow_unused=True)
