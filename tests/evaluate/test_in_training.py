"""Evaluations and samples of a live model: as atlas-eval of its checkpoint, in any layout, without moving the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.config import load
from atlas_megatron.evaluate import command, in_training, symbolic
from atlas_megatron.train import main
from atlas_megatron.training import metrics
from tests.support import tiny_run

TASKS = 'train.evaluate_tasks=["perplexity", "mqar", "mad_in_context_recall"]'
LENGTHS, SAMPLES = "48,64", 5
WATCHED = ["train.evaluate_every=2", TASKS, f"train.evaluate_lengths={LENGTHS}", f"train.evaluate_samples={SAMPLES}"]
SAMPLED = ["train.sample_every=3", "train.sample_prompt=the memory", "train.sample_tokens=12"]
LAYOUTS = {
    "sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline": ["parallel.pipeline=2", "model.pattern=M-|*-"],
    "context": ["parallel.context=2"],
    "data": [],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write(tmp_path_factory.mktemp("tiny")).parent


@pytest.fixture(scope="module")
def watched(root: Path) -> Path:
    words = [f"run.directory={root}/watched", "log.tensorboard=true", *WATCHED, *SAMPLED]
    assert main([str(root / "tiny.toml"), *words]) == 0
    return root / "watched"


def evaluations(run: Path) -> dict[int, dict[str, Any]]:
    return {record["step"]: record["evaluation"] for record in metrics.read(run) if "evaluation" in record}


def read_afterwards(run: Path) -> dict[str, Any]:
    """What atlas-eval finds in the newest checkpoint, in the form of a run's own evaluation."""
    out = run / "evaluation"
    names = ("perplexity", "mqar", "mad_in_context_recall")
    with tiny_run.a_world_that_is_left():
        words = [*names, str(run), "--lengths", LENGTHS, "--samples", str(SAMPLES), "--out", str(out)]
        assert command.main(words) == 0
    found = {}
    for name in names:
        cells = json.loads((out / f"{name}.json").read_text())["cells"]
        key = "mean_loss" if name == "perplexity" else "accuracy"
        by_length: dict[str, list[float]] = {}
        for title, cell in cells.items():
            if title != "along":
                by_length.setdefault(title.partition(" ")[0], []).extend(cell[key])
        found[name] = {length: sum(values) / len(values) for length, values in by_length.items()}
    return found


def means(evaluation: dict[str, Any]) -> dict[str, Any]:
    key = {"perplexity": "loss"}
    return {
        task: {n: measures[key.get(task, "accuracy")] for n, measures in by_length.items() if n != "along"}
        for task, by_length in evaluation.items()
    }


def test_the_training_is_the_same_with_and_without(root: Path, watched: Path) -> None:
    assert main([str(root / "tiny.toml"), f"run.directory={root}/plain"]) == 0
    with_it, without = metrics.read(watched), metrics.read(root / "plain")
    for key in ("loss", "grad_norm", "layers", "validation_loss"):
        assert [r.get(key) for r in with_it] == [r.get(key) for r in without]
    assert sorted(evaluations(watched)) == [2, 4, 6]
    assert not evaluations(root / "plain")


def test_it_finds_what_atlas_eval_finds_in_the_checkpoint(watched: Path) -> None:
    assert read_afterwards(watched) == {
        task: pytest.approx(values, abs=1e-6) for task, values in means(evaluations(watched)[6]).items()
    }
    along = evaluations(watched)[6]["perplexity"]["along"]
    assert along.items() <= json.loads((watched / "evaluation/perplexity.json").read_text())["cells"]["along"].items()
    assert along["ends"][-1] == 64 and len(along["loss"]) == len(along["ends"])


def test_a_resumed_run_evaluates_at_the_same_steps_the_same(root: Path, watched: Path) -> None:
    shutil.copytree(watched, root / "resumed")
    shutil.rmtree(checkpoint.folder_of(root / "resumed") / "step_00000006")
    assert main([str(root / "tiny.toml"), f"run.directory={root}/resumed", *WATCHED, *SAMPLED]) == 0
    assert evaluations(root / "resumed") == evaluations(watched)
    assert [r.get("sample") for r in metrics.read(root / "resumed")] == [r.get("sample") for r in metrics.read(watched)]


