"""A second stage: a run begins with another's weights, reads them at another chunk, and steps as they were trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.config import load_saved
from atlas_megatron.evaluate import command
from atlas_megatron.inference.reader import Reader, open_reader
from atlas_megatron.train import main
from atlas_megatron.training.metrics import read
from tests.support import tiny_run

# Steps so large that another chunk reads something else.
TITANS = ["memory.preset=titans", "memory.eta_sum=3.0"]
ATLAS = ["memory.preset=atlas", "memory.window=4", "memory.eta_start=0.0", "memory.eta_per_token=0.005"]
STILL = ["train.lr=1e-12", "train.min_lr=0", "train.weight_decay=0", "train.steps=3"]
APART = 1e-4  # nats; what is compared agrees to a hundredth of it


def at(chunk: int, words: list[str]) -> list[str]:
    return [*words, f"memory.chunk={chunk}", f"memory.ns_period={chunk if words is ATLAS else 1}"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], tuple[Path, Path]]:
    """(config, a run of three steps at chunk 16), trained once for each model."""
    done: dict[str, tuple[Path, Path]] = {}

    def trained(words: list[str]) -> tuple[Path, Path]:
        if words[0] not in done:
            root = tmp_path_factory.mktemp("stages")
            config = tiny_run.write(root)
            assert main([str(config), *at(16, words), "train.steps=3"]) == 0
            done[words[0]] = config, root / "run"
        return done[words[0]]

    return trained


def second(config: Path, directory: Path, source: Path, *words: str) -> list[str]:
    return [str(config), *words, f"train.start_from={source}", f"run.directory={directory}"]


def validated(directory: Path) -> list[float]:
    return [record["validation_loss"] for record in read(directory) if "validation_loss" in record]


def losses_at_chunks(run: Path, out: Path) -> dict[int, float]:
    """What atlas-eval measures, by chunk."""
    with tiny_run.a_world_that_is_left():
        assert command.main(["chunks", str(run), "--out", str(out), "--batch", "16"]) == 0
    cells = json.loads((out / "chunks.json").read_text())["cells"].values()
    return {cell["chunk"]: sum(cell["mean_loss"]) / len(cell["mean_loss"]) for cell in cells}


@pytest.mark.parametrize("words", [TITANS, ATLAS], ids=["titans", "atlas"])
def test_its_first_validation_is_what_an_evaluation_at_that_chunk_says(
    words: list[str], stages: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = stages(words)
    found = losses_at_chunks(run, tmp_path / "out")
    assert set(found) == {1, 2, 4, 8, 16, 32}
    assert found[16] == pytest.approx(validated(run)[-1], abs=APART / 100)
    capsys.readouterr()
    assert main(second(config, tmp_path / "two", run, *at(4, words), *STILL)) == 0
    said = capsys.readouterr().out
    assert f"begins with the weights of {run}/checkpoints/step_00000003; memory.chunk=4 (was 16)" in said
    (ours,) = validated(tmp_path / "two")
    assert ours == pytest.approx(found[4], abs=APART / 100) and abs(found[4] - found[16]) > APART
    # And its own checkpoint, at its own chunk, at which its steps are those of the first.
    (own,) = {checkpoint.latest(tmp_path / "two")[0]}
    assert own is not None
    memory = load_saved(own / checkpoint.CONFIG).memory
    assert memory.eta_start == pytest.approx(0.02 if words is ATLAS else 3.0 / 16 / 10)
    again = losses_at_chunks(tmp_path / "two", tmp_path / "out two")
    # Back at 16, ATLAS writes every 4 tokens as its second stage did, and not once a chunk as its first.
    for chunk in (4,) if words is ATLAS else (4, 16):
        assert again[chunk] == pytest.approx(found[chunk], abs=APART / 100)


def by_token(reader: Reader, tokens: torch.Tensor) -> float:
    """The loss of a text that is read a token at a time, as it is written."""
    with torch.no_grad():
        logits = torch.cat([reader.read(tokens[:, n : n + 1]) for n in range(tokens.shape[1] - 1)], 1)
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), tokens[:, 1:]).item()


@pytest.mark.parametrize("words", [TITANS, ATLAS], ids=["titans", "atlas"])
def test_writing_token_by_token_is_reading_by_the_chunk(words: list[str], stages: Any) -> None:
    """The state keeps a chunk's anchor: a text costs the same however it is cut. Only the chunk makes a difference."""
    _, run = stages(words)
    tokens = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(0))
    with tiny_run.a_world_that_is_left():
        reader, costs = open_reader(run), []
        for chunk in (1, 4, 16):
            other = reader.at_chunk(chunk)
            with torch.no_grad():
                logits = other.read(tokens[:, :-1]).transpose(1, 2).float()
            costs.append(torch.nn.functional.cross_entropy(logits, tokens[:, 1:]).item())
            other.forget()
            assert by_token(other, tokens) == pytest.approx(costs[-1], abs=1e-5)
    assert max(costs) - min(costs) > 1e-4


