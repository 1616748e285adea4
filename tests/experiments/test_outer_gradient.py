"""The outer-gradient experiment: every pair of cells differs in what it compares alone, and its quick form runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atlas_megatron.config import load
from experiments import outer_gradient as experiment
from tests.support import pages, tiny_run


def test_pairs_differ_in_the_order_alone() -> None:
    jobs = experiment.jobs_of(tuple(experiment.KINDS), experiment.LENGTHS, experiment.STEPS)
    compared = 0
    for name, job in jobs.items():
        words = job.args[1]
        assert load(experiment.BASE, words).train.global_batch * load(experiment.BASE, words).model.seq_length == 4096
        if ", exact" in name:
            for order, share in (("damped", "0.3"), ("first order", "0")):
                other = jobs[name.replace("exact", order)].args[1]
                assert set(words) ^ set(other) == {"memory.anchor_gradient=1", f"memory.anchor_gradient={share}"}
                compared += 1
    assert compared == len(jobs) - 1 - compared // 2  # all but attention


@pytest.mark.slow
def test_quick_leaves_results_and_does_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "BASE", tiny_run.write(tmp_path, "M-*-M-"))
    monkeypatch.setattr(experiment, "RUNS", tmp_path / "runs")
    words = ["--quick", "--out", str(tmp_path / "out")]
    assert experiment.main(words) == 0
    stored = (tmp_path / "out" / "outer_gradient.json").read_text()
    cells = json.loads(stored)["cells"]
    assert len(cells) == 2 * 2 * 3 + 4 and all(cell["finite"] for cell in cells.values())
    assert (tmp_path / "out" / "outer_gradient.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "outer_gradient.md").read_text()
    pages.hold(page)
    assert "first order" in page
    assert experiment.main(words) == 0
    assert (tmp_path / "out" / "outer_gradient.json").read_text() == stored
