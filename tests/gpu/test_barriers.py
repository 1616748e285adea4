"""On a GPU alone, and before all others: what one thread of a program stores in device memory, another loads.

`tl.debug_barrier` stands between the two in every kernel that keeps matrices in memory. Were it not enough, what is
read would depend on which warp came first, and equal calls with many programs would differ in their bits: where this
file is red, no figure of these kernels counts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atlas_kernels import MemoryRule
from atlas_kernels.gpu.newton_schulz import newton_schulz
from tests.support.device_problems import BFLOAT16_ON_A_GPU, outputs_and_gradients, rounded, small

pytestmark = BFLOAT16_ON_A_GPU

RUNS = 10
PRESET = {"key": 64, "value": 64, "hidden": 256}


def assert_equal_runs(run) -> None:
    first = run()
    for _ in range(RUNS - 1):
        again = run()
        for name, value in first.items():
            assert torch.equal(value, again[name]), f"{name} differs between equal calls"


# Of the first all is on chip and the trail in memory, of the second the backward goes by blocks, of the third both.
@pytest.mark.parametrize("shape", [(8192, 64, 64), (4096, 64, 256), (1024, 128, 512)])
def test_newton_schulz(shape):
    generator = torch.Generator(device="cuda").manual_seed(0)
    S = torch.randn(shape, generator=generator, device="cuda").requires_grad_()
    weight = torch.randn(shape, generator=generator, device="cuda")

    def run() -> dict[str, torch.Tensor]:
        out = newton_schulz(S, 5, products=torch.bfloat16)
        return {"out": out.detach(), "gradient": torch.autograd.grad(out, S, weight)[0]}

    assert_equal_runs(run)
    few = newton_schulz(S[:3].detach().requires_grad_(), 5, products=torch.bfloat16)
    assert torch.equal(few, run()["out"][:3]), "a matrix comes out otherwise among many programs than among few"


@pytest.mark.parametrize("ns_steps,ns_period", [(0, 1), (5, 64), (5, 8), (5, 4)])
@pytest.mark.parametrize("memory", ["mlp", "gated_mlp"])
def test_omega_memory(memory, ns_steps, ns_period):
    rule = MemoryRule(memory, norm="layer", ns_steps=ns_steps, ns_period=ns_period)
    low, _ = rounded(small(rule, 500, batch=8, heads=16, **PRESET), torch.bfloat16)
    assert_equal_runs(lambda: outputs_and_gradients(low, "triton"))
    narrow = replace(rule, momentum=False, window=1)
    low, _ = rounded(small(narrow, 500, batch=8, heads=16, **PRESET), torch.bfloat16)
    assert_equal_runs(lambda: outputs_and_gradients(low, "triton"))