def test_a_sample_is_in_the_metrics_on_the_screen_and_in_tensorboard(watched: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    samples = {record["step"]: record["sample"] for record in metrics.read(watched) if "sample" in record}
    assert sorted(samples) == [3, 6]
    assert all(text.startswith("the memory") and len(text) > len("the memory") for text in samples.values())
    assert "step 6/6  sample: the memory" in (watched / "log.txt").read_text()
    board = EventAccumulator(str(watched / "tensorboard"))
    board.Reload()
    texts = board.Tensors("sample/text_summary")
    assert [event.step for event in texts] == [3, 6]
    assert texts[-1].tensor_proto.string_val[0].decode().startswith("    the memory")
    told = board.Scalars("evaluation/mqar/64/accuracy")
    assert [event.value for event in told] == pytest.approx(
        [found["mqar"]["64"]["accuracy"] for found in evaluations(watched).values()]
    )


def test_a_sample_without_a_prompt_begins_as_a_document_does(root: Path) -> None:
    words = ["train.steps=1", "train.warmup_steps=0", "train.sample_every=1", "train.sample_tokens=5"]
    for name in ("once", "twice"):
        assert main([str(root / "tiny.toml"), f"run.directory={root}/{name}", *words]) == 0
    (once,), (twice,) = metrics.read(root / "once"), metrics.read(root / "twice")
    assert once["sample"] == twice["sample"] != ""


def test_needles_are_asked_for_on_the_way(root: Path) -> None:
    words = ["train.steps=1", "train.warmup_steps=0", "train.evaluate_every=1", "train.evaluate_lengths=512"]
    words += ["train.evaluate_tasks=niah_single_1", "train.evaluate_samples=1", f"run.directory={root}/needle"]
    assert main([str(root / "tiny.toml"), *words]) == 0
    assert evaluations(root / "needle")[1]["niah_single_1"].keys() == {"512"}
    scores = evaluations(root / "needle")[1]["niah_single_1"]["512"]
    assert scores.keys() == {"string_match_all", "string_match_part"} and all(0 <= s <= 1 for s in scores.values())


@pytest.mark.parametrize(
    "layout", ["sequence", *(pytest.param(n, marks=pytest.mark.parallel) for n in LAYOUTS if n != "sequence")]
)
def test_two_processes_find_what_one_finds_and_train_on_the_same(root: Path, layout: str) -> None:
    runs = {name: root / f"{layout}-{name}" for name in ("watched", "plain")}
    layouts = ["train.steps=4", "checkpoint.every=4", *LAYOUTS[layout]]
    words = {"watched": [*layouts, *WATCHED, *SAMPLED], "plain": layouts}
    tiny_run.train_in(2, root / "tiny.toml", [[f"run.directory={run}", *words[name]] for name, run in runs.items()])
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in metrics.read(runs["watched"])] == [r[key] for r in metrics.read(runs["plain"])]
    assert sorted(evaluations(runs["watched"])) == [2, 4]
    found = means(evaluations(runs["watched"])[4])
    assert read_afterwards(runs["watched"]) == {n: pytest.approx(v, abs=1e-6) for n, v in found.items()}
    assert metrics.read(runs["watched"])[2]["sample"].startswith("the memory")


@pytest.mark.parallel
def test_a_second_stage_is_evaluated_with_the_steps_that_it_trains_with(root: Path) -> None:
    # At another chunk the steps of a memory without Newton-Schulz would be derived anew, but for its checkpoint.
    preset = ["memory.preset=omeganet", "train.steps=2", "train.warmup_steps=1"]
    assert main([str(root / "tiny.toml"), *preset, f"run.directory={root}/first", "checkpoint.every=2"]) == 0
    words = [*preset, f"run.directory={root}/second", f"train.start_from={root}/first", "memory.chunk=16"]
    tiny_run.train_in(2, root / "tiny.toml", [[*words, *LAYOUTS["sequence"], *WATCHED, "checkpoint.every=2"]])
    found = means(evaluations(root / "second")[2])
    assert read_afterwards(root / "second") == {n: pytest.approx(v, abs=1e-6) for n, v in found.items()}


