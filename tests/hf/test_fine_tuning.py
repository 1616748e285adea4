"""The Hugging Face model trains: its start, its loss, gradient checkpointing, transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from atlas_megatron.hf.export import described
from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
from tests.support.hf_and_megatron import CALM, moved, settings, tokens

EVERY = settings("M-*-F-A-C-R-L-D-G-", **CALM)


def test_the_loss_is_of_the_next_token() -> None:
    model, read = moved(EVERY), tokens(3, 16)
    labels = read.clone()
    labels[0, :7], labels[2, 5] = -100, -100
    found = model(read, labels=labels)
    logits = found.logits[:, :-1].flatten(0, 1).float()
    expected = F.cross_entropy(logits, labels[:, 1:].flatten())
    torch.testing.assert_close(found.loss, expected)
    # As Trainer asks under gradient accumulation: a sum over the tokens of all micro-batches.
    counted = model(read, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    kept = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(counted * 100, expected * kept)
    assert model(read, labels=labels, return_dict=False)[0] == found.loss
    assert model(read, logits_to_keep=1).logits.shape == (3, 1, 64)
    hidden = model(read, output_hidden_states=True).hidden_states
    assert len(hidden) == len(EVERY.model.pattern) + 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model, read = moved(EVERY).train(), tokens(2, 21)
    model(read, labels=read).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    found = model(read, labels=read, use_cache=True)
    assert found.past_key_values is None
    found.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("single_process_megatron")
def test_it_starts_where_megatrons_starts() -> None:
    """Means and sizes of a fresh model's parameters, of every kind."""
    from atlas_megatron.model.build import build_model

    config = settings("M-*-A-C-R-L-D-G-", tied=False, preset="atlas++", heads=16, head_dim=16)
    theirs = dict(build_model(config).named_parameters())
    torch.manual_seed(0)
    ours = dict(AtlasForCausalLM(described(config)).named_parameters())
    from atlas_megatron.hf.names import parameters_of

    for name, _ in parameters_of(described(config)):
        mine, other = ours[name.hf].float(), theirs[name.megatron].float()
        size = float(other.square().mean().sqrt())
        spread = 5 * size * mine.numel() ** -0.5
        assert float(mine.square().mean().sqrt()) == pytest.approx(size, rel=0.1, abs=spread), name.hf
        assert float(mine.mean()) == pytest.approx(float(other.mean()), abs=2 * spread), name.hf


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    model = moved(EVERY, torch.float32)
    model.save_pretrained(tmp_path)
    again, loaded = AtlasForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_step_of_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    model, read = moved(settings("M-*-", **CALM), torch.float32), tokens(4, 16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = [{"input_ids": row, "labels": row} for row in read]
    options = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model, options, train_dataset=data, eval_dataset=data)
    expected = float(model.eval()(read, labels=read).loss)
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-4)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert trainer.evaluate()["eval_loss"] < expected