def test_a_stopped_second_stage_goes_on_as_ever(
    stages: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = stages(TITANS)
    source = tmp_path / "first"
    shutil.copytree(run, source)
    words = [*at(4, TITANS), "train.lr=3e-3"]
    unbroken = second(config, tmp_path / "unbroken", source / "checkpoints/step_00000003", *words)
    assert main(unbroken) == 0
    broken = second(config, tmp_path / "broken", source, *words)
    assert main([*broken, "checkpoint.every=2"]) == 0
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"broken/checkpoints/step_{step:08d}")
    # What it began with may be gone.
    shutil.rmtree(source)
    capsys.readouterr()
    assert main([*broken, "checkpoint.every=2"]) == 0
    said = capsys.readouterr().out
    assert "resumed from" in said and "begins with" not in said and "differ" not in said
    whole, resumed = ([record["loss"] for record in read(tmp_path / name)] for name in ("unbroken", "broken"))
    assert len(whole) == 6 and resumed == whole
    # Without the word it goes on too; with another it does not.
    assert main([word for word in broken if not word.startswith("train.start_from")]) == 0
    assert main([*broken, f"train.start_from={run}"]) == 2
    said = capsys.readouterr().err
    assert f"train.start_from={run}, but {tmp_path}/broken began with the weights of {source}" in said


def test_a_decay_branches_off_a_second_stage_with_its_steps(stages: Any, tmp_path: Path) -> None:
    config, run = stages(TITANS)
    words = [*at(4, TITANS), "train.validate_every=0", "checkpoint.every=2"]
    assert main(second(config, tmp_path / "two", run, *words, "train.schedule=constant", "train.steps=3")) == 0
    decay = [str(config), *words, "train.schedule=wsd", "train.decay_steps=2", f"run.directory={tmp_path}/decay"]
    decay += [f"train.decay_from={tmp_path}/two:2", "train.steps=4"]
    assert main(decay) == 0
    # The same weights and data at the step behind it, so the same loss; and again with the same words.
    assert read(tmp_path / "decay")[0]["loss"] == read(tmp_path / "two")[2]["loss"]
    steps = [load_saved(tmp_path / name / "config.toml").memory.eta_start for name in ("two", "decay")]
    assert steps[0] == steps[1] > 0
    assert main(decay) == 0


