"""A run goes on with the tokenizer and the data that it was trained with, or says that they are others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from atlas_megatron.checkpoint.checkpoint import folder_of
from atlas_megatron.checkpoint.provenance import Provenance, own_tokenizer, refusal
from atlas_megatron.config import Config, load
from atlas_megatron.data.batches import build_datasets
from atlas_megatron.data.corpus import SplitSummary, Summary
from atlas_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from atlas_megatron.train import main
from atlas_megatron.training import metrics
from tests.support import tiny_run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny_run.write(tmp_path)
    return tmp_path


def with_data(config: Config, **changed: object) -> Config:
    return replace(config, data=replace(config.data, **changed))


def other_text(prefix: Path) -> None:
    """Other tokens under the same name, as a second preparation leaves them."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tiny_run.VOCABULARY))
    for number in range(48):
        builder.add_document(numpy.full(tiny_run.LENGTH, number), [tiny_run.LENGTH])
    builder.finalize(f"{prefix}.idx")


def other_tokenizer(folder: Path) -> None:
    train_tokenizer(["an altogether different corpus of other words " * 40], tiny_run.VOCABULARY, folder)


def test_what_changed_is_told(root: Path, tmp_path: Path) -> None:
    config = load(root / "tiny.toml")
    kept = tmp_path / "kept"
    kept.mkdir()
    Provenance.of(config).write(kept)
    assert Provenance.of(config).changes_since(kept) == []
    assert own_tokenizer(kept).fingerprint == load_tokenizer(config.data.tokenizer).fingerprint
    # Elsewhere, the same data are the same.
    for name in ("train.bin", "train.idx"):
        shutil.copyfile(root / name, tmp_path / f"moved {name}")
    moved = with_data(config, train=(f"{tmp_path}/moved train",))
    assert Provenance.of(moved).changes_since(kept) == []
    halves = with_data(config, train=(f"0.5 {root}/train", f"0.5 {root}/validation"))
    assert Provenance.of(halves).changes_since(kept) == ["data"]
    other_text(root / "train")
    other_tokenizer(root / "tokenizer")
    changes = Provenance.of(config).changes_since(kept)
    assert changes == ["tokenizer", "data"]
    said = refusal(kept, config, changes)
    assert f"{kept} was trained with another tokenizer than data.tokenizer={root}/tokenizer" in said
    assert f"on other data than data.train=['{root}/train']" in said and "data.allow_change=true" in said
    # A checkpoint from before the data were noted still tells its tokenizer.
    (kept / "data.json").unlink()
    assert Provenance.of(config).changes_since(kept) == ["tokenizer"]
    (kept / "data.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"data.json is broken .*; bring it back"):
        Provenance.of(config).changes_since(kept)


def test_data_made_with_another_tokenizer_are_refused(root: Path) -> None:
    config = load(root / "tiny.toml")
    mine = load_tokenizer(root / "tokenizer")
    split = {"train": SplitSummary(1, 1, 1)}
    Summary("mark", str(root / "tokenizer"), mine.vocab_size, split, mine.fingerprint).write(root)
    build_datasets(config, 4, 0)
    other_tokenizer(root / "other")
    wrong = with_data(config, tokenizer=f"{root}/other")
    with pytest.raises(ValueError, match=r"train was made with another tokenizer .*set data.tokenizer to that one"):
        build_datasets(wrong, 4, 0)
    build_datasets(with_data(wrong, allow_change=True), 4, 0)
    # A summary from before fingerprints names a folder: it is read, and where it is gone its size tells.
    said = json.loads((root / "data.json").read_text())
    (root / "data.json").write_text(json.dumps(said | {"tokenizer_fingerprint": ""}))
    build_datasets(config, 4, 0)
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        build_datasets(wrong, 4, 0)
    (root / "data.json").write_text(
        json.dumps(said | {"tokenizer_fingerprint": "", "tokenizer": "gone", "vocab_size": 9})
    )
    with pytest.raises(ValueError, match="was made with another tokenizer .gone, 9 tokens"):
        build_datasets(config, 4, 0)


def test_a_resume_on_other_data_is_refused_until_it_is_allowed(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(root / "tiny.toml"), "train.validate_every=0", "train.warmup_steps=1"]
    assert main([*words, "train.steps=3"]) == 0
    before = [metrics.read(root / "run"), sorted(folder_of(root / "run").iterdir())]
    other_text(root / "train")
    capsys.readouterr()
    assert main([*words, "train.steps=6"]) == 2
    said = capsys.readouterr().err
    assert "was trained on other data than data.train=" in said and said.count("\n") == 1
    assert [metrics.read(root / "run"), sorted(folder_of(root / "run").iterdir())] == before
    assert main([*words, "train.steps=6", "data.allow_change=true"]) == 0
    assert "other data than before, as data.allow_change=true allows" in capsys.readouterr().out
    assert [record["step"] for record in metrics.read(root / "run")] == [1, 2, 3, 4, 5, 6]
