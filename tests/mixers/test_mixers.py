"""Each mixer on its own: what it computes, what it lets a token see, what it measures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_kernels import Gates, MemoryState, omega_memory
from atlas_kernels.layer_start import gate_widths
from atlas_megatron.config import MemoryConfig
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.mixers.base import Documents, Mixer, Mode, in_mode
from atlas_megatron.mixers.stream import StreamContext
from tests.support.single_mixer import build_mixer
from tests.support.small_model import SMALL

MEMORIES = {
    **{name: replace(SMALL.memory, **PRESETS[name]) for name in PRESETS},
    "source gates": replace(SMALL.memory, omega_gates="source"),
    "taylor": replace(SMALL.memory, feature_map="taylor"),
    "sketch": replace(SMALL.memory, feature_map="sketch", sketch_width=16),
    "softmax": replace(SMALL.memory, **PRESETS["swdt"] | {"kernel": "softmax"}),
    "write gate": replace(SMALL.memory, write_gate=True, ns_step="sum"),
    "linear": replace(SMALL.memory, network="linear", norm="none", feature_map="identity"),
    "shards": replace(SMALL.memory, shard=8),
    "locals": replace(SMALL.memory, locals=("4/8", "2/4"), projection=True, write_gate=True, ns_step="sum"),
}


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.usefixtures("single_process_megatron")
def test_every_parameter_of_the_memory_layer_learns(memory: MemoryConfig) -> None:
    mixer = build_mixer("M", replace(SMALL, memory=memory))
    mixer(torch.randn(16, 2, 32))[0].square().mean().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("symbol", ["M", "*", "F", "A", "C"])
@pytest.mark.usefixtures("single_process_megatron")
def test_a_token_sees_nothing_after_it(symbol: str) -> None:
    mixer = build_mixer(symbol, SMALL)
    x = torch.randn(32, 2, 32)
    changed = x.clone()
    changed[19:] = torch.randn(13, 2, 32)
    with torch.no_grad():
        y, z = mixer(x)[0], mixer(changed)[0]
    assert torch.equal(y[:19], z[:19])
    assert not torch.allclose(y[19], z[19])


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("symbol", ["M", "G"])
@pytest.mark.usefixtures("single_process_megatron")
def test_keys_start_late_where_the_config_says(symbol: str, late: bool) -> None:
    memory, delta = replace(SMALL.memory, late_keys=late), replace(SMALL.delta, late_keys=late)
    mixer = build_mixer(symbol, replace(SMALL, memory=memory, delta=delta))
    heads = len(mixer.convolution)
    q, k = mixer.linear_qkvg.weight.unflatten(0, (heads, 4, -1)).unbind(1)[:2]
    queries, keys = mixer.convolution.unflatten(1, (3, -1)).unbind(1)[:2]
    assert torch.equal(q, k) is late
    assert torch.equal(queries[..., 1:], keys[..., :-1]) is late


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("symbol", ["M", "G"])
@pytest.mark.usefixtures("single_process_megatron")
def test_copying_and_an_open_gate_start_where_the_config_says(symbol: str, copies: bool) -> None:
    keys = {"copy_start": copies, "open_gate": copies}
    mixer = build_mixer(
        symbol, replace(SMALL, memory=replace(SMALL.memory, **keys), delta=replace(SMALL.delta, **keys))
    )
    values = mixer.linear_qkvg.weight.unflatten(0, (len(mixer.convolution), 4, -1))[:, 2]
    assert torch.equal(mixer.linear_out.weight, values.flatten(0, 1).mT) is copies
    newest = mixer.convolution.unflatten(1, (3, -1))[:, 2, :, -1]
    assert bool((newest > 0.8).all()) is copies
    assert (mixer.branch_bias is not None) is copies
    if copies:
        torch.testing.assert_close(F.silu(mixer.branch_bias), torch.ones_like(mixer.branch_bias))


@pytest.mark.parametrize("symbol", ["M", "A", "C"])
@pytest.mark.usefixtures("single_process_megatron")
def test_no_mode_outlives_an_exception(symbol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = build_mixer(symbol, replace(SMALL, attention=replace(SMALL.attention, segment=8)))
    memory, seen = mixer if symbol == "M" else mixer.memory, []

    def failing(*_: object) -> None:
        seen.append(memory.mode)
        raise ArithmeticError("lost")

    monkeypatch.setattr(memory, "mix", failing)
    with pytest.raises(ArithmeticError, match="lost"), in_mode(mixer, measure=True):
        with in_mode(memory, ablate=True):
            mixer(torch.randn(8, 1, 32), StreamContext())
    assert seen == [Mode(measure=True, ablate=True, keep_state=True)]
    assert {module.mode for module in mixer.modules() if isinstance(module, Mixer)} == {Mode()}


@pytest.mark.usefixtures("single_process_megatron")
def test_gates_start_where_the_config_says() -> None:
    memory = replace(SMALL.memory, alpha_start=0.97, theta_start=0.8, gamma_start=0.3, eta_start=0.05)
    mixer = build_mixer("M", replace(SMALL, memory=memory))
    mixer.mode = Mode(measure=True)
    mixer(torch.zeros(16, 1, 32))
    for name, start in (("alpha", 0.97), ("theta", 0.8), ("gamma", 0.3), ("eta", 0.05)):
        assert mixer.measurements[f"{name}_mean"].item() == pytest.approx(start, rel=1e-5)
        assert mixer.measurements[f"{name}_std"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("preset", ["atlas", "omeganet", "titans"])
@pytest.mark.usefixtures("single_process_megatron")
def test_a_write_gate_keeps_what_it_does_not_write(preset: str) -> None:
    memory = replace(SMALL.memory, **{**PRESETS[preset], "write_gate": True, "ns_step": "sum", "alpha_start": 0.97})
    memory = replace(memory, eta_start=0.05, ns_period=4 if memory.ns_steps else 1)
    mixer = build_mixer("M", replace(SMALL, memory=memory))
    mixer.mode = Mode(measure=True)
    mixer(torch.zeros(16, 1, 32))
    # It starts where a model without the gate does.
    assert mixer.measurements["alpha_mean"].item() == pytest.approx(0.97, rel=1e-5)
    step = "gamma_mean" if memory.step_in_momentum else "eta_mean"
    assert mixer.measurements[step].item() == pytest.approx(0.05, rel=1e-5)
    assert mixer.measurements["unwritten"] == 0
    with torch.no_grad():
        mixer.gate_bias[:, list(gate_widths(memory)).index("eta")] = -30.0
    mixer(torch.randn(16, 1, 32))
    assert mixer.measurements["unwritten"] == 1 and mixer.measurements["alpha_mean"] == 1
    assert torch.allclose(mixer.measurements["memory_norm"], mixer.measurements["start_norm"], rtol=1e-6)


@pytest.mark.usefixtures("single_process_megatron")
def test_retention_starts_by_the_writes_or_by_the_length_of_the_sequences() -> None:
    # SMALL's chunks are short.
    for preset, start in (("atlas", 0.9975**4), ("omeganet", 1 - 1 / 200)):
        memory = replace(SMALL.memory, **PRESETS[preset], alpha_start=0.0)
        mixer = build_mixer("M", replace(SMALL, memory=memory, model=replace(SMALL.model, seq_length=200)))
        mixer.mode = Mode(measure=True)
        mixer(torch.zeros(16, 1, 32))
        assert mixer.measurements["alpha_mean"].item() == pytest.approx(start, rel=1e-5)


@pytest.mark.usefixtures("single_process_megatron")
def test_measurements_agree_with_the_states_they_describe() -> None:
    mixer = build_mixer("M", SMALL)
    mixer(torch.randn(9, 2, 32))
    assert mixer.measurements == {}
    mixer.mode = Mode(measure=True)
    calls: list[tuple[tuple, Tensor, MemoryState]] = []

    def recorded(*args):
        calls.append((args, *omega_memory(*args[:4], mixer._start(), mixer.rule, state=args[5])))
        return calls[-1][1:]

    mixer._memory = recorded
    mixer(torch.randn(24, 2, 32))
    found = mixer.measurements
    lists = {name for name in found if name.endswith(("_histogram", "_spectrum"))}
    assert len(lists) == 6
    assert all(value.dtype == torch.float32 and value.dim() == 0 for n, value in found.items() if n not in lists)

    (_, k, v, gates, *_), _, final = calls[0]
    norms = [w.square().sum((-2, -1)).sqrt().mean() for w in final.weights]
    torch.testing.assert_close(found["memory_norm"], sum(norms) / len(norms))
    # Token by token: the loss of M_{t-1} at token t, and of M_t at the newest token that is surely written.
    raw = replace(mixer.rule, ns_steps=0, ns_period=1)
    state, before, after = None, [], []

    def loss(token: int) -> Tensor:
        """Of the memory as it stands, read without a write."""
        x, target = k[:, [token]], v[:, [token]]
        one, zero = torch.ones_like(gates.alpha[:, [token]]), torch.zeros_like(gates.alpha[:, [token]])
        hold = Gates(one, zero, one, torch.zeros_like(gates.gamma[:, [token]]))
        read, _ = omega_memory(x, x, target, hold, mixer._start(), raw, state)
        return (read - target).square().sum(-1).mean() / 2

    for t in range(24):
        if state is not None:
            before.append(loss(t))
        now = Gates(*(g[:, [t]] for g in vars(gates).values()))
        _, state = omega_memory(k[:, [t]], k[:, [t]], v[:, [t]], now, mixer._start(), mixer.rule, state)
        if t >= mixer.rule.ns_period - 1:
            after.append(loss(t - mixer.rule.ns_period + 1))
    torch.testing.assert_close(found["surprise_after"], torch.stack(after).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["surprise_before"], torch.stack(before).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("tokens", "window"), [(1, 4), (7, 16), (16, 16), (17, 16), (33, 5), (12, 1)])
def test_banded_attention_is_masked_attention(tokens: int, window: int) -> None:
    from atlas_kernels.attention import banded_attention

    torch.manual_seed(3)
    before = min(window - 1, 3)
    q = torch.randn(2, 3, tokens, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, before + tokens, 8, dtype=torch.float64).unbind(0)
    distance = torch.arange(before, before + tokens)[:, None] - torch.arange(before + tokens)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill((distance < 0) | (distance >= window), -math.inf)
    torch.testing.assert_close(banded_attention(q, k, v, window), scores.softmax(-1) @ v, rtol=1e-12, atol=1e-12)


def test_rotary_attention_depends_on_distance_alone_even_far_out() -> None:
    from atlas_kernels.attention import rotary, rotate

    torch.manual_seed(3)
    q, k = torch.randn(2, 1, 16)

    def score(start: int) -> Tensor:
        cos, sin = rotary(torch.arange(start, start + 8), 16, 10000.0)
        return (rotate(q, (cos[7:], sin[7:])) * rotate(k, (cos[:1], sin[:1]))).sum()

    for start in (5, 10_000_000, 2**40):
        torch.testing.assert_close(score(start), score(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["omeganet", "titans", "atlas", "atlas, write gate"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.usefixtures("single_process_megatron")
def test_the_kernels_make_the_same_layer(preset: str, packed: bool) -> None:
    """From convolution to output gate, in Triton (interpreted without a GPU) and in torch in float64: every gradient.

    In float32 torch itself is off by up to 2e-5: reads are small beside what they are normalised to."""
    preset, _, gate = preset.partition(", ")
    memory = replace(SMALL.memory, **{"preset": preset, **PRESETS[preset]})
    if gate:
        memory = replace(memory, write_gate=True, ns_step="sum")
    memory = replace(memory, heads=2, head_dim=16, window=5, chunk=16, ns_period=4 if memory.ns_steps else 1)
    x = torch.randn(21, 2, 32)
    documents = Documents(torch.stack([torch.arange(21) % 9, torch.arange(21)])) if packed else None
    found = []
    for impl, dtype in (("chunked", torch.float64), ("triton", torch.float32)):
        torch.manual_seed(3)
        mixer = build_mixer("M", replace(SMALL, memory=replace(memory, impl=impl))).to(dtype)
        leaf = x.to(mixer.gate_down).requires_grad_()
        y = mixer(leaf, packed_seq_params=documents)[0]
        y.square().mean().backward()
        found.append({"y": y, "x": leaf.grad, **{name: p.grad for name, p in mixer.named_parameters()}})
    for name, exact in found[0].items():
        apart = (found[1][name] - exact).norm() / exact.norm()
        assert apart < 1e-4, f"{name}: {apart:.1e}"
