"""The gradient norm of shipped configurations: every one is a row, and at small size every preset keeps the bounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atlas_megatron.config import load
from atlas_megatron.config.presets import PRESETS
from experiments import shipped_gradients as experiment
from tests.support import pages, tiny_run

CHUNKS = 64  # of a sequence
TOKENS = 8  # of a chunk


def test_every_configuration_that_pretrains_a_memory_is_a_row() -> None:
    shipped = {path for path in experiment.CONFIGS.rglob("*.toml") if "M-" in path.read_text(encoding="utf-8")}
    rows = experiment.rows()
    # Those of other experiments: two small models, and the quickstart's model once more.
    others = {experiment.CONFIGS / f"experiments/{name}.toml" for name in ("recipe_screen", "tnt", "language_model")}
    assert shipped == {row.base for row in rows.values()} | others
    assert {name.split(", ")[1] for name in rows if name.startswith("quickstart, ")} == set(PRESETS)


def test_a_cut_keeps_what_the_gradient_norm_depends_on() -> None:
    for row in experiment.rows().values():
        own, cut = load(row.base, row.words), load(row.base, experiment.cut(row))
        assert cut.model.seq_length == own.model.seq_length and cut.train.lr == own.train.lr
        assert cut.memory.heads == experiment.HEADS
        assert vars(cut.memory) | {"heads": own.memory.heads} == vars(own.memory)


def test_rows_that_differ_in_their_rate_alone_share_the_hundred_steps_of_the_largest() -> None:
    rows = experiment.rows()
    runs = experiment.shared(rows)
    assert set(runs) == set(rows)
    assert runs["configs/scale/7b.toml"] == runs["configs/scale/20m.toml"]
    assert runs["configs/quickstart.toml"] == runs["quickstart, atlas, 512 tokens"]
    assert runs["configs/atlas-340m-tnt.toml"] == "configs/atlas-340m-tnt.toml"
    for name, run in runs.items():
        own, shared = (load(row.base, experiment.cut(row)) for row in (rows[name], rows[run]))
        assert own.model == shared.model and own.train.lr <= shared.train.lr
        assert vars(own.memory) | {"preset": ""} == vars(shared.memory) | {"preset": ""}
    cells = experiment.jobs(rows)
    assert {experiment.hundred_cell(run) for run in runs.values()} <= set(cells)
    assert len([cell for cell in cells if cell.endswith("steps")]) == len(set(runs.values())) < len(rows)


# Writes of a chunk: retention starts by them.
@pytest.mark.parametrize(("preset", "writes"), [*((preset, 1) for preset in PRESETS), ("atlas", 4), ("atlas++", 4)])
def test_gradients_over_many_chunks_stay_within_the_bounds_before_the_first_step(
    preset: str, writes: int, tmp_path: Path
) -> None:
    (norm,) = norms_of(preset, 1, 0, tmp_path, writes)
    assert experiment.LOW < norm < experiment.HIGH


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "writes"), [("atlas", 1), ("titans", 1)])
def test_gradients_over_many_chunks_stay_within_the_bounds_for_a_hundred_steps(
    preset: str, writes: int, tmp_path: Path
) -> None:
    norms = norms_of(preset, experiment.STEPS, experiment.WARMUP, tmp_path, writes)
    assert len(norms) == experiment.STEPS
    assert max(norms) < experiment.HIGHEST


def norms_of(preset: str, steps: int, warmup: int, tmp_path: Path, writes: int) -> list[float]:
    """Gradient norms of a small model with the preset's own starts, CHUNKS chunks a sequence."""
    base = tiny_run.write(tmp_path, "M-M-")
    tokens = 1 if preset == "delta" else TOKENS
    words = [f"memory.preset={preset}", f"model.seq_length={CHUNKS * tokens}", f"memory.chunk={tokens}"]
    words += [f"train.steps={steps}", f"train.warmup_steps={warmup}", "train.validate_every=0", "data.validation=[]"]
    words += ["train.global_batch=1", "train.micro_batch=1", "train.stats_every=1000000", "checkpoint.every=1000"]
    if preset.startswith("atlas"):
        words.append(f"memory.ns_period={tokens // writes}")
    norms: list[float] = experiment.measured(base, words, tmp_path / "run")["grad_norm"]
    return norms


@pytest.mark.slow
def test_quick_leaves_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "QUICKSTART", tiny_run.write(tmp_path, "M-*-M-"))
    monkeypatch.setattr(experiment, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(experiment, "rows", lambda: {"tiny": experiment.Row(experiment.QUICKSTART)})
    words = ["--quick", "--out", str(tmp_path / "out")]
    assert experiment.main(words) == 0
    stored = (tmp_path / "out" / "shipped_gradients.json").read_text()
    assert len(json.loads(stored)["cells"]) == 2
    assert (tmp_path / "out" / "shipped_gradients.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "shipped_gradients.md").read_text()
    pages.hold(page)
    assert "| tiny | 32 |" in page
    assert experiment.main(words) == 0
    assert (tmp_path / "out" / "shipped_gradients.json").read_text() == stored
