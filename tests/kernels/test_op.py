"""The public contract's errors: each names the argument, what came and what would do."""

from dataclasses import replace

import pytest
import torch

from atlas_kernels import Gates, MemoryRule, check_implementation, omega_memory, op
from atlas_kernels.chunked import TORCH
from tests.support.problems import problem

RULE = MemoryRule(window=3, chunk=8)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"memory": "lstm"}, "memory='lstm' is unknown; choose one of linear, mlp"),
        ({"loss": "l1"}, "loss='l1' is unknown"),
        ({"norm": "batch"}, "norm='batch' is unknown"),
        ({"activation": "relu"}, "activation='relu' is unknown"),
        ({"ns_coefficients": "muon"}, "ns_coefficients='muon' is unknown"),
        ({"window": 0}, "window=0 must be at least 1 token"),
        ({"chunk": -4}, "chunk=-4 must be at least 1 token"),
        ({"ns_steps": -1}, "ns_steps=-1"),
        ({"ns_period": 24}, "ns_period=24 must divide chunk=64; nearest that does: 16"),
        ({"ns_steps": 0, "ns_period": 4}, "ns_period=4 needs ns_steps > 0"),
        ({"memory": "linear", "norm": "layer"}, "norm='layer' belongs to deep memories"),
    ],
)
def test_rules_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        MemoryRule(**fields)


def arguments() -> dict:
    p = problem(RULE, 5)
    return {"q": p.q, "k": p.k, "v": p.v, "gates": p.gates, "weights": p.weights, "rule": RULE}


def state(**changes):
    _, after = omega_memory(**arguments())
    return replace(after, **changes)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda a: {"q": a["q"][0]}, r"q has shape \(5, 3, 4\); expected \[B, T, H, D\]"),
        (lambda a: {"q": a["q"][:, :0]}, "at least one token"),
        (lambda a: {"k": a["k"][:, :4]}, r"k has shape \(2, 4, 3, 4\); expected \[B, T, H, D\] like q"),
        (lambda a: {"k": a["k"].int()}, "k has dtype torch.int32; expected a floating-point dtype"),
        (lambda a: {"v": a["v"][..., 0]}, r"v has shape \(2, 5, 3\)"),
        (lambda a: {"gates": replace(a["gates"], alpha=a["gates"].alpha[:1])}, r"gates.alpha has shape \(1, 5, 3\)"),
        (lambda a: {"gates": replace(a["gates"], gamma=a["gates"].gamma[..., :2])}, "gates.gamma has shape .*window"),
        (lambda a: {"weights": a["weights"][:1]}, "weights holds 1 matrices; memory='mlp' takes 2"),
        (
            lambda a: {"rule": replace(RULE, memory="gated_mlp")},
            r"weights holds 2 matrices; memory='gated_mlp' takes 3: \[H, V, F\], \[H, F, D\], \[H, F, D\]",
        ),
        (lambda a: {"weights": (a["weights"][0], a["weights"][1][:2])}, r"weights\[1\] has shape"),
        (lambda a: {"residual": (a["v"], a["v"][:, :3])}, r"residual\[1\] has shape"),
        (lambda a: {"impl": "cuda"}, "impl='cuda' is unknown; choose one of auto, reference, chunked"),
        (lambda a: {"state": state(keys=torch.zeros(2, 5, 3, 4))}, r"state.keys has shape \(2, 5, 3, 4\)"),
        (lambda a: {"state": state(anchor=())}, "state.anchor holds 0 matrices; this memory has 2"),
        (lambda a: {"state": state(gamma=torch.zeros(2, 2, 3))}, "state.gamma is present"),
        (lambda a: {"state": state(), "residual": (a["v"], a["v"])}, "state.residuals is missing"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    good = arguments()
    omega_memory(**good)
    with pytest.raises(ValueError, match=message):
        omega_memory(**(good | change(good)))


def test_linear_has_no_residual_and_deep_needs_equal_widths():
    linear = problem(MemoryRule("linear", window=3, chunk=8), 5)
    with pytest.raises(ValueError, match="memory='linear' has none"):
        omega_memory(linear.q, linear.k, linear.v, linear.gates, linear.weights, linear.rule, residual=(linear.v,) * 2)
    p = problem(RULE, 5, key=6, value=4)
    with pytest.raises(ValueError, match="needs D = V; got D=6, V=4"):
        omega_memory(p.q, p.k, p.v, p.gates, p.weights, RULE)


def test_gates_count_as_pair_by_their_width():
    p = problem(RULE, 5)
    assert p.gates.pair and not Gates(*(p.gates.alpha,) * 4).pair


def test_an_implementation_is_checked_before_its_first_call(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weights = (torch.randn(2, 16, 64), torch.randn(2, 64, 16))
    rule = MemoryRule(ns_steps=0)
    for impl in ("auto", "reference", "chunked"):
        check_implementation(impl, rule, weights)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="impl='triton' needs a CUDA GPU, and q lies on cpu; take impl='chunked'"):
            check_implementation("triton", rule, weights)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_implementation("triton", rule, weights, torch.bfloat16)
    with pytest.raises(ValueError, match="with float32 products covers chunk . window - 1 up to 64.* not chunk=64"):
        check_implementation("triton", rule, weights)


@pytest.mark.parametrize(
    ("given", "asked", "taken"),
    [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_products_are_as_asked_or_as_q(monkeypatch, given, asked, taken):
    seen = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(op, "_gpu_kernels", lambda rule, weights, products: seen.append(products) or TORCH)
    p = problem(MemoryRule(ns_steps=0, chunk=16, window=4), 5, key=16, value=16, hidden=16, dtype=torch.float32)
    y, _ = omega_memory(p.q.to(given), p.k, p.v, p.gates, p.weights, p.rule, impl="triton", products=asked)
    assert seen == [taken] and y.dtype == given
