"""One checkpoint read with other chunks: a run and its export say the same, what cannot be read is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.config import Config, at_chunk, load
from atlas_megatron.evaluate.chunks import Sequences, chosen, measured, of_text
from atlas_megatron.evaluate.command import main
from atlas_megatron.evaluate.perplexity import Text
from atlas_megatron.hf.export import export
from atlas_megatron.inference.reader import open_reader
from atlas_megatron.model.build import build_model
from atlas_megatron.parallel import world
from tests.support import tiny_run

CLOSE = 2e-6  # nats; cells hold six decimals


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs with a checkpoint of weights, that have not trained, by their words."""
    done: dict[tuple[str, ...], Path] = {}

    def run(*words: str, pattern: str = "M-C-") -> Path:
        key = (*words, pattern)
        if key not in done:
            root = tmp_path_factory.mktemp("run")
            config = load(tiny_run.write(root, pattern), words)
            with tiny_run.a_world_that_is_left():
                world.join(config)
                checkpoint.save_weights(build_model(config), config)
            done[key] = root / "run"
        return done[key]

    return run


def evaluate(*words: object) -> int:
    with tiny_run.a_world_that_is_left():
        return main(["chunks", *(str(word) for word in words)])


def found(out: Path) -> dict[int, list[float]]:
    cells = json.loads((out / "chunks.json").read_text())["cells"].values()
    losses: dict[int, list[float]] = {}
    for cell in cells:
        losses.setdefault(cell["chunk"], []).extend(cell["mean_loss"])
    return losses


TITANS = ("memory.preset=titans", "memory.eta_sum=3.0")


def test_a_run_and_its_export_say_the_same_of_every_chunk(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs(*TITANS)
    export(run, tmp_path / "model")
    text = ("--text", tiny_run.ROOT / "README.md", "--samples", 3, "--batch", 2)
    assert evaluate(run, *text, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "trained with chunk 8" in said and "8 (trained)" in said and "bits per byte" in said
    assert evaluate(tmp_path / "model", *text, "--out", tmp_path / "hf", "--chunks", "1,8,32") == 0
    ours, theirs = found(tmp_path / "run"), found(tmp_path / "hf")
    assert set(ours) == {1, 2, 4, 8, 16, 32} and set(theirs) == {1, 8, 32}
    for chunk, losses in theirs.items():
        assert len(losses) == 3 and losses == pytest.approx(ours[chunk], abs=CLOSE)
    # Untrained, but each chunk is another computation.
    assert len({round(sum(losses), 6) for losses in ours.values()}) == len(ours)
    assert (tmp_path / "run/chunks.png").read_bytes().startswith(b"\x89PNG")
    # More chunks go on; what is there stays.
    capsys.readouterr()
    assert evaluate(tmp_path / "model", *text, "--out", tmp_path / "hf", "--chunks", "4,8") == 0
    said = capsys.readouterr().out
    assert "chunks: chunk 4, 0 to 1" in said and "chunks: chunk 8," not in said
    assert set(found(tmp_path / "hf")) == {1, 4, 8, 32}


def test_a_chunk_is_read_as_a_model_built_with_it_reads(runs: Any) -> None:
    """And the reader that it comes from stays as it was; a segment's cut makes no difference."""
    run = runs("memory.preset=atlas", "memory.window=4")
    rows = np.random.default_rng(0).integers(0, 64, (2, 33))
    with tiny_run.a_world_that_is_left():
        reader = open_reader(run)
        before = measured(reader, rows)["mean_loss"]
        for chunk in (2, 32):
            config = replace(reader.config, memory=at_chunk(reader.config.memory, chunk))
            model = build_model(config)
            model.load_state_dict(reader._model.state_dict())  # type: ignore[attr-defined]
            tokens = torch.from_numpy(rows)
            with torch.no_grad():
                losses = model.eval()(tokens[:, :-1], None, None, labels=tokens[:, 1:])
            for segment in (2048, 5):
                cell = measured(reader.at_chunk(chunk), rows, segment)
                assert cell["mean_loss"] == pytest.approx(losses.mean(1).tolist(), abs=CLOSE)
                assert (cell["chunk"], cell["tokens"]) == (chunk, 64)
        assert measured(reader, rows)["mean_loss"] == before


def test_sequences_are_spread_over_a_text() -> None:
    text = Text("trial", np.arange(100))
    rows = of_text(text, 8, 3).tokens
    assert rows.tolist() == [[*range(0, 9)], [*range(45, 54)], [*range(91, 100)]]
    assert Sequences("a", rows).fingerprint == Sequences("b", rows.astype(np.int16)).fingerprint
    assert Sequences("a", rows).fingerprint != Sequences("a", rows + 1).fingerprint
    with pytest.raises(ValueError, match="trial holds 100 tokens, fewer than one sequence of 100 and its last label"):
        of_text(text, 100, 3)


def test_the_chunks_that_are_read() -> None:
    config = Config()
    assert chosen(config, ()) == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    odd = replace(config, memory=replace(config.memory, chunk=48), model=replace(config.model, seq_length=96))
    assert chosen(odd, ()) == (1, 2, 4, 8, 16, 32, 48, 64)
    assert chosen(odd, (96, 3, 3)) == (3, 96)
    begins_anew = replace(config, memory=replace(config.memory, chunk=16, shard=64))
    assert chosen(begins_anew, ()) == (1, 2, 4, 8, 16, 32, 64)
    with pytest.raises(ValueError, match="shard=64 must be 0 .* or a multiple of chunk=128"):
        chosen(begins_anew, (128,))


@pytest.mark.parametrize(
    ("pattern", "words", "asked", "said"),
    [
        ("F-", (), (), "model.pattern='F-' has no memory, which alone has a chunk"),
        ("M-", ("memory.preset=delta",), (), "of the delta rule, which is the rule of one token a chunk"),
        ("M-", ("memory.preset=deep_transformer",), (), "memory.kernel='exponential' keeps its sources"),
        ("M-", TITANS, ("--chunks", "64"), "--chunks 64 is longer than the model's sequences of 32 tokens"),
        ("M-", TITANS, ("--chunks", "0"), "memory.chunk=0 must be at least 1 token"),
        ("M-", TITANS, ("--chunks", "8,x"), "--chunks '8,x': 'x' is no length"),
        ("M-", TITANS, ("--samples", "0"), "--samples 0 must be at least 1"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    pattern: str, words: tuple[str, ...], asked: tuple[str, ...], said: str, runs: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = runs(*words, pattern=pattern)
    assert evaluate(run, *asked, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", ["delta", "deep_transformer"])
def test_its_own_chunk_is_read_of_every_member(preset: str, runs: Any, tmp_path: Path) -> None:
    run = runs(f"memory.preset={preset}", pattern="M-")
    own = 1 if preset == "delta" else 8
    assert evaluate(run, "--chunks", own, "--samples", 2, "--out", tmp_path) == 0
    assert set(found(tmp_path)) == {own}
