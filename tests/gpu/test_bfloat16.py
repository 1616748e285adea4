"""On a GPU alone: every kernel with bfloat16 products against float64, forward and every gradient, at the presets'
shape; equal bits of equal calls are test_barriers.py's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atlas_kernels import MemoryRule, omega_memory
from atlas_kernels import newton_schulz as in_torch
from atlas_kernels.gpu.newton_schulz import newton_schulz
from atlas_kernels.gpu.scan import split
from tests.support.device_problems import BFLOAT16_ON_A_GPU, NEWTON_SCHULZ_TOLERANCE, compare_rounded, rounded, small
from tests.support.problems import relative_rms

pytestmark = BFLOAT16_ON_A_GPU

RULE = MemoryRule(norm="layer", ns_steps=0)  # chunk 64, window 16
PRESET = {"key": 64, "value": 64, "hidden": 256, "heads": 2}
TOKENS = 150  # two chunks and a part of one


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64), (128, 512), (48, 80), (16, 16)])
@pytest.mark.parametrize("falls", [1.0, 0.9], ids=["random", "falling singular values"])
def test_newton_schulz(shape, stored, falls):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *s: torch.randn(s, generator=generator).cuda()  # noqa: E731
    S = normal(4, shape[0], shape[0]) * falls ** torch.arange(shape[0], device="cuda") @ normal(4, *shape)
    S, weight = (t.to(stored) for t in (S, normal(4, *shape)))
    leaf, exact = S.clone().requires_grad_(), S.double().requires_grad_()
    out, true = newton_schulz(leaf, 5, products=torch.bfloat16), in_torch(exact, 5)
    found = (out, *torch.autograd.grad(out, leaf, weight))
    expected = (true, *torch.autograd.grad(true, exact, weight.double()))
    for one, other, bound in zip(found, expected, NEWTON_SCHULZ_TOLERANCE[torch.bfloat16], strict=True):
        assert relative_rms(one.double(), other) < bound


@pytest.mark.parametrize("memory", ["mlp", "gated_mlp"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": False, "window": 1},
        {"loss": "dot", "momentum": False},
        {"ns_steps": 5, "ns_period": 64},
        {"ns_steps": 5, "ns_period": 16, "norm": "none"},
        {"ns_steps": 5, "ns_period": 1},
    ],
    ids=["omeganet with momentum", "dla's window", "dot", "a write a chunk", "four writes", "exact atlas"],
)
def test_omega_memory(memory, changes):
    compare_rounded(small(replace(RULE, memory=memory, **changes), TOKENS, **PRESET), torch.bfloat16)


@pytest.mark.parametrize("memory", ["mlp", "gated_mlp"])
@pytest.mark.parametrize("changes", [{}, {"momentum": False, "window": 1}], ids=["momentum", "dla's window"])
def test_one_program_a_memory(memory, changes, monkeypatch):
    """As of many memories; of as few as above, several programs share one."""
    monkeypatch.setattr(split, "multiprocessors", lambda device: 1)
    compare_rounded(small(replace(RULE, memory=memory, **changes), TOKENS, **PRESET), torch.bfloat16)


def test_wide_heads():
    compare_rounded(small(RULE, TOKENS, key=128, value=128, hidden=512), torch.bfloat16)
    compare_rounded(
        small(replace(RULE, ns_steps=5, ns_period=32), TOKENS, key=128, value=128, hidden=512), torch.bfloat16
    )


@pytest.mark.parametrize("ns_steps,ns_period", [(0, 1), (5, 64)])
def test_packed_documents_are_documents(ns_steps, ns_period):
    """A tail alone is a shorter chunk than one that is filled up: its sums may be tiled otherwise."""
    rule = replace(RULE, ns_steps=ns_steps, ns_period=ns_period)
    p, _ = rounded(small(rule, TOKENS, **PRESET), torch.bfloat16)
    positions = torch.cat([torch.arange(64), torch.arange(TOKENS - 64)]).cuda()[None]
    y, _ = omega_memory(p.q, p.k, p.v, p.gates, p.weights, rule, impl="triton", positions=positions)
    alone = [p.run("triton", start, stop)[0] for start, stop in ((0, 64), (64, TOKENS))]
    assert relative_rms(y.double(), torch.cat(alone, 1).double()) < 1e-2
