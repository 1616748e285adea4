"""LoRA by PEFT and supervised fine-tuning by TRL, where these are installed; this project depends on neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_megatron.data.tokenizer import train_tokenizer
from tests.support.hf_and_megatron import CALM, moved, settings, tokens

PATTERNS = ("M-*-", "A-", "C-", "D-G-", "R-", "F-")
TEXT = "one token after another while the memory of a small model reads and writes what it learns "


@pytest.mark.parametrize("pattern", PATTERNS)
def test_lora_is_trained_saved_loaded_and_merged(pattern: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    config, read = settings(pattern, **CALM), tokens()
    wanted = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    model = peft.get_peft_model(moved(config, torch.float32), wanted)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=read, labels=read).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(moved(config, torch.float32), tmp_path).eval()
    with torch.no_grad():
        expected = model(read).logits
        assert torch.equal(again(read).logits, expected)
        torch.testing.assert_close(again.merge_and_unload()(read).logits, expected, rtol=1e-4, atol=1e-4)


def test_prompt_tuning_and_what_needs_another_cache() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    read = tokens(2, 9)
    given = {"input_ids": read, "attention_mask": torch.ones_like(read)}
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(moved(settings("M-*-", **CALM), torch.float32), config)
    model(**given, labels=read).loss.backward()
    assert model.generate(**given, max_new_tokens=3, do_sample=False).shape == (2, 12)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(moved(settings("M-*-", **CALM), torch.float32), config)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache, and this model's state is a memory"):
        model(**given)


@pytest.mark.parametrize("packing", [False, True])
def test_supervised_fine_tuning(packing: bool, tmp_path: Path) -> None:
    trl: Any = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    from atlas_megatron.hf.tokenizer_files import export_tokenizer

    train_tokenizer([TEXT * 20], 280, tmp_path / "tokenizer")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
    (tmp_path / "tokenizer/chat_template.jinja").write_text(template)
    export_tokenizer(tmp_path / "tokenizer", tmp_path, 280)
    model = moved(settings("M-*-", **CALM), torch.float32)
    model.resize_token_embeddings(280)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chats = [
        {"messages": [{"role": "user", "content": "the memory"}, {"role": "assistant", "content": TEXT * (1 + n % 2)}]}
        for n in range(8)
    ]
    texts = [{"text": TEXT * (1 + n % 2)} for n in range(8)]
    options = trl.SFTConfig(
        str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=True,
        report_to=[],
        packing=packing,
        max_length=64,
    )
    trainer = trl.SFTTrainer(
        model,
        args=options,
        train_dataset=Dataset.from_list(texts if packing else chats),
        processing_class=AutoTokenizer.from_pretrained(tmp_path),
    )
    assert 4 < trainer.train().training_loss < 7
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)
