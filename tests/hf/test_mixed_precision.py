"""Autocast, as transformers' Trainer and accelerate use it: linears in bfloat16, the inner loop as without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from atlas_kernels import chunked
from atlas_megatron.config import Config
from atlas_megatron.config.presets import PRESETS
from tests.support.hf_and_megatron import CALM, moved, settings, tokens

LAYERS = {pattern: settings(pattern, **CALM) for pattern in ("M-", "*-F-", "A-", "C-", "R-L-", "D-G-")}
LAYERS |= {preset: settings("M-", preset=preset) for preset in PRESETS}
LAYERS |= {f"{preset} in A and C": settings("A-C-", preset=preset) for preset in ("titans", "delta", "swdt")}
LAYERS |= {
    "taylor": settings("M-", feature_map="taylor"),
    "sketch": settings("M-", feature_map="sketch", sketch_width=24, degree=3),
    "write gate": settings("M-", write_gate=True, ns_step="sum"),
}


@pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS)
def test_the_loss_and_its_gradients_stay_near(config: Config) -> None:
    model, read = moved(config, torch.float32).train(), tokens(2, 20)
    expected = model(read, labels=read).loss
    expected.backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    # Many a training loop has its backward in the block too.
    for dtype, inside in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)):
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = model(read, labels=read).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert loss.item() == pytest.approx(expected.item(), rel=0.02)
        assert float((found - wanted).norm() / wanted.norm()) < 0.2


@pytest.mark.parametrize("preset", ["titans", "atlas", "dot"])
def test_so_where_the_backward_reads_again(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded rows, whose inner loop is recomputed, in checkpointed layers."""
    monkeypatch.setattr(chunked, "HELD_BYTES", 0)
    monkeypatch.setattr(chunked, "SEGMENT_BYTES", 0)
    model, read = moved(settings("M-", preset=preset), torch.float32).train(), tokens(2, 20)
    model.gradient_checkpointing_enable()
    mask = torch.ones_like(read)
    mask[1, :6] = 0
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            model(read, attention_mask=mask, labels=read.masked_fill(mask == 0, -100)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.2


@torch.no_grad()
def test_padding_and_caches_under_autocast() -> None:
    model, read = moved(settings("M-*-A-R-L-D-G-F-", **CALM), torch.float32), tokens(2, 20)
    mask = torch.ones_like(read)
    mask[1, :6] = 0
    expected = model(read, attention_mask=mask).logits[:, 6:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = model(read[:, :13], attention_mask=mask[:, :13])
        last = model(read[:, 13:], past_key_values=first.past_key_values)
        continued = model.generate(read, attention_mask=mask, max_new_tokens=2, do_sample=False)
    found = torch.cat([first.logits, last.logits], 1)[:, 6:].float()
    assert float((found - expected).norm() / expected.norm()) < 0.05
    assert continued.shape == (2, 22)
    # What is remembered is as wide as without autocast.
    memory = first.past_key_values.states[0].memory
    assert {t.dtype for t in memory.tensors()} == {torch.float32}


def test_trainer_in_bfloat16_resumes(tmp_path: Path) -> None:
    """And the run that stopped is the run that did not."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in tokens(8, 16)]

    def trained(folder: str, resume: bool = False, **options: int) -> dict[str, torch.Tensor]:
        model = moved(settings("M-*-", **CALM), torch.float32)
        arguments = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            max_steps=4,
            save_steps=2,
            bf16=True,
            use_cpu=True,
            report_to=[],
            **options,
        )
        Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in model.state_dict().items()}

    whole = trained("run")
    last = tmp_path / "run" / "checkpoint-4"
    assert last.is_dir()
    last.rename(tmp_path / "last")
    resumed = trained("run", resume=True)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, msg=name)
