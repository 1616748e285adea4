"""Pages of results: those that are committed, and what each experiment says of cells that are there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import (
    capacity,
    context_parallel,
    evaluation_chunk,
    language_model,
    layout_curves,
    long_context,
    mad,
    mqar,
    outer_gradient,
    recipe,
    scaling,
    shipped_gradients,
)
from experiments.shared import protocol
from experiments.shared.record import ROOT, Options, Record, Table, longer_said
from tests.support import pages

RESULTS = ROOT / "docs" / "results"
COMMITTED = sorted(page.name for page in RESULTS.glob("*.md"))


def stored(name: str, folder: Path) -> Record:
    """The committed results in a folder of their own, whatever their settings are."""
    shutil.copy(RESULTS / f"{name}.json", folder)
    settings = json.loads((RESULTS / f"{name}.json").read_text())["settings"]
    return Record(name, Options(quick=False, out=folder), settings)


def made_up(name: str, folder: Path, cells: dict[str, dict[str, Any]]) -> Record:
    """Results with these cells."""
    results = Record(name, Options(quick=True, out=folder), {})
    results.cells.update({cell: {"commit": "abc", **found} for cell, found in cells.items()})
    return results


def page_of(results: Record) -> str:
    """Its page, held to what every page is."""
    page = results.path.with_suffix(".md").read_text()
    pages.hold(page)
    return page


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_page_is_a_caption_a_picture_tables_and_short_paragraphs(name: str) -> None:
    page = (RESULTS / name).read_text()
    pages.hold(page)
    for kind in ("json", "png"):
        file = f"{name.removesuffix('.md')}.{kind}"
        assert f"({file})" in page and (RESULTS / file).is_file()


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.name)
def test_no_result_names_a_place_of_the_machine_that_made_it(file: Path) -> None:
    assert not re.search(r"=/\w|: \"/\w", file.read_text())


def test_every_experiment_is_a_row_of_the_table_with_its_page() -> None:
    folder = ROOT / "experiments"
    table = (folder / "README.md").read_text()
    commands = {file.stem for file in folder.glob("*.py") if "def main(" in file.read_text()}
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.py\) \|", table, re.MULTILINE)
    assert {name for name, _ in rows} == commands and all(name == file for name, file in rows)
    linked = re.findall(r"\(\.\./docs/results/([\w.]+)\)", table)
    assert sorted(linked) == COMMITTED


def _scaling(results: Record) -> None:
    kinds = scaling.kinds_of(results, tuple(scaling.KINDS), scaling.RUNGS)
    scaling.describe(results, kinds, scaling.RUNGS, scaling.OBSERVED)


DESCRIBED: dict[str, Callable[[Record], None]] = {
    "capacity": lambda results: capacity.describe(results, capacity.CONTENDERS, capacity.OBSERVED),
    "context_parallel": lambda results: context_parallel.describe(results, context_parallel.FULL),
    "layout_curves": lambda results: layout_curves.describe(
        results, tuple(layout_curves.LAYOUTS), layout_curves.START, layout_curves.STEPS, layout_curves.OBSERVED
    ),
    "scaling": _scaling,
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_committed_page_is_what_its_numbers_say(name: str, tmp_path: Path) -> None:
    results = stored(name, tmp_path)
    DESCRIBED[name](results)
    assert page_of(results) == (RESULTS / f"{name}.md").read_text()


def test_recipe(tmp_path: Path) -> None:
    cells: dict[str, dict[str, Any]] = {
        protocol.seed_cell(recipe.STAGE, "atlas", 1): {"bits_per_byte": 2.5, "largest_gradient_norm": 3.0},
        protocol.seed_cell(recipe.STAGE, "norm = layer", 1): {"bits_per_byte": None, "wrong": "status 1: nan"},
        protocol.seed_cell(recipe.STAGE, "titans", 1): {"bits_per_byte": 2.25, "largest_gradient_norm": 4.0},
    }
    results = made_up("recipe", tmp_path, cells)
    recipe.describe(results, ("atlas", "norm = layer", "titans"), (1, 2), 3, 91)
    page = page_of(results)
    assert "| titans | a member | 2.250 |  | -0.250 | one seed | 4 |" in page
    assert "status 1: nan" in page
    assert page.index("| titans |") < page.index("| atlas |") < page.index("| norm = layer |")


def test_language_model(tmp_path: Path) -> None:
    names, rates, seeds = ("atlas", "titans", "c = 1", language_model.EVERY_8), (1e-3, 2e-3), (1, 2)
    cells = {protocol.rate_cell("members", name, rate): {"bits_per_byte": 3 + rate} for name in names for rate in rates}
    reached = {"atlas": (2.0, 2.5), "titans": (1.75, 2.25), "c = 1": (2.25, 2.0), language_model.EVERY_8: (1.5, 2.0)}
    for name, found in reached.items():
        for seed, bits in zip(seeds, found, strict=True):
            cells[protocol.seed_cell("members", name, seed)] = {
                "bits_per_byte": bits, "words": ["train.steps=12", "train.lr=0.001"]
            }
    results = made_up("language_model", tmp_path, cells)
    compared = protocol.Protocol(language_model.BASE, (), 12, rates, seeds, tmp_path)
    language_model.describe(results, names, compared)
    page = page_of(results)
    assert "| titans | a write a token | 1.750 | 2.250 | 2.000 | -0.250 | every seed | 0.001 |" in page
    every_8, said = language_model.EVERY_8, " ".join(page.split())
    assert f"Better than atlas with every seed: titans; {every_8}. Seeds disagree, or are too few: c = 1." in said
    assert f"Worse than {every_8} with every seed: atlas; titans. Seeds disagree, or are too few: c = 1." in said
    assert "| titans | 3.001 | 3.002 | 0.001 |" in page and "| c = 1 | 3.001" not in page
    assert "After a quarter of the tokens, each at its best rate: atlas 3.001; titans 3.001" in page
    assert "runs have been made" not in page


def test_language_model_of_a_part_of_its_runs(tmp_path: Path) -> None:
    """Contenders without a run have no row and are named; a run that failed says why."""
    names, rates = ("atlas", "OmegaNet", "titans"), (1e-3, 2e-3)
    cells: dict[str, dict[str, Any]] = {
        protocol.rate_cell("members", name, rate): {"bits_per_byte": 3 + rate} for name in names for rate in rates
    }
    wrong = "status 1: atlas-train: step 94: gradient norm is nan, first seen in a gradient"
    cells[protocol.rate_cell("members", "OmegaNet", 2e-3)] = {"bits_per_byte": None, "wrong": wrong}
    cells[protocol.seed_cell("members", "OmegaNet", 1)] = {"bits_per_byte": 2.0}
    results = made_up("language_model", tmp_path, cells)
    language_model.describe(results, names, protocol.Protocol(language_model.BASE, (), 12, rates, (1, 2), tmp_path))
    page = page_of(results)
    assert "**1 of 6 runs have been made**" in page and "Not run yet: atlas; titans." in page
    assert "| OmegaNet | without Muon; a write a token | 2.000 |" in page and "| titans | a write" not in page
    assert "| OmegaNet | 3.001 | step 94: gradient norm is nan | 0.001 |" in page


def test_language_model_by_how_atlas_started_before(tmp_path: Path) -> None:
    """Starts that were tried before have a table of their own; none without them."""
    cells: dict[str, dict[str, Any]] = {protocol.seed_cell("members", "atlas", 1): {"bits_per_byte": 1.0}}
    assert language_model.former(made_up("language_model", tmp_path, cells)) == []
    cells["former: W2 1, a quarter"] = {"bits_per_byte": 1.75, "largest_gradient_norm": 6.25}
    cells["former: W2 4"] = {"bits_per_byte": 1.5, "largest_gradient_norm": 5.0}
    results = made_up("language_model", tmp_path, cells)
    compared = protocol.Protocol(language_model.BASE, (), 12, (1e-3,), (1,), tmp_path)
    language_model.describe(results, ("atlas",), compared)
    assert "| W2 4 | 1.500 | 5.0 |\n| W2 1, a quarter | 1.750 | 6.2 |" in page_of(results)


def test_rates_go_on_past_an_edge_that_is_the_best(tmp_path: Path) -> None:
    bits = {1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.5, 8e-3: 1.75}
    cells: dict[str, dict[str, Any]] = {
        protocol.rate_cell("members", "atlas", rate): {"bits_per_byte": bits[rate]} for rate in (1e-3, 2e-3)
    }
    cells[protocol.seed_cell("members", "atlas", 1)] = {"bits_per_byte": 1.0}
    results = made_up("language_model", tmp_path, cells)
    compared = protocol.Protocol(language_model.BASE, (), 12, (1e-3, 2e-3), (1,), tmp_path, further=2)
    for more in (4e-3, 8e-3):
        assert protocol.rates_of(results, "members", "atlas", compared)[-1] == more
        results.cells[protocol.rate_cell("members", "atlas", more)] = {"commit": "abc", "bits_per_byte": bits[more]}
    assert protocol.rates_of(results, "members", "atlas", compared) == sorted(bits)
    assert protocol.best_rate(results, "members", "atlas", compared) == 4e-3
    language_model.describe(results, ("atlas",), compared)
    page = page_of(results)
    assert "| atlas | 3.000 | 2.000 | 1.500 | 1.750 | 0.004 |" in page and "At the edge" not in page
    results.cells[protocol.rate_cell("members", "atlas", 8e-3)]["bits_per_byte"] = 1.25
    language_model.describe(results, ("atlas",), compared)
    assert "At the edge of the rates that were tried: atlas." in " ".join(page_of(results).split())


def test_rates_go_on_below_the_lowest_and_not_past_a_failure(tmp_path: Path) -> None:
    compared = protocol.Protocol(language_model.BASE, (), 12, (1e-3, 2e-3), (1,), tmp_path, further=2)
    lowest = {1e-3: {"bits_per_byte": 2.0}, 2e-3: {"bits_per_byte": 3.0}}
    failed = {1e-3: {"bits_per_byte": None, "wrong": "status 1: nan"}, 2e-3: {"bits_per_byte": None, "wrong": "nan"}}
    for name, cells, expected in (("atlas", lowest, [5e-4, 1e-3, 2e-3]), ("titans", failed, [1e-3, 2e-3])):
        given: dict[str, dict[str, Any]] = {protocol.rate_cell("members", name, r): cell for r, cell in cells.items()}
        results = made_up("language_model", tmp_path, given)
        assert protocol.rates_of(results, "members", name, compared) == expected


def test_long_context(tmp_path: Path) -> None:
    grid = replace(long_context.QUICK, contenders=("titans", "attention"))
    cells: dict[str, dict[str, Any]] = {}
    for name in grid.contenders:
        trained = {"contender": name, "seed": 1, "accuracy": [0.5, 0.75], "state_floats": 1024, "unwritten": [0.25]}
        cells[long_context.trained_cell(name, 1)] = trained
        for length in grid.samples:
            examples = [{"questions": [{"accuracy": 1.0}, {"accuracy": 0.0}]}]
            speed = {"tokens_per_second": 1500.0, "peak_bytes": 2**21, "tokens": length, "length": length}
            read = {"contender": name, "seed": 1, "length": length, "read": [{**speed, "examples": examples}]}
            cells[long_context.read_cell(name, 1, length)] = read
    results = made_up("long_context", tmp_path, cells)
    long_context.describe(results, grid, ("Nothing.",))
    page = page_of(results)
    assert "| titans | 1,024 | 75 | 50 | 50 | 2 | 2 | 1.5 | 1.5 | 25.00 |" in page
    assert "| contexts read, a seed |  |  | 2 | 2 |" in page and "have been made" not in page
    assert "Attention takes 2 times the steps." in " ".join(page.split())
    # A part says that it is one, and names the models of which nothing is known.
    del results.cells[long_context.read_cell("titans", 1, max(grid.samples))]
    part = "trainings and readings have been made**; the command goes on."
    long_context.describe(results, grid, ("Nothing.",))
    said = " ".join(page_of(results).split())
    assert f"**4 of 5 {part}" in said and "Not run yet" not in said
    for cell in [cell for cell in results.cells if cell.startswith("attention")]:
        del results.cells[cell]
    long_context.describe(results, grid, ("Nothing.",))
    assert f"**2 of 5 {part} Not run yet: attention." in " ".join(page_of(results).split())


@pytest.mark.parametrize("generator", [mad.record.OURS, mad.mad.SOURCE])
def test_mad(generator: str, tmp_path: Path) -> None:
    grid = replace(mad.FULL, sizes={"delta": 8, "attention": 0}, generator=generator)
    accuracy = {"delta": 0.5, "attention": None}
    cells = {
        mad.cell_name(mixer, task, 0): {"measured": {task: {"accuracy": accuracy[mixer]}}, "state_floats": 2048}
        for mixer in grid.sizes
        for task in grid.tasks()
    }
    results = made_up("mad", tmp_path, cells)
    mad.describe(results, grid, ())
    page = page_of(results)
    assert f"| delta | 2,048 |{' 50.0 |' * 6}" in page and f"| attention | 2,048 |{' diverged |' * 6}" in page
    assert ("the mean over the classes" in page) == (generator == mad.mad.SOURCE)


def test_mqar(tmp_path: Path) -> None:
    grid = replace(mqar.FULL, sizes={"delta": (8, 32), "attention": (0,)})
    cells = {}
    for mixer, sizes in grid.sizes.items():
        for size in sizes:
            for rate in grid.rates:
                measured = {str(pairs): {"accuracy": 10 * rate} for pairs in grid.shown}
                cells[mqar.cell_name(mixer, size, rate, 0)] = {"measured": measured, "state_floats": 4096}
    results = made_up("mqar", tmp_path, cells)
    mqar.describe(results, grid, ())
    page = page_of(results)
    assert "| delta | 32 | 4,096 | 0.02 | 20.0 | 20.0 | 20.0 |" in page
    assert "| any value of the context |  |  |  | 25.0 | 12.5 | 6.2 |" in page
    assert "Attention and sliding window take 3 times the steps." in page


def test_outer_gradient(tmp_path: Path) -> None:
    kinds, lengths = ("atlas", "titans"), (64, 128)
    cells: dict[str, dict[str, Any]] = {
        name: {"grad_norm": [1.5], "loss": [4.0, 3.0], "finite": True}
        for name in outer_gradient.jobs_of(kinds, lengths, 2)
    }
    cells[outer_gradient.before("titans", "exact", "0.99", 128)]["grad_norm"] = []
    cells[outer_gradient.after("titans", "exact")] = {"grad_norm": [], "loss": [4.0], "finite": False}
    results = made_up("outer_gradient", tmp_path, cells)
    outer_gradient.describe(results, kinds, lengths, 2, ())
    page = page_of(results)
    assert "| titans | 0.99 | exact | 1.5 | not finite |" in page
    assert "| titans | exact | not finite after 1 steps |  |" in page and "| atlas | damped | 3.500 | 1.5 |" in page


def test_shipped_gradients(tmp_path: Path) -> None:
    rows = dict(list(shipped_gradients.rows().items())[:2])
    kept, outside = rows
    cells = {shipped_gradients.hundred_cell(name): {"grad_norm": [1.0, 2.0], "finite": True} for name in rows}
    cells[shipped_gradients.first_cell(outside)] = {"grad_norm": [20.0]}
    results = made_up("shipped_gradients", tmp_path, cells)
    shipped_gradients.describe(results, rows)
    page = page_of(results)
    assert f"Outside of them: {outside}." in " ".join(page.split())
    assert "| 20.00 | 1.00 | 2.00 |" in page and page.count(f"| {kept} |") == 1


def test_evaluation_chunk(tmp_path: Path) -> None:
    grid = replace(evaluation_chunk.QUICK, chunks=(1, 8, 32), seeds=(1, 2))
    cells: dict[str, dict[str, Any]] = {}
    for seed, more in ((1, 0.0), (2, 0.5)):
        bits = {"1": 3.0 + more, "8": 2.25 + more, "32": 2.0 + more}
        cells[evaluation_chunk.first_cell("Titans", seed)] = {"bits_per_byte": bits}
        cells[evaluation_chunk.second_cell("Titans", seed, 32)] = {"bits_per_byte": {**bits, "8": 2.125 + more}}
        cells[evaluation_chunk.second_cell("Titans", seed, 8)] = {"bits_per_byte": {**bits, "8": 1.875 + more}}
        cells[evaluation_chunk.first_cell("ATLAS", seed)] = {"wrong": "status 1: nan"}
    results = made_up("evaluation_chunk", tmp_path, cells)
    evaluation_chunk.describe(results, grid)
    page = page_of(results)
    assert "| Titans | trained at 32 | 3.250 | 2.500 | 2.250 |" in page
    assert "| Titans | then at 8 | 3.250 | 2.125 | 2.250 |" in page and "| ATLAS |" not in page
    said = " ".join(page.split())
    assert "Titans reads best at chunk 32; from chunk 32 its bits differ by +1.000 at 1, +0.250 at 8 and +0.000" in said
    assert "at 8, read there, has 2.125. The control has 2.375 there and 2.250 at its own chunk." in said
    assert "ATLAS, seed 1 (status 1: nan)" in said and "means of 2 seeds" in said


def test_a_table_refuses_a_row_of_other_length_and_aligns_numbers() -> None:
    with pytest.raises(ValueError, match="row of 'b' has 1 cells, its head 2"):
        Table(("name", "size"), [("a", "1"), ("b",)])
    rows = [("M-|*-", "1,024", "1"), ("x", "", "none"), ("y", "-2.5e+03", "")]
    head, rule, first, *_ = Table(("name", "size", "other"), rows).markdown().splitlines()
    assert (head, rule) == ("| name | size | other |", "| --- | ---: | --- |")
    assert first == r"| M-\|*- | 1,024 | 1 |"


def test_no_line_of_a_paragraph_begins_a_list(tmp_path: Path) -> None:
    for length in range(90, 115):
        results = made_up("trial", tmp_path, {"one": {}})
        said = [f"{'x' * length} - 1 + 2 and 1. So it ends", f"{'y' * length} 1) * 3"]
        results.write_text("Trial", "A caption.", [Table(("a",), [("1",)]), *said])
        page_of(results)


def test_models_of_more_steps_are_said_together() -> None:
    assert longer_said({"attention": 3, "sliding window": 3, "delta": 2}) == (
        "Attention and sliding window take 3 times the steps. Delta takes 2 times the steps."
    )
    assert longer_said({}) == ""
