"""A memory layer's sizes, starts and gates, of a section that is no configuration."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from atlas_kernels import MemoryRule, initial_coefficients, omega_memory, write_gate
from atlas_kernels.gated_norm import head_norm, memory_as_gate
from atlas_kernels.layer_start import (
    ETA_HEADROOM,
    FREE_GAIN,
    GATED_RETENTION,
    RETENTION,
    W1_GAIN,
    alpha_start,
    coefficient_count,
    eta_start,
    first_gain,
    former_eta_per_token,
    gate_count,
    gate_starts,
    gate_widths,
    gates_of,
    initial_weights,
    lifted,
    lifted_for,
    own_residual,
    start_coefficients,
    weight_shapes,
)

BATCH, TOKENS, HEADS, WIDTH, WINDOW = 2, 6, 3, 8, 4


def section(**changed: Any) -> SimpleNamespace:
    """An ATLAS memory, and what a case changes of it."""
    keys: dict[str, Any] = {
        "network": "mlp", "loss": "l2", "norm": "none", "heads": HEADS, "head_dim": WIDTH, "expansion": 2,
        "kernel": "lifted", "feature_map": "hadamard", "degree": 2, "sketch_width": 0, "window": WINDOW, "chunk": 8,
        "omega_gates": "pair", "momentum": True, "step_in_momentum": False, "retention": True, "ns_steps": 5,
        "ns_period": 2, "ns_step": "last", "ns_coefficients": "jordan", "activation": "gelu", "write_gate": False,
        "alpha_start": 0.0, "theta_start": 0.9, "gamma_start": 0.5, "eta_start": 0.0, "eta_sum": 0.1,
        "eta_per_token": 0.005,
        "anchor_gradient": 1.0, "shard": 0, "residual": True, "read": "token", "locals": (), "projection": False,
    }  # fmt: skip
    return SimpleNamespace(**{**keys, **changed})


PLAIN = {"ns_steps": 0, "ns_period": 1, "momentum": False, "norm": "layer"}
SECTIONS = {
    "atlas": section(),
    "without residual": section(residual=False),
    "atlas++": section(network="gated_mlp", residual=False),
    "omeganet": section(**PLAIN),
    "titans": section(**{**PLAIN, "momentum": True}, omega_gates="none", window=1, step_in_momentum=True),
    "source": section(omega_gates="source"),
    "no retention": section(**PLAIN, retention=False),
    "linear": section(**{**PLAIN, "norm": "none"}, network="linear", feature_map="taylor"),
    "sketch": section(feature_map="sketch", sketch_width=12),
    "softmax": section(**{**PLAIN, "norm": "none"}, kernel="softmax", feature_map="identity"),
    "write gate": section(write_gate=True, ns_step="sum"),
    "write gate, titans": section(
        **{**PLAIN, "momentum": True}, omega_gates="none", window=1, step_in_momentum=True, write_gate=True
    ),
}
every_section = pytest.mark.parametrize("memory", SECTIONS.values(), ids=SECTIONS)


def written() -> tuple[Tensor, Tensor]:
    """k of length 1 and v [B, T, H, K]."""
    k, v = torch.randn(2, BATCH, TOKENS, HEADS, WIDTH, generator=torch.Generator().manual_seed(3)).double()
    return torch.nn.functional.normalize(k, dim=-1), v


def view_of(memory: SimpleNamespace, fill: float = 0.0) -> Tensor | None:
    return torch.full((HEADS, 2 * WIDTH), fill, dtype=torch.float64) if memory.write_gate else None


@every_section
def test_sizes_starts_and_gates_fit_the_memory(memory: SimpleNamespace) -> None:
    """`omega_memory` takes them all: a memory that has just started answers, and its rule is the section's."""
    weights = tuple(w.double() for w in initial_weights(memory))
    assert [tuple(w.shape) for w in weights] == [(HEADS, *shape) for shape in weight_shapes(memory)]
    learned = start_coefficients(memory)
    assert coefficient_count(memory) == (0 if learned is None else len(learned))
    coefficients = None if learned is None else learned.double().repeat(HEADS, 1)
    k, v = written()
    q = k.flip(1)
    bias = torch.tensor(gate_starts(memory, 64), dtype=torch.float64).repeat(HEADS, 1)
    assert bias.shape[1] == gate_count(memory) == sum(gate_widths(memory).values())
    logits = torch.zeros(BATCH, TOKENS, HEADS * bias.shape[1], dtype=torch.float64)
    gates = gates_of(memory, logits, bias, k, v, view_of(memory))
    lifted_q, lifted_k = lifted_for(memory, q, coefficients), lifted_for(memory, k, coefficients, key=True)
    assert lifted_q.shape[-1] == lifted(memory)
    residual = (q, k) if own_residual(memory) else None
    y, _ = omega_memory(lifted_q, lifted_k, v, gates, weights, MemoryRule.of(memory), residual=residual)
    assert y.shape == v.shape and y.isfinite().all()


