"""What the experiments train: the state they count is the state carried; only the asked positions count."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atlas_megatron.evaluate.synthetic import NO_ANSWER, Task, compression, mqar
from atlas_megatron.mixers.stream import StreamContext
from atlas_megatron.parallel.device import device
from experiments.shared import training
from experiments.shared.training import Asked

TOKENS, VOCABULARY = 32, 64
TASK = Task(lambda seed, count: mqar(seed, count, TOKENS, 4, VOCABULARY), VOCABULARY, TOKENS)


def carried(state: Any, momentum: bool) -> int:
    """Numbers of one sequence that a layer's state holds in matrices, or in keys and values."""
    memory = getattr(state, "memory", state)
    if hasattr(memory, "weights"):
        return sum(m.numel() for m in (*memory.weights, *(memory.momentum if momentum else ())))
    return memory.keys.numel() + memory.values.numel()


@pytest.mark.parametrize("mixer", training.SYMBOLS)
@pytest.mark.usefixtures("single_process_megatron")
def test_the_counted_state_is_what_the_layers_carry(mixer: str) -> None:
    config = training.config_of(mixer, 8, TOKENS, VOCABULARY, mlp=False)
    context = StreamContext()
    with torch.no_grad():
        tokens = torch.zeros(1, TOKENS, dtype=torch.long, device=device())
        Asked(config, TASK).model(tokens, None, None, inference_context=context)  # no labels asked: every position
    momentum = "M" in config.model.pattern and config.memory.momentum
    found = sum(carried(state, momentum) for state in context.states.values())
    assert found == training.state_floats(config)


@pytest.mark.usefixtures("single_process_megatron")
def test_logits_are_those_of_the_asked_positions() -> None:
    asked = Asked(training.config_of("attention", 0, TOKENS, VOCABULARY, mlp=True), TASK)
    batch = training.on_device(TASK.generate(0, 3))
    with torch.no_grad():
        logits, labels = asked(batch)
        asked.asked = None
        everywhere = asked.model(batch.tokens, None, None)
    places = (batch.labels.T != NO_ANSWER).nonzero()
    torch.testing.assert_close(logits, everywhere[places[:, 1], places[:, 0]])
    assert torch.equal(labels, batch.labels[places[:, 1], places[:, 0]])


@pytest.mark.usefixtures("single_process_megatron")
def test_compression_is_read_from_the_last_output_alone() -> None:
    task = Task(lambda seed, count: compression(seed, count, 16), 17, 16, decoded=True)
    asked = Asked(training.config_of("sliding window", 4, 16, 17, mlp=False), task)
    seen: list[torch.Tensor] = []
    asked.model.decoder.register_forward_hook(lambda module, given, out: (seen.append(out), out.retain_grad())[0])
    logits, labels = asked(training.on_device(task.generate(0, 2)))
    assert logits.shape == (2 * 15, 17) and labels.shape == (2 * 15,)
    logits.sum().backward()
    gradient = seen[0].grad
    assert gradient is not None
    assert gradient[:-1].abs().max() == 0 and gradient[-1].abs().max() > 0


def test_a_suffix_changes_keys_of_the_mixers_section() -> None:
    names = {"atlas": 1.0, "atlas, damped": 0.3, "atlas, first order": 0.0}
    for name, share in names.items():
        config = training.config_of(name, 8, TOKENS, VOCABULARY, mlp=False)
        assert (config.memory.preset, config.memory.anchor_gradient) == ("atlas", share)
        assert config.memory.ns_period == training.NS_PERIOD and config.memory.open_gate
    rare = training.config_of("atlas, a write every 8", 8, TOKENS, VOCABULARY, mlp=False)
    assert rare.memory.ns_period == 8
    drawn = training.config_of("titans, starts as drawn", 8, TOKENS, VOCABULARY, mlp=False)
    assert not (drawn.memory.late_keys or drawn.memory.open_gate or drawn.memory.copy_start)
    ours = training.config_of("gated delta, our starts", 8, TOKENS, VOCABULARY, mlp=False)
    assert ours.delta.late_keys and ours.delta.open_gate and ours.delta.copy_start


def test_an_unknown_mixer_is_refused() -> None:
    with pytest.raises(ValueError, match="mixer='mamba' is unknown; choose one of atlas"):
        training.config_of("mamba", 8, TOKENS, VOCABULARY, mlp=False)
