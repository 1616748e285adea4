"""Packed documents: a sequence of several gives what each gives alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atlas_kernels import packing
from atlas_megatron.config import load
from atlas_megatron.config.checks import validate
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.data.batches import Batches, build_datasets
from atlas_megatron.data.sliding_windows import SlidingWindows
from atlas_megatron.data.tokenizer import load_tokenizer
from atlas_megatron.mixers.base import Documents
from atlas_megatron.mixers.stream import StreamContext
from atlas_megatron.train import main
from tests.support import tiny_run
from tests.support.small_model import SMALL

LENGTHS = [[5, 1, 20, 9], [17, 18]]
LOCALS = {"locals": ("4/8", "2/4", "4/8"), "projection": True, "read": "chunk"}
PATTERNS = {
    "M-*-A-F-": SMALL.memory,
    "M- locals": replace(SMALL.memory, **LOCALS),
    "M- shards": replace(SMALL.memory, shard=8),
    "M- titans, shards and locals": replace(SMALL.memory, **PRESETS["titans"], shard=8, locals=("2/8",)),
    **{
        f"M- {name}": replace(SMALL.memory, **PRESETS[name])
        for name in ("atlas++", "omeganet", "titans", "delta", "swla")
    },
}


def positions_of(lengths: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


def build(pattern: str, memory: object) -> torch.nn.Module:
    from atlas_megatron.model.build import build_model

    attention = replace(SMALL.attention, persistent=2)
    model = replace(SMALL.model, pattern=pattern)
    built = build_model(replace(SMALL, model=model, memory=memory, attention=attention)).double()
    built.config.params_dtype = torch.float64
    return built


@pytest.mark.usefixtures("single_process_megatron")
def test_the_host_reads_a_batchs_positions_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at every layer, where a GPU would wait for it."""
    made = []
    monkeypatch.setattr(packing, "_pack", lambda *given, make=packing._pack: made.append(1) or make(*given))
    model = build("M-M-", SMALL.memory)
    tokens = torch.zeros(2, 35, dtype=torch.int64)
    model(tokens, None, None, packed_seq_params=Documents(positions_of(LENGTHS))).sum().backward()
    assert len(made) == 1


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.usefixtures("single_process_megatron")
def test_packed_documents_are_separate_sequences(name: str) -> None:
    model = build(name.split()[0], PATTERNS[name])
    tokens = torch.randint(64, (2, 35), generator=torch.Generator().manual_seed(3))
    gradients = []
    packed = model(tokens, None, None, packed_seq_params=Documents(positions_of(LENGTHS)))
    packed.square().mean().backward()
    gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    model.zero_grad()
    rows = []
    for row, lengths in zip(tokens, LENGTHS, strict=True):
        rows.append(torch.cat([model(document[None], None, None) for document in row.split(lengths)], 1))
    alone = torch.cat(rows)
    alone.square().mean().backward()
    gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    # Rotary angles are float32 and differ in their absolute position.
    tolerance = 1e-5 if "*" in name else 1e-9
    torch.testing.assert_close(packed, alone, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=100 * tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["M-*-A-F-", "M- locals", "M- titans, shards and locals"])
@pytest.mark.usefixtures("single_process_megatron")
def test_packed_documents_over_a_cut(name: str) -> None:
    model = build(name.split()[0], PATTERNS[name])
    tokens = torch.randint(64, (2, 35), generator=torch.Generator().manual_seed(3))
    positions = positions_of(LENGTHS)
    with torch.no_grad():
        whole = model(tokens, None, None, packed_seq_params=Documents(positions))
        context, pieces = StreamContext(), []
        for part in torch.arange(35).split([4, 9, 1, 21]):
            documents = Documents(positions[:, part])
            pieces.append(model(tokens[:, part], None, None, inference_context=context, packed_seq_params=documents))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


def test_positions_come_with_the_data_and_with_sliding_windows(tmp_path: Path) -> None:
    config = load(tiny_run.write(tmp_path), ["data.packed=true"])
    train, _ = build_datasets(config, 8, 0)
    batch = next(Batches(train, config))
    end = load_tokenizer(config.data.tokenizer).eod
    starts = (batch["position_ids"] == 0).nonzero().tolist()
    assert len(starts) > len(batch["tokens"])
    assert all(t == 0 or batch["tokens"][b, t - 1] == end for b, t in starts)
    assert (batch["tokens"][:, :-1] == end).sum() == sum(t > 0 for _, t in starts)
    window = SlidingWindows(config, 20)[0]
    assert window["position_ids"].tolist() == [*range(tiny_run.LENGTH), *range(32 - tiny_run.LENGTH)]


@pytest.mark.slow
def test_it_trains_on_packed_documents(tmp_path: Path) -> None:
    path = tiny_run.write(tmp_path, "M-A-")
    assert main([str(path), "data.packed=true", "train.steps=40", "train.lr=1e-2", "checkpoint.every=40"]) == 0
    found = tiny_run.losses(tmp_path / "run")
    assert found[-1] < found[0] - 0.5


@pytest.mark.parametrize(("words", "text"), [(["model.pattern=C-"], "C"), (["memory.preset=dot"], "exponential")])
def test_what_cannot_be_packed_is_refused(words: list[str], text: str, tmp_path: Path) -> None:
    config = load(tiny_run.write(tmp_path), ["data.packed=true", *words])
    with pytest.raises(ValueError, match=f"data.packed=true.*{text}"):
        validate(config, 1)