@every_section
def test_gates_start_where_the_section_says(memory: SimpleNamespace) -> None:
    k, v = written()
    bias = torch.tensor(gate_starts(memory, 500), dtype=torch.float64).repeat(HEADS, 1)
    logits = torch.zeros(BATCH, TOKENS, HEADS * bias.shape[1])
    found = gates_of(memory, logits, bias, k, v, view_of(memory))
    eta, write = eta_start(memory), 1.0 / ETA_HEADROOM if memory.write_gate and memory.ns_steps else 1.0
    gamma = (eta if memory.step_in_momentum else 1.0) if memory.omega_gates == "none" else memory.gamma_start
    expected = {
        "alpha": alpha_start(memory, 500) if memory.retention else 1.0,
        "eta": 1.0 if memory.step_in_momentum else eta,
        "theta": memory.theta_start if memory.momentum else 0.0,
        "gamma": gamma * write,
    }
    for name, start in expected.items():
        gate = getattr(found, name)
        wide = name == "gamma" and memory.omega_gates == "pair"
        assert gate.shape == (BATCH, TOKENS, HEADS, *([WINDOW] if wide else []))
        torch.testing.assert_close(gate, torch.full_like(gate, start), rtol=1e-6, atol=0)


def test_gates_are_sigmoids_of_their_own_logits() -> None:
    memory, generator = SECTIONS["atlas"], torch.Generator().manual_seed(4)
    gates = gate_count(memory)
    logits = torch.randn(BATCH, TOKENS, HEADS, gates, generator=generator, dtype=torch.float64)
    bias = torch.randn(HEADS, gates, generator=generator, dtype=torch.float64)
    found = gates_of(memory, logits.flatten(2), bias, *written())
    share = 1 / (1 + (-(logits + bias)).exp())
    assert list(gate_widths(memory)) == ["alpha", "eta", "theta", "gamma"]
    torch.testing.assert_close(found.alpha, share[..., 0])
    torch.testing.assert_close(found.eta, share[..., 1] * ETA_HEADROOM * eta_start(memory))
    torch.testing.assert_close(found.theta, share[..., 2])
    torch.testing.assert_close(found.gamma, share[..., 3:])
    rounded = gates_of(memory, logits.flatten(2).bfloat16(), bias.bfloat16(), *written())
    assert {gate.dtype for gate in vars(rounded).values()} == {torch.float32}


