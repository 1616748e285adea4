"""Data: what cannot be trained on is refused with a line; what can comes in an order that resumes."""

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from atlas_megatron.config import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from atlas_megatron.data.batches import (
    Batches,
    blend,
    build_datasets,
    bytes_per_token,
    inspect,
    text_of,
    validation_labels,
)
from atlas_megatron.data.tokenizer import load_tokenizer, train_tokenizer

VOCAB = 300
SEQ = 16


def write_set(prefix: Path, documents: list[np.ndarray], dtype: type = np.uint16) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two train sets and a validation set of random tokens, and a tokenizer."""
    generator = np.random.default_rng(0)
    for name, low, high in (("a", 0, 100), ("b", 100, 200), ("validation", 200, 256)):
        write_set(tmp_path / name, [generator.integers(low, high, size) for size in (70, 1, 200, 33)])
    text = ["".join(chr(97 + letter) for letter in generator.integers(0, 26, 400)) for _ in range(4)]
    train_tokenizer(text, VOCAB, tmp_path / "tokenizer")
    return tmp_path


def config_of(folder: Path, train: tuple[str, ...], micro_batch: int = 2, vocab_size: int = VOCAB) -> Config:
    return Config(
        run=RunConfig(directory=str(folder / "run")),
        model=ModelConfig(vocab_size=vocab_size, seq_length=SEQ),
        train=TrainConfig(micro_batch=micro_batch),
        data=DataConfig(train=train, validation=(f"{folder}/validation",), tokenizer=f"{folder}/tokenizer"),
    )


def test_batches_are_next_token_pairs_of_the_sets(folder: Path) -> None:
    train, validation = build_datasets(config_of(folder, (f"{folder}/a",)), 12, 4)
    batch = next(Batches(train, config_of(folder, (f"{folder}/a",))))
    assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids", "counted"}
    for name in ("tokens", "labels", "position_ids"):
        assert batch[name].shape == (2, SEQ) and batch[name].dtype == torch.int64
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert torch.equal(batch["position_ids"], torch.arange(SEQ).expand(2, SEQ))
    assert bool((batch["loss_mask"] == 1).all()) and batch["counted"] == 2 * SEQ
    assert len(train) >= 12
    assert all(200 <= int(sample["tokens"].min()) for sample in (validation[0], validation[3]))


def test_other_seeds_shuffle_the_training_alone(folder: Path) -> None:
    config = config_of(folder, (f"{folder}/a",))
    (train, held_out), (other_train, other_held_out) = (
        build_datasets(dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed)), 40, 8)
        for seed in (1, 2)
    )
    assert [sample["tokens"].tolist() for sample in held_out] == [s["tokens"].tolist() for s in other_held_out]
    assert [train[n]["tokens"].tolist() for n in range(40)] != [other_train[n]["tokens"].tolist() for n in range(40)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_at_any_sample(folder: Path, workers: int) -> None:
    config = config_of(folder, (f"{folder}/a", f"{folder}/b"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers))
    train, _ = build_datasets(config, 20, 0)
    whole = [batch["tokens"] for batch in Batches(train, config)]
    first = Batches(train, config)
    for _ in range(3):
        next(first)
    assert first.consumed_samples == 6
    rebuilt, _ = build_datasets(config, 20, 0)
    rest = Batches(rebuilt, config, first.consumed_samples)
    assert len(rest) == len(whole) - 3
    for batch, expected in zip(rest, whole[3:], strict=True):
        assert torch.equal(batch["tokens"], expected)
    assert len(rest) == 0


def test_ranks_share_out_each_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder, (f"{folder}/a",))
    train, _ = build_datasets(config, 16, 0)
    whole = torch.cat([batch["tokens"] for batch in Batches(train, config)])[:16]
    state = "atlas_megatron.data.batches.parallel_state."
    monkeypatch.setattr(f"{state}model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(f"{state}get_data_parallel_world_size", lambda: 2)
    monkeypatch.setattr(f"{state}get_context_parallel_world_size", lambda: 1)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(f"{state}get_data_parallel_rank", lambda rank=rank: rank)
        shares.append([batch["tokens"] for batch in Batches(train, config)][:4])
    together = [tokens for step in zip(*shares, strict=True) for tokens in step]
    assert torch.equal(torch.cat(together), whole)


def test_context_parallel_ranks_share_out_each_sequence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder, (f"{folder}/a",))
    train, _ = build_datasets(config, 4, 0)
    whole = next(Batches(train, config))
    state = "atlas_megatron.data.batches.parallel_state."
    for name, value in {
        "model_parallel_is_initialized": True, "get_data_parallel_world_size": 1, "get_data_parallel_rank": 0,
        "get_context_parallel_world_size": 4,
    }.items():  # fmt: skip
        monkeypatch.setattr(f"{state}{name}", lambda value=value: value)
    shards = []
    for rank in range(4):
        monkeypatch.setattr(f"{state}get_context_parallel_rank", lambda rank=rank: rank)
        shards.append(next(Batches(train, config)))
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        assert torch.equal(torch.cat([shard[name] for shard in shards], 1), whole[name])
    assert all(torch.equal(shard["counted"], whole["counted"]) for shard in shards)


def test_batches_leave_the_random_state_alone(folder: Path) -> None:
    config = config_of(folder, (f"{folder}/a",))
    train, _ = build_datasets(config, 8, 0)
    before = torch.get_rng_state()
    list(Batches(train, config))
    assert torch.equal(before, torch.get_rng_state())


def test_blend_draws_by_weight(folder: Path) -> None:
    config = config_of(folder, (f"0.75 {folder}/a", f"0.25 {folder}/b"))
    train, _ = build_datasets(config, 200, 0)
    from_a = sum(int(train[i]["tokens"].max()) < 100 for i in range(200))
    assert from_a == pytest.approx(150, abs=2)


def test_data_prepared_again_is_read_anew(folder: Path) -> None:
    config = config_of(folder, (f"{folder}/a",))
    build_datasets(config, 8, 0)
    write_set(folder / "a", [np.full(SEQ + 1, 7)])
    train, _ = build_datasets(config, 8, 0)
    assert all(set(train[i]["tokens"].tolist()) == {7} for i in range(8))


def test_blend_words() -> None:
    assert blend(("0.5 x", "2 y")) == [(0.5, "x"), (2.0, "y")]
    assert blend(("x", "my folder/y")) == [(None, "x"), (None, "my folder/y")]
    with pytest.raises(ValueError, match="weight"):
        blend(("0.5 x", "y"))
    with pytest.raises(ValueError, match="greater than 0"):
        blend(("-1 x",))


def test_bytes_per_token_is_of_the_validated_sequences(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    texts = ["the cat sat on the mat. " * 4, "é🙂" * 20]
    write_set(folder / "validation", [np.asarray([*tokenizer.encode(text), tokenizer.eod]) for text in texts])
    config = config_of(folder, (f"{folder}/a",))
    config = dataclasses.replace(config, train=TrainConfig(micro_batch=2, validate_sequences=5))
    labels = validation_labels(config)
    assert [len(row) for row in labels] == [SEQ] * 5
    _, validation = build_datasets(config, 4, 5)
    assert labels == [validation[i]["labels"].tolist() for i in range(5)]
    text = text_of(labels, tokenizer)
    assert b"cat" in text and b"endoftext" not in text
    assert bytes_per_token(config) == len(text) / (5 * SEQ)
    nothing = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=()))
    assert bytes_per_token(nothing) is None


def damage(file: Path, at: int, value: bytes) -> None:
    raw = bytearray(file.read_bytes())
    raw[at : at + len(value)] = value
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda a: a.with_suffix(".idx").unlink(), "a.idx does not exist"),
        (lambda a: a.with_suffix(".bin").unlink(), "a.bin does not exist"),
        (lambda a: a.with_suffix(".idx").write_bytes(b""), "a.idx is truncated"),
        (lambda a: a.with_suffix(".idx").write_bytes(a.with_suffix(".idx").read_bytes()[:-4]), "a.idx is truncated"),
        (lambda a: damage(a.with_suffix(".idx"), 0, b"X"), "not a Megatron index"),
        (lambda a: damage(a.with_suffix(".idx"), 17, b"\xff"), "not a Megatron index"),
        (lambda a: damage(a.with_suffix(".idx"), 18, struct.pack("<Q", 2**60)), "not a Megatron index"),
        (lambda a: damage(a.with_suffix(".idx"), 34, struct.pack("<i", 71)), "not a Megatron index"),
        (lambda a: damage(a.with_suffix(".idx"), 34, struct.pack("<i", -71)), "not a Megatron index"),
        (lambda a: a.with_suffix(".bin").write_bytes(a.with_suffix(".bin").read_bytes()[:-2]), "a.bin has 606 bytes"),
        (lambda a: write_set(a, []), "a.bin holds no tokens"),
        (lambda a: write_set(a, [np.arange(SEQ)]), "fewer than one sequence of model.seq_length=16"),
        (lambda a: write_set(a, [np.arange(VOCAB + 1)]), f"holds token {VOCAB} but model.vocab_size is {VOCAB}"),
    ],
)
def test_unusable_data_are_refused(folder: Path, harm: object, words: str) -> None:
    harm(folder / "a")
    with pytest.raises(ValueError, match=words) as caught:
        build_datasets(config_of(folder, (f"{folder}/a",)), 4, 0)
    assert "\n" not in str(caught.value)


def test_vocabulary_must_fit_the_model(folder: Path) -> None:
    with pytest.raises(ValueError, match=f"has {VOCAB} tokens but model.vocab_size is {VOCAB - 1}"):
        build_datasets(config_of(folder, (f"{folder}/a",), vocab_size=VOCAB - 1), 4, 0)


def test_an_empty_data_section_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="data.train is empty"):
        build_datasets(config_of(folder, ()), 4, 0)


def test_large_files_are_scanned_in_windows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas_megatron.data.batches.SCANNED_BYTES", 256)
    write_set(folder / "a", [np.arange(1000) % 250, np.full(10, 299)])
    assert inspect(f"{folder}/a", VOCAB) == 1010
    with pytest.raises(ValueError, match="holds token 299"):
        inspect(f"{folder}/a", 299)
