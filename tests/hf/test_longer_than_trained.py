"""Texts of many times the length of training: gradients stay of the size they had, and what is left out is said."""

from __future__ import annotations

import pytest
import torch

from atlas_megatron.hf import memory_atlas
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
from atlas_megatron.presets import PRESETS

TRAINED, TIMES = 128, 16


def fresh(preset: str, reach: int | None = None) -> AtlasForCausalLM:
    torch.manual_seed(0)
    memory = {"heads": 2, "head_dim": 16, "chunk": 32} | PRESETS[preset]
    sizes = {"hidden_size": 32, "ffn_hidden_size": 64, "vocab_size": 64, "seq_length": TRAINED}
    return AtlasForCausalLM(AtlasConfig(pattern="M-M-", memory=memory, gradient_reach=reach, **sizes)).train()


def learned(model: AtlasForCausalLM, length: int) -> tuple[float, float]:
    """Loss and norm of the gradient on so many tokens."""
    read = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(1))
    loss = model(read, labels=read).loss
    loss.backward()
    return loss.item(), float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e30))


@pytest.mark.parametrize("preset", ["titans", "omeganet"])
def test_gradients_at_sixteen_times_stay_of_the_size_of_training(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(memory_atlas.logger, "warning_once", said.append)
    _, usual = learned(fresh(preset), TRAINED)
    assert not said
    loss, norm = learned(fresh(preset), TIMES * TRAINED)
    assert norm < 100 * usual
    assert said[0].startswith("2048 tokens are read at once, more than the 128 of training: gradients go back over 32")
    whole, exploded = learned(fresh(preset, reach=0), TIMES * TRAINED)
    # What is read is the same; gradients over all of it are another matter.
    assert loss == pytest.approx(whole, rel=1e-5) and not exploded < 100 * usual


def test_within_the_length_of_training_nothing_is_left_out() -> None:
    gradients = []
    for reach in (None, 0):
        model = fresh("omeganet", reach)
        learned(model, TRAINED)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_how_far_gradients_go_back() -> None:
    reach = lambda **keys: fresh("omeganet", **keys).model.layers[0].mixer.gradient_reach  # noqa: E731
    assert reach() == 32 and reach(reach=64) == 64 and reach(reach=0) == 0
    model = fresh("dot")
    assert model.model.layers[0].mixer.gradient_reach == 0
