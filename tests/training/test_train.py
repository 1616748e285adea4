"""Training: it learns, it stops at NaN with step and layer, and processes resume together."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.cli.ending import NonFiniteError
from atlas_megatron.config import load
from atlas_megatron.inference.reader import open_reader
from atlas_megatron.mixers.base import Mixer, Mode
from atlas_megatron.mixers.memory import AtlasMixer
from atlas_megatron.parallel import world
from atlas_megatron.train import main
from atlas_megatron.training import metrics
from atlas_megatron.training.schedule import learning_rate
from atlas_megatron.training.validation import Validation
from tests.support import tiny_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write(tmp_path_factory.mktemp("tiny")).parent


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    """The run of one process."""
    assert main([str(root / "tiny.toml"), f"run.directory={root}/alone"]) == 0
    return root / "alone"


def test_every_step_leaves_a_record(alone: Path) -> None:
    records = metrics.read(alone)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "layers" in record] == [1, 2, 4, 6]
    assert [record["step"] for record in records if "validation_loss" in record] == [3, 6]
    assert records[0]["lr"] == pytest.approx(1.5e-3)  # the first step of a warm-up of two already moves
    schedule = load(alone / "config.toml").train
    assert [r["lr"] for r in records] == pytest.approx([learning_rate(schedule, step) for step in range(1, 7)])
    assert records[-1]["tokens"] == 6 * 4 * 32
    assert records[-1]["mfu"] is None or torch.cuda.is_available()
    assert {"alpha_mean", "eta_std", "memory_norm", "surprise_before"} <= records[-1]["layers"]["1"].keys()
    by_position = json.loads((alone / "position_loss.json").read_text())
    assert len(by_position["loss"]) == 32
    assert by_position["step"] == 6 and by_position["stride"] == 4
    assert load(alone / "config.toml").run.directory == str(alone)


def test_it_learns(root: Path) -> None:
    words = ["train.steps=40", "train.lr=1e-2", "train.validate_every=40", "train.stats_every=100"]
    assert main([str(root / "tiny.toml"), f"run.directory={root}/learns", "checkpoint.every=40", *words]) == 0
    found = tiny_run.losses(root / "learns")
    assert found[0] == pytest.approx(math.log(tiny_run.VOCABULARY), abs=0.1)
    assert found[-1] < found[0] - 0.5


def test_accumulated_micro_batches_are_one_batch(root: Path) -> None:
    # Without Newton-Schulz, which blows up the small directions of a momentum and what the order of a sum left there.
    for size in (2, 4):
        words = ["memory.preset=omeganet", f"train.micro_batch={size}", f"run.directory={root}/by {size}"]
        assert main([str(root / "tiny.toml"), *words]) == 0
    assert tiny_run.losses(root / "by 2") == pytest.approx(tiny_run.losses(root / "by 4"), rel=1e-6)


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ("decoder.layers.2.norm.weight", r"step 1: loss is nan, first seen in parameter norm.weight of layer 3 "),
        ("embedding.word_embeddings.weight", r"step 1: loss is nan, first seen in .* of the embedding"),
    ],
)
def test_nan_stops_the_run_with_step_and_layer(root: Path, tmp_path: Path, parameter: str, said: str) -> None:
    from atlas_megatron.training.trainer import Trainer

    config = load(root / "tiny.toml", [f"run.directory={tmp_path}"])
    world.join(config)
    try:
        trainer = Trainer(config)
        wrapped = dict(trainer.trained.chunks[0].named_parameters())
        wrapped[f"module.{parameter}"].data[0] = math.nan
        with pytest.raises(NonFiniteError, match=said):
            trainer.train()
    finally:
        world.leave()


@pytest.mark.parametrize(("field", "words"), [("measure", ()), ("ablate", ("train.validate_silenced=true",))])
def test_an_error_leaves_no_model_that_measures_or_is_ablated(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, words: tuple[str, ...]
) -> None:
    from atlas_megatron.training.trainer import Trainer

    mix = AtlasMixer.mix

    def failing(self: AtlasMixer, *given: Any) -> Any:
        if getattr(self.mode, field):
            raise RuntimeError("lost")
        return mix(self, *given)

    monkeypatch.setattr(AtlasMixer, "mix", failing)
    config = load(root / "tiny.toml", [f"run.directory={tmp_path}", *words])
    world.join(config)
    try:
        trainer = Trainer(config)
        with pytest.raises(RuntimeError, match="lost"):
            trainer.train()
        modules = [module for chunk in trainer.trained.chunks for module in chunk.modules()]
        assert {module.mode for module in modules if isinstance(module, Mixer)} == {Mode()}
    finally:
        world.leave()


def test_a_run_that_is_only_timed_saves_nothing(root: Path, tmp_path: Path) -> None:
    words = [str(root / "tiny.toml"), f"run.directory={tmp_path}", "checkpoint.every=100", "checkpoint.last=false"]
    assert main([*words, "train.steps=2", "train.warmup_steps=1"]) == 0
    assert checkpoint.latest(tmp_path)[0] is None
    assert len((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_divergence_keeps_the_last_good_checkpoint(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(root / "tiny.toml"), f"run.directory={tmp_path}", "checkpoint.every=1"]
    assert main([*words, "train.steps=3"]) == 0
    capsys.readouterr()
    assert main([*words, "train.lr=1e38"]) == 1
    said = capsys.readouterr().err
    assert "is nan, first seen in" in said or "is inf, first seen in" in said
    assert said.count("\n") == 1
    last, skipped = checkpoint.latest(tmp_path)
    assert last is not None and not skipped
    assert f"the last good checkpoint is {last}" in said


def test_the_command_line(root: Path, tmp_path: Path) -> None:
    config = root / "tiny.toml"
    wrong = tiny_run.train(config, "train.stepz=3")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.splitlines()[-1].startswith("atlas-train: unknown config key 'train.stepz'; did you mean")
    assert "Traceback" not in wrong.stderr
    done = tiny_run.train(config, f"run.directory={tmp_path}", "train.steps=1", "train.warmup_steps=0")
    assert done.returncode == 0, done.stderr
    assert "step 1/1" in done.stdout
    assert "run summary" in done.stdout
    assert "Warning" not in done.stderr


def test_missing_data_is_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"run.directory={tmp_path}/run", f"data.train={tmp_path}/nothing"]
    assert main([str(root / "tiny.toml"), *words]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/nothing" in said
    assert said.count("\n") == 1


def test_dry_run_needs_neither_data_nor_processes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["parallel.tensor=2", "parallel.pipeline=2", "model.pattern=M-|*-", "data.train=nowhere"]
    assert main([str(root / "tiny.toml"), "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    for line in ("parameters", "training FLOPs a token", "2 x 2 x 1 x 1", "in all, about"):
        assert line in said
    assert main([str(root / "tiny.toml"), "--dry-run", "parallel.tensor=3"]) == 2


def test_a_finished_run_says_which_keys_differ(alone: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (alone / "config.toml").read_text()
    assert main([str(root / "tiny.toml"), f"run.directory={alone}", "train.lr=1e-3"]) == 0
    said = capsys.readouterr().out
    assert "these keys differ from the run's: train.lr=0.001 (was 0.003); it is done" in said
    assert f"{alone} is done: step 6 of 6" in said
    assert (alone / "config.toml").read_text() == before


def test_the_best_checkpoint_is_kept_and_can_be_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter((5.0, 3.0, 4.0, 4.5, 4.2, 4.1))
    monkeypatch.setattr(Validation, "after", lambda self, step: metrics_of(next(losses)))
    words = [f"run.directory={tmp_path}/run", "checkpoint.every=1", "checkpoint.keep=2", "train.validate_every=1"]
    assert main([str(root / "tiny.toml"), *words]) == 0
    kept = sorted(folder.name for folder in checkpoint.folder_of(tmp_path / "run").glob("step_*"))
    assert kept == ["step_00000002", "step_00000005", "step_00000006"]
    best = checkpoint.folder_of(tmp_path / "run") / "step_00000002"
    assert capsys.readouterr().out.splitlines()[-1] == f"the best by validation loss, 3.0000: {best}"
    with tiny_run.a_world_that_is_left():
        assert open_reader(best).weights.checkpoint == best
        assert open_reader(tmp_path / "run").weights.checkpoint == best.with_name("step_00000006")
    (best / "config.toml").write_text("")
    with pytest.raises(ValueError, match="step_00000002 is damaged .*; give another one"):
        open_reader(best)


def metrics_of(validation_loss: float) -> metrics.Record:
    return {"validation_loss": validation_loss, "validation_bits_per_byte": None}


@pytest.fixture(scope="module")
def two(root: Path) -> Path:
    """Runs of two processes, and the same resumed at step 3."""
    layouts = {"data": [], "pipeline": ["parallel.pipeline=2", "model.pattern=M-|*-"]}
    config = root / "tiny.toml"
    tiny_run.train_in(2, config, [[f"run.directory={root}/{name}", *words] for name, words in layouts.items()])
    for name in layouts:
        shutil.copytree(root / name, root / f"{name}-resumed")
        shutil.rmtree(checkpoint.folder_of(root / f"{name}-resumed") / "step_00000006")
    resumed = [[f"run.directory={root}/{name}-resumed", *words] for name, words in layouts.items()]
    tiny_run.train_in(2, config, resumed)
    return root


@pytest.mark.parametrize("layout", ["data", "pipeline"])
def test_two_processes_resume_bit_equal(two: Path, layout: str) -> None:
    # Tied embeddings on two stages: moments that follow a padded bucket (see optimizer.true_offsets).
    unbroken, resumed = metrics.read(two / layout), metrics.read(two / f"{layout}-resumed")
    assert [r["loss"] for r in resumed] == [r["loss"] for r in unbroken]
    assert [r["grad_norm"] for r in resumed] == [r["grad_norm"] for r in unbroken]
    assert resumed[-1]["validation_loss"] == unbroken[-1]["validation_loss"]
