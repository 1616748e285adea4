"""Whether the kernels compute what they should: bfloat16 beside float64, and equal bits of equal calls.

A kernel that fails is timed nowhere. One shape each; the tests (tests/gpu) hold many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from atlas_kernels import newton_schulz as in_torch
from benchmarks.contenders import OpInputs
from benchmarks.fake_gpu import fake_gpu
from benchmarks.gpu.bench import MEMBERS, Bench, relative_rms

GREEN = "green"
# |kernel - float64| / |float64| that is allowed. Newton-Schulz, five steps, forward and gradient: as the tests allow.
NEWTON_SCHULZ = (6e-2, 1e-1)
# A memory's read and gradients. Inputs and weights moved by 2^-8 of their size move these by at most 1.4e-2.
MEMORY = 5e-2
TOKENS = 150  # two chunks and a part of one
# What one thread stores and another loads shows among many programs, if anywhere: so many memories, and equal calls.
MANY = {"batch": 8, "heads": 16}
RUNS = 5
LEAVES = ("q", "k", "v", "alpha", "eta", "theta", "gamma", "weights[0]", "weights[1]", "weights[2]")

Named = dict[str, Tensor]


def of_newton_schulz(bench: Bench) -> None:
    from atlas_kernels.gpu.newton_schulz import newton_schulz

    green = True
    for count, m, n in ((8192, 64, 64), (4096, 64, 256)):
        torch.manual_seed(0)
        S = torch.randn(count, m, n, device=bench.device).requires_grad_()
        weight = torch.randn(count, m, n, device=bench.device)

        def run(S: Tensor = S, weight: Tensor = weight) -> Named:
            out = newton_schulz(S, 5, products=torch.bfloat16)
            return {"out": out.detach(), "gradient": torch.autograd.grad(out, S, weight)[0]}

        few = S[:32].detach().double().requires_grad_()
        out = in_torch(few, 5)
        true = {"out": out.detach(), "gradient": torch.autograd.grad(out, few, weight[:32].double())[0]}
        green &= _holds(bench, f"newton_schulz {m} x {n}", run, true, dict(zip(true, NEWTON_SCHULZ, strict=True)))
    bench.measured("newton_schulz", GREEN, value=green)


def of_memory(bench: Bench, name: str) -> None:
    """Read and every gradient of a small problem, then equal bits of a large one."""
    memory, _, _ = MEMBERS[name]
    small = OpInputs.random(replace(memory, heads=2), 1, TOKENS, bench.device)
    true = _run(small.in_float64(), "chunked")
    green = _holds(bench, name, lambda: _run(small, "triton"), true, dict.fromkeys(true, MEMORY), equal=False)
    many = OpInputs.random(replace(memory, heads=MANY["heads"]), MANY["batch"], TOKENS, bench.device)
    green &= _equal(bench, name, lambda: _run(many, "triton"))
    bench.measured(name, GREEN, value=green)


def _run(given: OpInputs, impl: str) -> Named:
    out = given.output(impl, torch.bfloat16)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
    gradients = given.gradients((out * weight).sum())
    named = {"y": out.detach()} | {f"grad {n}": g for n, g in zip(LEAVES, gradients, strict=False) if g is not None}
    return named


def _holds(
    bench: Bench, name: str, run: Callable[[], Named], true: Named, bounds: dict[str, float], equal: bool = True
) -> bool:
    """Whether a call is within its bounds, of its first entries where `true` has fewer, and repeats itself if asked."""
    found = _called(bench, name, run)
    assert found.keys() == true.keys(), f"{name}: {sorted(found.keys() ^ true.keys())} on one side alone"
    for key, expected in true.items():
        assert found[key].shape[1:] == expected.shape[1:], f"{name}: {key} has shape {list(found[key].shape)}"
    if bench.dry:
        return True
    errors = {key: relative_rms(found[key][: len(expected)], expected) for key, expected in true.items()}
    bench.measured(name, "relative errors", value=errors)
    over = [f"{key}: {error:.1e} of {bounds[key]:.0e}" for key, error in errors.items() if not error < bounds[key]]
    if over:
        bench.measured(name, "over its bound", value=over)
    return (not equal or _equal(bench, name, run)) and not over


def _equal(bench: Bench, name: str, run: Callable[[], Named]) -> bool:
    first = _called(bench, name, run)
    if bench.dry:
        return True
    differ = {key for _ in range(RUNS - 1) for key, t in run().items() if not torch.equal(t, first[key])}
    bench.measured(name, "equal bits", value=sorted(differ) or f"in {RUNS} runs")
    return not differ


def _called(bench: Bench, name: str, run: Callable[[], Named]) -> Named:
    if not bench.dry:
        return run()
    with fake_gpu() as counts:
        found = run()
    bench.figure(name, "launches", value={"kernels": counts.launches, "torch": counts.torch_launches})
    return found
