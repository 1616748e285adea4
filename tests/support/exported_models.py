"""A small exported model with a tokenizer, and data for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from atlas_megatron.config import Config
from atlas_megatron.data.tokenizer import train_tokenizer
from atlas_megatron.hf import export
from tests.support import hf_checkpoints as checkpoints
from tests.support.hf_and_megatron import CALM, settings

VOCABULARY = 272
LINES = [f"{n} sheep and {n + 1} goats went over the hill number {n * n}; nobody counted them.\n" for n in range(90)]


def sized(config: Config) -> Config:
    """The model with the vocabulary of the tokenizer here."""
    return replace(config, model=replace(config.model, vocab_size=VOCABULARY))


def exported(folder: Path, pattern: str = "M-*-", dtype: torch.dtype = torch.float32, **memory: Any) -> Path:
    """An exported folder, whole, in `folder`/model."""
    with checkpoints.one_process():
        source = checkpoints.save(sized(settings(pattern, **CALM, **memory)), folder / "checkpoint", dtype=dtype)
    train_tokenizer(["".join(LINES)], VOCABULARY, source)
    return export.export(source, folder / "model")


def text(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text("".join(LINES), encoding="utf-8")
    return file


def answers(folder: Path, count: int = 12) -> Path:
    """Prompts of several lengths, each with a short answer."""
    file = folder / "answers.jsonl"
    records = [
        {"input": "".join(LINES[n : n + 1 + n % 3]), "question": f"How many sheep, {n}?", "target": f"{n} sheep"}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file