def test_optimizer_schedule_and_data_begin_anew(stages: Any, tmp_path: Path) -> None:
    """As a run that draws its weights begins, but for these: the same texts, at the same rates."""
    config, run = stages(TITANS)
    assert main(second(config, tmp_path / "two", run, *at(4, TITANS), "train.steps=3")) == 0
    first, later = read(run), read(tmp_path / "two")
    assert [record["lr"] for record in later] == [record["lr"] for record in first]
    assert [(r["step"], r["tokens"]) for r in later] == [(r["step"], r["tokens"]) for r in first]
    # It has learned something, and goes on from there.
    assert all(ours["loss"] < theirs["loss"] for ours, theirs in zip(later, first, strict=True))


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("size", "words"),
    [(2, ["parallel.tensor=2"]), (2, ["parallel.pipeline=2"]), (2, ["parallel.context=2"])],
    ids=["tensor", "pipeline", "context"],
)
def test_any_layout_begins_with_the_weights_of_one_process(
    size: int, words: list[str], stages: Any, tmp_path: Path
) -> None:
    config, run = stages(TITANS)
    alone, spread = (second(config, tmp_path / name, run, *at(4, TITANS)) for name in ("alone", "spread"))
    assert main(alone) == 0
    tiny_run.train_in(size, config, [[*spread[1:], *words]])
    ours, theirs = read(tmp_path / "spread"), read(tmp_path / "alone")
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in theirs], rel=1e-4)
    # And one process with theirs.
    assert main(second(config, tmp_path / "back", tmp_path / "spread", *at(4, TITANS), *STILL)) == 0
    assert validated(tmp_path / "back")[0] == pytest.approx(validated(tmp_path / "spread")[-1], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["memory.heads=4"], "memory.heads: 4, the checkpoint has 2"),
        (["model.hidden_size=64"], "model.hidden_size: 64, the checkpoint has 32"),
        (["model.vocab_size=288"], "model.vocab_size: 288, the checkpoint has 272"),
        (["memory.preset=omeganet"], "memory.step_in_momentum: False, the checkpoint has True"),
        (["model.seq_length=16"], "model.seq_length: 16, the checkpoint has 32 (it may grow, not shrink)"),
        (["memory.eta_start=0.5"], "memory.eta_start=0 takes the trained one"),
        (["train.start_from=nowhere"], "train.start_from=nowhere is no folder; give a run's directory"),
        (["train.start_from=ROOT"], "holds no checkpoints; give a run's directory, or one of them"),
        (["run.directory=RUN"], "began with weights of its own and has checkpoints; name another run.directory"),
    ],
)
def test_what_it_cannot_begin_with_is_said_before_the_first_step(
    words: list[str], said: str, stages: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = stages(TITANS)
    named = [word.replace("ROOT", str(tmp_path)).replace("RUN", str(run)) for word in words]
    asked = [*second(config, tmp_path / "two", run, *at(4, TITANS)), *named]
    capsys.readouterr()
    assert main([*asked, "--dry-run"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cannot train yet: train.")]
    assert said in line
    assert main(asked) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "two").exists()


def test_a_period_that_does_not_follow_is_refused_with_the_one_that_does(
    stages: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = stages(ATLAS)
    for period, said in ((16, "ns_period=16 must divide chunk=4"), (2, "memory.ns_period: 2, the checkpoint has 4")):
        asked = second(config, tmp_path / "two", run, *ATLAS, "memory.chunk=4", f"memory.ns_period={period}")
        assert main(asked) == 2
        assert said in capsys.readouterr().err


def test_a_dry_run_says_what_it_would_begin_with(
    stages: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = stages(ATLAS)
    asked = second(config, tmp_path / "two", run, *at(4, ATLAS))
    assert main([*asked, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"begins with the weights of {run}/checkpoints/step_00000003; memory.chunk=4 (was 16), ns_period=4" in said
    assert "eta_start = 0.02" in said and "cannot train yet" not in said
    assert main([*asked, "train.steps=3"]) == 0
    assert main([*asked, "--dry-run"]) == 0
    assert f"resumed from {tmp_path}/two/checkpoints/step_00000003" in capsys.readouterr().out


def test_damaged_weights_and_another_tokenizer_are_named(
    stages: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = stages(TITANS)
    shutil.copytree(run, tmp_path / "first")
    source = tmp_path / "first/checkpoints/step_00000003"
    asked = second(config, tmp_path / "two", source, *at(4, TITANS))
    shutil.copy(source / "tokenizer.json", tmp_path / "kept.json")
    marker = json.loads((source / "complete.json").read_text())
    words = (source / "data.json").read_text()
    (source / "data.json").write_text(words.replace(json.loads(words)["tokenizer"], "another"))
    assert main(asked) == 2
    assert f"train.start_from={source} is damaged (" in capsys.readouterr().err
    marker["crc32"].pop("data.json")
    marker["files"].pop("data.json")
    (source / "complete.json").write_text(json.dumps(marker))
    assert main(asked) == 2
    assert f"{source} was trained with another tokenizer than data.tokenizer=" in capsys.readouterr().err
    assert main([*asked, "data.allow_change=true", "train.steps=3"]) == 0