def test_a_write_gate_sees_key_and_value_and_rules_forgetting() -> None:
    memory = SECTIONS["write gate"]
    k, v = written()
    bias = torch.randn(HEADS, gate_count(memory), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logits, view = torch.zeros(BATCH, TOKENS, bias.numel(), dtype=torch.float64), view_of(memory, 0.3)
    found = gates_of(memory, logits, bias, k, v, view)
    write = write_gate(bias[:, 1] + 0.3 * (k.sum(-1) + v.sum(-1)))
    torch.testing.assert_close(found.eta, write * ETA_HEADROOM * eta_start(memory))
    torch.testing.assert_close(found.alpha, bias[:, 0].sigmoid() ** write)
    torch.testing.assert_close(found.gamma, bias[:, 3:].sigmoid() * write.unsqueeze(-1))
    with pytest.raises(ValueError, match="view=None, but memory.write_gate is set; give"):
        gates_of(memory, logits, bias, k, v)


def test_step_sizes_and_retention_are_derived() -> None:
    assert eta_start(section(eta_start=0.3)) == 0.3
    assert eta_start(section()) == 2 * 0.005
    assert eta_start(section(ns_step="sum", eta_per_token=0.002)) == 0.002
    for chunk, period, tokens in ((64, 16, 16), (64, 64, 64), (256, 256, 64), (2048, 512, 16)):
        assert eta_start(section(chunk=chunk, ns_period=period)) == pytest.approx(0.005 * tokens)
    # The steps of a chunk, all at one anchor, sum to eta_sum.
    assert eta_start(section(**PLAIN)) * 0.5 * WINDOW * 8 == pytest.approx(0.1)
    momentum = section(**{**PLAIN, "momentum": True}, omega_gates="none")
    assert eta_start(momentum) * WINDOW / (1 - 0.9) * 8 == pytest.approx(0.1)
    assert eta_start(section(**{**PLAIN, "norm": "none"}, network="linear", loss="dot")) * 0.5 * WINDOW == 0.1
    assert alpha_start(section(alpha_start=0.7), 500) == 0.7
    # Chunks of one write forget a hundredth of each token up to 64; longer ones as much as that of 64.
    for chunk, kept in ((8, 0.99**8), (64, 0.527), (256, 0.527)):
        assert alpha_start(section(chunk=chunk, ns_period=chunk), 500) ** chunk == pytest.approx(kept, abs=2e-3)
    assert alpha_start(section(chunk=64, ns_period=16), 500) == alpha_start(section(chunk=64, ns_period=1), 500)
    assert alpha_start(section(chunk=64, ns_period=16), 500) == RETENTION
    assert alpha_start(section(chunk=8, ns_period=2), 500) == alpha_start(section(chunk=16, ns_period=1), 500)
    assert alpha_start(section(chunk=8, ns_period=2), 500) == RETENTION**4
    for period in (16, 64):
        gated = section(chunk=64, ns_period=period, network="gated_mlp")
        assert alpha_start(gated, 500) == GATED_RETENTION
    assert [alpha_start(section(**PLAIN), tokens) for tokens in (500, 10)] == [1 - 1 / 500, 1 - 1 / 100]


def test_a_memory_saved_without_a_step_a_token_keeps_the_one_that_it_had() -> None:
    """As it was derived at each time; without residual a write stood for at most 16 tokens."""
    assert former_eta_per_token({}) == former_eta_per_token({"network": "linear", "residual": False}) == 0.01
    assert former_eta_per_token({"network": "gated_mlp"}) == 0.0015
    assert former_eta_per_token({"network": "gated_mlp", "residual": False}) == 0.002
    for period, step in ((1, 0.003), (16, 0.003), (64, 0.00075)):
        assert former_eta_per_token({"network": "mlp", "residual": False, "ns_period": period}) == step


def test_matrices_start_at_their_sizes() -> None:
    torch.manual_seed(0)
    memory = section(network="gated_mlp", heads=40)
    first, second, gate = initial_weights(memory)
    assert first_gain(section(residual=False)) == FREE_GAIN
    assert first_gain(section(residual=False, network="linear")) == W1_GAIN
    assert first_gain(memory) == W1_GAIN and first_gain(section(**PLAIN)) == (2 * 2 * WIDTH) ** 0.25
    assert first.std().item() == pytest.approx(W1_GAIN / math.sqrt(2 * WIDTH), rel=0.05)
    eye = torch.eye(WIDTH).expand(40, -1, -1)
    torch.testing.assert_close(second.mT @ second, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(gate.mT @ gate, 2 * WIDTH * eye, rtol=0, atol=1e-4)
    # Hidden units of a plain memory see a key of length one with a standard deviation of sqrt(1/2).
    raw = initial_weights(section(**{**PLAIN, "norm": "none"}, heads=40))[1]
    torch.testing.assert_close(raw.mT @ raw, eye, rtol=0, atol=1e-5)
    for plain in ({}, PLAIN):
        second = initial_weights(section(**plain, heads=40))[1]
        torch.testing.assert_close(second.mT @ second, WIDTH * eye, rtol=0, atol=1e-3)
    seen = torch.einsum("hfd,hd->hf", second, torch.nn.functional.normalize(torch.randn(40, WIDTH), dim=-1))
    assert seen.square().mean().sqrt().item() == pytest.approx(0.5**0.5, rel=1e-4)


def test_an_exponential_kernels_scale_goes_to_the_query() -> None:
    memory, x = SECTIONS["softmax"], written()[0]
    scale = torch.full((HEADS, 1), 1.7, dtype=torch.float64)
    assert torch.equal(lifted_for(memory, x, scale), 1.7 * x) and torch.equal(lifted_for(memory, x, scale, key=True), x)
    start = start_coefficients(SECTIONS["atlas"])
    assert start is not None and torch.equal(start, initial_coefficients("hadamard", 2))


def test_norms_are_their_formulas() -> None:
    y, gain = written()[1], torch.rand(HEADS, WIDTH, dtype=torch.float64)
    mean = y.square().mean(-1, keepdim=True)
    torch.testing.assert_close(head_norm(y, gain, 1e-3), y / (mean + 1e-3).sqrt() * gain)
    attention, memory = y.flatten(2), written()[0].flatten(2)
    gains = torch.rand(2, HEADS * WIDTH, dtype=torch.float64)
    seen, gate = memory_as_gate(attention, memory, *gains, 1e-3)
    both = torch.stack([attention, memory])
    attended, asked = both / (both.square().mean(-1, keepdim=True) + 1e-3).sqrt() * gains[:, None, None]
    torch.testing.assert_close(seen, attended)
    torch.testing.assert_close(gate, asked * asked.sigmoid())
