"""MAG and MAC: what they compute, persistent tokens, what they cost."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from atlas_megatron.config.presets import PRESETS
from atlas_megatron.mixers.base import Mode
from atlas_megatron.mixers.stream import StreamContext
from atlas_megatron.train import main
from tests.support import tiny_run
from tests.support.single_mixer import build_mixer
from tests.support.small_model import SMALL

ATTENTION = replace(SMALL.attention, persistent=3, segment=8)
CONFIG = replace(SMALL, attention=ATTENTION)
MEMORIES = {
    "atlas": SMALL.memory,
    "taylor": replace(SMALL.memory, feature_map="taylor", head_dim=4),
    "exponential": replace(SMALL.memory, **PRESETS["dot"]),
    "delta": replace(SMALL.memory, **PRESETS["delta"]),
}


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("symbol", ["A", "C"])
@pytest.mark.usefixtures("single_process_megatron")
def test_every_parameter_learns(symbol: str, memory: object) -> None:
    mixer = build_mixer(symbol, replace(CONFIG, memory=memory))
    mixer(torch.randn(20, 2, 32))[0].square().mean().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.usefixtures("single_process_megatron")
def test_mag_is_its_two_branches_joined() -> None:
    mixer = build_mixer("A", CONFIG)
    x = torch.randn(20, 2, 32)
    with torch.no_grad():
        mixer.memory_gain.uniform_(0.5, 1.5)
        memory, attention = mixer.memory(x)[0], mixer.attention(x)[0]
        gate = F.silu(F.rms_norm(memory, (32,), eps=1e-5) * mixer.memory_gain)
        torch.testing.assert_close(mixer(x)[0], F.rms_norm(attention, (32,), eps=1e-5) * gate)


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.usefixtures("single_process_megatron")
def test_mac_written_out(memory: object) -> None:
    """Segment by segment, one query at a time, with the memory's own stream for its writes."""
    mixer = build_mixer("C", replace(CONFIG, memory=memory)).double()
    mixer.config.params_dtype = torch.float64
    attention, memory_ = mixer.attention, mixer.memory
    x, context, outputs = torch.randn(19, 1, 32, dtype=torch.float64), StreamContext(), []
    with torch.no_grad():
        for start in range(0, 19, 8):
            segment, state = x[start : start + 8], context.states.get(1)
            asked = mixer.linear_query(segment)[0].transpose(0, 1).unflatten(-1, mixer.read_gain.shape)
            read = F.rms_norm(memory_.read(asked, state), (asked.shape[-1],), eps=1e-5) * mixer.read_gain
            answer = mixer.linear_read(read.flatten(2).transpose(0, 1))[0]
            rows = []
            for t in range(len(segment)):
                both = torch.cat([segment[: t + 1], answer[: t + 1]])
                plain, k, v = attention.heads_of(both)
                places = torch.arange(t + 1, dtype=torch.float64).repeat(2) + start
                angle = places[:, None] * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
                q, k = (turn(y, angle) for y in (plain, k))
                keys, values = attention.persistent.unbind(1)  # learned: seen from everywhere alike
                scores = torch.cat([plain[:, :, [t]] @ keys.mT, q[:, :, [t]] @ k.mT], -1)
                rows.append(attention.projected((scores / math.sqrt(8)).softmax(-1) @ torch.cat([values[None], v], 2)))
            y = torch.cat(rows)
            outputs.append(mixer.join(y, memory_(y, context)[0]))
        torch.testing.assert_close(mixer(x)[0], torch.cat(outputs), rtol=1e-6, atol=1e-6)  # rotary angles are float32


def turn(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


@pytest.mark.parametrize("symbol", ["A", "C"])
@pytest.mark.usefixtures("single_process_megatron")
def test_gradients_flow_over_any_cut(symbol: str) -> None:
    mixer = build_mixer(symbol, CONFIG).double()
    mixer.config.params_dtype = torch.float64
    x, found = torch.randn(21, 2, 32, dtype=torch.float64), []
    for cuts in ([21], [3, 5, 1, 12]):
        context = StreamContext()
        mixer.zero_grad()
        torch.cat([mixer(piece, context)[0] for piece in x.split(cuts)]).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in mixer.named_parameters()})
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("symbol", ["*", "F"])
@pytest.mark.usefixtures("single_process_megatron")
def test_persistent_tokens_are_seen_from_everywhere_alike(symbol: str) -> None:
    mixer = build_mixer(symbol, CONFIG)
    x = torch.randn(20, 1, 32)
    with torch.no_grad():
        before = mixer(x)[0]
        mixer.persistent[:, 1] += 1.0
        assert ((mixer(x)[0] - before).abs().amax((1, 2)) > 1e-4).all()
        mixer.persistent[:, 0] *= 100.0  # nothing but them is seen
        same = mixer(x[:1].expand(20, -1, -1))[0]
        torch.testing.assert_close(same, same[:1].expand(20, -1, -1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("symbol", ["A", "C", "*", "F"])
@pytest.mark.usefixtures("single_process_megatron")
def test_costs_match_the_built_model(symbol: str) -> None:
    from atlas_megatron.model.build import build_model, flops_per_token, num_params

    config = replace(CONFIG, model=replace(CONFIG.model, pattern=f"{symbol}-"))
    model = build_model(config)
    assert num_params(config) == sum(p.numel() for p in model.parameters())
    if symbol == "C":
        tokens = torch.zeros(1, 32, dtype=torch.int64)
        counted = {torch.ops.aten.baddbmm_: lambda c, a, b, **rest: 2 * a[0] * a[1] * a[2] * b[2]}
        with FlopCounterMode(display=False, custom_mapping=counted) as counter, torch.no_grad():
            model(tokens, None, None)
        # What is computed: all keys of a segment, with the persistent ones' own half of the scores; what is seen: half.
        computed, seen = 32 * 4 * (2 * 16 + 2 * 8) * (2 * 8 + 3), 32 * 4 * 4 * 8 * (8 + 1 + 3)
        expected = counter.get_total_flops() - computed + seen
        assert flops_per_token(config).forward * 32 == pytest.approx(expected, rel=0.01)


@pytest.mark.usefixtures("single_process_megatron")
def test_memory_share_sees_a_collapsed_branch() -> None:
    mixer = build_mixer("A", CONFIG)
    mixer.mode = Mode(measure=True)
    x = torch.randn(20, 2, 32)
    with torch.no_grad():
        mixer(x)
        assert 0.1 < mixer.measurements["memory_share"] < 0.9
        mixer.join(torch.randn(20, 2, 32), torch.ones(20, 2, 32))
        assert mixer.measurements["memory_share"] < 1e-6


@pytest.mark.parametrize("symbol", ["A", "C"])
def test_it_trains(symbol: str, tmp_path: Path) -> None:
    path = tiny_run.write(tmp_path, f"{symbol}-")
    words = ["train.steps=30", "train.lr=1e-2", "train.validate_every=0", "checkpoint.every=30"]
    assert main([str(path), "attention.segment=16", "attention.persistent=2", *words]) == 0
    found = tiny_run.losses(tmp_path / "run")
    assert found[-1] < found[0] - 0.3
