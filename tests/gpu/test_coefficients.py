"""What the gates say of a chunk, in kernels, against the torch code and against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from atlas_kernels import Gates, MemoryRule, chunked
from atlas_kernels.decays import pair_band, source_band
from atlas_kernels.gpu.coefficients import coefficients
from atlas_kernels.layout import Layout
from atlas_kernels.writes import coefficients_of
from atlas_megatron.config import MemoryConfig
from atlas_megatron.config.presets import PRESETS
from benchmarks.fake_gpu import fake_gpu
from benchmarks.presets import contender
from tests.support.device_problems import DEVICE
from tests.support.problems import assert_close, gradients, relative_rms

BASE = MemoryRule(window=5, chunk=16, ns_steps=0, norm="layer")
BATCH, HEADS = 2, 2


def random_gates(rule: MemoryRule, chunks: int, tokens: int, pair: bool, seed: int = 0) -> dict[str, Tensor]:
    """alpha, eta, theta [B, N C, H] and gamma [B, N C, H, W], or of sources [N, G, I]; gates of 0 and 1 among them."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(shape, generator=generator)  # noqa: E731
    one = (BATCH, chunks * tokens, HEADS)
    sources = (chunks, BATCH * HEADS, tokens + rule.window - 1)
    gates = {
        "alpha": uniform(0.8, 1.0, *one),
        "eta": uniform(0.0, 0.05, *one),
        "theta": uniform(0.5, 1.0, *one),
        "gamma": uniform(0.0, 1.0, *one, rule.window) if pair else uniform(0.0, 1.0, *sources),
    }
    for place, gate in enumerate(gates.values()):
        flat = gate.view(-1)
        flat[place :: 11 + place], flat[place + 2 :: 13 + place] = 0.0, 1.0
    return {name: gate.to(DEVICE).requires_grad_() for name, gate in gates.items()}


def in_torch(rule: MemoryRule, gates: dict[str, Tensor], tokens: int, pair: bool) -> dict[str, Tensor]:
    layout = Layout(gates["alpha"].shape[1] // tokens, tokens)
    alpha, eta, theta = (layout.by_chunk(gates[name]) for name in ("alpha", "eta", "theta"))
    band = pair_band(layout.by_chunk(gates["gamma"])) if pair else source_band(gates["gamma"], tokens)
    return tables(coefficients_of(rule, alpha, eta, theta, band), rule, tokens)


def in_kernels(rule: MemoryRule, gates: dict[str, Tensor], tokens: int, pair: bool) -> dict[str, Tensor]:
    own = None if pair else gates["gamma"]
    return tables(coefficients(rule, 0, Gates(**gates), tokens, own), rule, tokens)


def tables(of, rule: MemoryRule, tokens: int) -> dict[str, Tensor]:
    """The fields without padding, in one shape."""
    named = {name: t for name, t in vars(of).items() if t is not None}
    named["sources"] = named["sources"][..., :tokens, : tokens + rule.window - 1]
    return {name: t if name == "sources" else t.flatten(2) for name, t in named.items()}


def with_gradients(outputs: dict[str, Tensor], gates: dict[str, Tensor]) -> dict[str, Tensor]:
    return outputs | {f"grad {name}": g for name, g in gradients(list(outputs.values()), gates).items()}


@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "sum"])
@pytest.mark.parametrize("pair", [True, False], ids=["pair", "source"])
@pytest.mark.parametrize("chunks,tokens,window", [(2, 16, 5), (1, 13, 1), (1, 1, 4), (3, 7, 9), (1, 19, 16)])
def test_as_in_torch(chunks, tokens, window, pair, momentum):
    """Gates of exactly 0 and 1 among them, chunks of one token, and shorter than their window."""
    rule = replace(BASE, momentum=momentum, window=window)
    gates = random_gates(rule, chunks, tokens, pair)
    found = with_gradients(in_kernels(rule, gates, tokens, pair), gates)
    assert_close(found, with_gradients(in_torch(rule, gates, tokens, pair), gates))


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("name", ["alpha", "theta", "gamma", "eta"])
def test_a_gate_that_is_zero_or_one_everywhere(name, value):
    gates = random_gates(BASE, 1, 16, pair=True)
    with torch.no_grad():
        gates[name].fill_(value)
    found = with_gradients(in_kernels(BASE, gates, 16, True), gates)
    expected = with_gradients(in_torch(BASE, gates, 16, True), gates)
    assert_close(found, expected)
    if name == "theta" and value == 0.0:
        # Nothing crosses a zero: to the bit.
        assert torch.equal(found["to_momentum"] == 0, expected["to_momentum"] == 0)


def test_as_exact_as_float64_allows():
    """Of a chunk of 64 and a window of 16; the torch code's error in float32 is about 2e-7."""
    rule = replace(BASE, window=16, chunk=64)
    gates = random_gates(rule, 1, 64, pair=True)
    exact = {name: gate.detach().double().requires_grad_() for name, gate in gates.items()}
    found = with_gradients(in_kernels(rule, gates, 64, True), gates)
    for name, true in with_gradients(in_torch(rule, exact, 64, True), exact).items():
        assert relative_rms(found[name].double(), true) <= 2e-6, name


def test_padding_is_zero():
    gates = random_gates(BASE, 2, 13, pair=True)
    sources = coefficients(BASE, 0, Gates(**gates), 13, None).sources
    assert sources.shape[-2:] == (16, 32)
    assert not sources[..., 13:, :].any() and not sources[..., 17:].any() and sources[..., :13, :17].any()


def test_gates_in_any_layout():
    """A slice along the sequence, one value for all heads, the window before the heads."""
    tokens = 8
    whole = random_gates(BASE, 2, tokens, pair=True)
    alpha, eta, theta, gamma = (t.detach() for t in whole.values())
    given = {
        "alpha": alpha[:, tokens:],
        "eta": eta[:, tokens:, :1].expand(-1, -1, HEADS),
        "theta": theta.transpose(1, 2).contiguous().transpose(1, 2)[:, tokens:],
        "gamma": gamma.transpose(2, 3).contiguous().transpose(2, 3)[:, tokens:],
    }
    strided = {name: t.requires_grad_() for name, t in given.items()}
    dense = {name: t.detach().contiguous().requires_grad_() for name, t in given.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    found, expected = (with_gradients(in_kernels(BASE, gates, tokens, True), gates) for gates in (strided, dense))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "sum"])
def test_the_same_bits_with_and_without_gradients(momentum):
    rule = replace(BASE, momentum=momentum)
    gates = random_gates(rule, 2, 16, pair=True)
    found = in_kernels(rule, gates, 16, True)
    with torch.no_grad():
        again = in_kernels(rule, gates, 16, True)
    assert all(torch.equal(found[name], again[name]) for name in found)


# Operators of torch that one segment of a preset may take, forward and backward, with its feature map and the loss.
@pytest.mark.parametrize("preset,most", [("omeganet", 60), ("titans", 55)])
def test_few_operators_of_torch_stand_around_the_kernels(preset, most, monkeypatch):
    """Nothing recomputed, one segment: what is left copies tokens to chunks and back, and hands over the state."""
    memory = replace(MemoryConfig(heads=4, head_dim=64), **PRESETS[preset])
    monkeypatch.setattr(chunked, "HELD_BYTES", 1 << 50)
    run = contender(memory, batch=2, tokens=1024, products=torch.bfloat16, device="meta", impl="triton")
    with fake_gpu() as counts:
        run()
    assert counts.torch_launches <= most
    assert counts.kernels["coefficients"] == counts.kernels["coefficients_backward"] == 1
