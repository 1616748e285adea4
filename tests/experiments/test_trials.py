"""What the recipe search tries runs in a layer of today; the writers' base is the memory's own, and each changes it."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from atlas_kernels import MemoryRule, layer_start, memories, op
from atlas_kernels.chunked import Kernels
from atlas_megatron.config import Config, MemoryConfig, ModelConfig
from atlas_megatron.mixers import memory as mixer
from experiments.shared import trials
from tests.support.problems import assert_close, gradients, problem
from tests.support.single_mixer import build_mixer

RULE = MemoryRule(window=3, chunk=8, ns_period=2)
CONFIG = Config(
    model=ModelConfig(pattern="M", hidden_size=32, ffn_hidden_size=48, vocab_size=64, seq_length=32),
    memory=MemoryConfig(heads=4, head_dim=8, expansion=2, chunk=8, window=4, ns_period=2, gate_rank=4, ns_step="sum"),
)


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a trial changes in this process is as it was after each test."""
    for owner, name in (
        (op, "TORCH"), (memories.Mlp, "output"), (mixer, "convolved"), (mixer.AtlasMixer, "build"),
        (layer_start, "second_gain"), (layer_start, "W1_GAIN"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, getattr(owner, name))


def found() -> dict[str, Tensor]:
    """Outputs and gradients of the chunked memory as this process computes it."""
    given = problem(RULE, 16, residual=True)
    y, state = given.run("chunked")
    outputs = [y, *state.weights, *state.momentum]
    return {f"output {n}": t for n, t in enumerate(outputs)} | gradients(outputs, given.leaves())


def test_their_base_is_the_memorys_own() -> None:
    expected = found()
    op.TORCH = Kernels(orthogonal=trials.Trial)
    assert_close(found(), expected)


def stepped() -> tuple[Tensor, list[Tensor]]:
    """What a layer of CONFIG gives for random tokens, and gradients of its weights; the same at each call."""
    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7)
    layer = build_mixer("M", CONFIG)
    out = layer(torch.randn(32, 2, 32))
    y = out[0] if isinstance(out, tuple) else out
    y.square().sum().backward()
    return y.detach(), [p.grad for p in layer.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", [*trials.WRITERS, *trials.PATCHES])
def test_each_runs_in_a_layer_and_changes_it(single_process_megatron: None, name: str) -> None:
    before, _ = stepped()
    assert torch.equal(stepped()[0], before)
    trials.install(name)
    after, gradients_of_weights = stepped()
    assert gradients_of_weights and all(torch.isfinite(value).all() for value in (after, *gradients_of_weights))
    assert (after - before).abs().max() > 1e-6