def test_the_dry_run_says_what_cannot_be_evaluated(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dry-run", "train.evaluate_every=2", "train.evaluate_tasks=hellaswag"]
    assert main([str(root / "tiny.toml"), *words]) == 0
    assert "cannot train yet: train.evaluate_tasks: 'hellaswag' is none of" in capsys.readouterr().out


def test_an_evaluation_is_drawn(watched: Path) -> None:
    from atlas_megatron.reports import evaluations as drawing
    from atlas_megatron.reports.runs import plot_run

    drawn = plot_run(watched)
    assert drawn[-1].name == "evaluation.png" and drawn[-1].read_bytes().startswith(b"\x89PNG")
    axes = {axes.get_title(): axes for axes in drawing.figure(metrics.read(watched), "run").axes if axes.get_title()}
    assert list(axes) == ["perplexity", "mqar", "mad_in_context_recall", "perplexity: loss by position"]
    assert [line.get_label() for line in axes["mqar"].lines] == ["48 tokens", "64 tokens"]
    found = [evaluation["mqar"]["64"]["accuracy"] for evaluation in evaluations(watched).values()]
    assert list(axes["mqar"].lines[1].get_ydata()) == found
    assert [line.get_label() for line in axes["perplexity"].lines] == ["no context", "48 tokens", "64 tokens"]


def test_a_copy_that_does_not_fit_is_refused_before_the_first_step(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_training, "memory_of_a_process", lambda: 1000)
    config = load(root / "tiny.toml", [*WATCHED, *LAYOUTS["sequence"]])
    with pytest.raises(ValueError, match="train.evaluate_every=2 and sample_every=0 read a copy of the whole"):
        in_training.watcher_of(config, 2)
    assert not in_training.wrong_with_tasks(config), "a dry run asks for other machines"
    line, fits = in_training.copy_held(config, 2, 2.0**30)
    assert fits and "read a copy of the whole model" in line and "set both to 0" not in line
    assert in_training.copy_held(load(root / "tiny.toml", WATCHED), 2, 1.0) == ("", True)
    assert in_training.watcher_of(load(root / "tiny.toml", WATCHED), 2), "one process holds all of it, without a copy"
    assert in_training.watcher_of(load(root / "tiny.toml"), 2) is None


def test_what_does_not_fit_on_the_way_is_left_out_by_name(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> Any:
        raise ValueError("a state would take 9 GiB")

    monkeypatch.setattr(symbolic, "measured", refused)
    words = ["train.steps=1", "train.warmup_steps=0", *WATCHED, f"run.directory={tmp_path}/run"]
    assert main([str(root / "tiny.toml"), *words]) == 0
    assert evaluations(tmp_path / "run")[1].keys() == {"perplexity"}
    assert "step 1: mqar was left out: a state would take 9 GiB" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.evaluate_tasks=hellaswag"], "'hellaswag' is none of atlas-eval's own tasks, which need neither a"),
        (["train.evaluate_tasks=niah_singel_1"], "did you mean 'niah_single_1'?"),
        (["train.evaluate_tasks=chunks"], "measure it on a checkpoint (atlas-eval chunks RUN)"),
        (["train.evaluate_tasks=mqar@zoologie"], "mqar@zoologie"),
        (["train.evaluate_tasks=[]"], "name tasks of atlas-eval, or set train.evaluate_every=0"),
        (["train.evaluate_tasks=mqar", "train.evaluate_lengths=4K"], "mqar: a vocabulary of 272 has ids for"),
        (["train.evaluate_lengths=4096"], "perplexity: "),
        (["train.evaluate_tasks=niah_single_1"], "niah_single_1: "),
        (["train.evaluate_lengths=long"], "train.evaluate_lengths 'long': 'long' is no length"),
        (["train.evaluate_lengths=0,64"], "names a length of 0 tokens"),
        (["train.evaluate_samples=0"], "train.evaluate_samples=0 must be greater than 0"),
        (["train.evaluate_every=-1"], "train.evaluate_every=-1 must be 0 or more"),
        (["data.validation=[]", "train.validate_every=0"], "perplexity: data.validation is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_before_the_first_step(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    given = [str(root / "tiny.toml"), f"run.directory={tmp_path}/run", "train.evaluate_every=2", *words]
    assert main(given) == 2
    told = capsys.readouterr()
    assert said in told.err and told.err.count("\n") == 1, told.err
    assert not (tmp_path / "run").exists()
