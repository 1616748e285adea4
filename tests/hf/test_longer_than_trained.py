"""Texts of many times the length of training: gradients stay of the size they had, and what is left out is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atlas_megatron.config.presets import PRESETS
from atlas_megatron.hf import memory_atlas
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
from atlas_megatron.hf.names import names_of
from tests.support.hf_and_megatron import CALM, moved, settings, tokens, twins

TRAINED, TIMES = 128, 16


def fresh(preset: str, reach: int | None = None, pattern: str = "M-M-") -> AtlasForCausalLM:
    torch.manual_seed(0)
    memory = {"heads": 2, "head_dim": 16, "chunk": 32} | PRESETS[preset]
    sizes = {"hidden_size": 32, "ffn_hidden_size": 64, "vocab_size": 64, "seq_length": TRAINED}
    attention = {"heads": 2, "head_dim": 16, "window": 32, "segment": 64}
    config = AtlasConfig(pattern=pattern, memory=memory, attention=attention, gradient_reach=reach, **sizes)
    return AtlasForCausalLM(config).train()


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


@pytest.mark.parametrize("pattern", ["A-A-", "C-C-"])
def test_so_they_do_beside_attention_and_as_its_context(pattern: str) -> None:
    _, usual = learned(fresh("omeganet", pattern=pattern), TRAINED)
    _, norm = learned(fresh("omeganet", pattern=pattern), TIMES * TRAINED)
    _, exploded = learned(fresh("omeganet", 0, pattern), TIMES * TRAINED)
    assert norm < 100 * usual and not exploded < 100 * usual


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize("reach", [8, 16])
def test_a_reach_is_the_same_in_megatron(reach: int) -> None:
    config = settings("M-A-C-", **CALM)
    theirs, ours = twins(replace(config, train=replace(config.train, gradient_reach=reach)))
    assert ours.config.gradient_reach == reach
    read = tokens()
    places = torch.arange(read.shape[1]).expand_as(read)
    labels = torch.cat([read[:, 1:], read[:, :1]], 1)
    kept = theirs.train()(read, places, None, labels=labels)[:, :-1]
    loss = ours.train()(read, labels=read).loss
    torch.testing.assert_close(kept.mean(), loss.to(kept.dtype), rtol=1e-5, atol=0)
    kept.mean().backward()
    loss.backward()
    found, free = dict(ours.named_parameters()), moved(config).train()
    free.load_state_dict(ours.state_dict())
    for layer in free.modules():
        if hasattr(layer, "gradient_reach"):
            layer.gradient_reach = 0
    free(read, labels=read).loss.backward()
    whole = dict(free.named_parameters())
    apart = 0.0
    for name, parameter in theirs.named_parameters():
        hf = next(each.hf for each in names_of(ours.config) if each.megatron == name)
        torch.testing.assert_close(found[hf].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=hf)
        apart = max(apart, float((whole[hf].grad - parameter.grad).abs().max()))
    assert apart > 1e-3


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
    for bad in (-8, 1.5, "far", True):
        with pytest.raises(ValueError, match="gradient_reach=.* is no number of tokens"):
            fresh("omeganet", reach=bad)  # type: ignore[arg-type]
    model = fresh("dot")
    assert model.model.layers[0].mixer.gradient_reach == 0
