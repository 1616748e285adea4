"""One memory, read with other chunks than it was trained with; and a short second stage at a smaller one.

TNT's Figure 2 (arXiv 2511.07343) shows a deep memory of Titans to work only near the chunk of its training. Here ATLAS,
OmegaNet and Titans train at one chunk. Then each checkpoint reads the same held-out text with every chunk from one
token to the whole sequence. A token still writes as it was trained to (`config.at_chunk`). What differs is how old the
weights are at which gradients are taken.

The second stage goes on from the weights for a tenth of the steps, at a smaller chunk, down to one token. The control
takes the same further steps at the chunk of the first. The text is that of `recipe.py`, and is made at the first call.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

from matplotlib import pyplot

from atlas_megatron.config import load
from experiments.recipe import BASE, prepare_bytes
from experiments.shared import record

RUNS = record.ROOT / "runs" / "experiments" / "evaluation_chunk"
MEMBERS = {"ATLAS": "atlas", "OmegaNet": "omeganet", "Titans": "titans"}
CHUNK = 32  # of the first stage
RETENTION, STEP = 0.99, 0.01  # of ATLAS, at the start; the defaults when the committed runs were made
SECOND = (32, 8, 1)  # of the second; the first one is the control
COMMON = ("log.tensorboard=false", "train.stats_every=1000000")


@dataclass(frozen=True)
class Grid:
    """How much is trained and read, and where. second_rate: the learning rate of a second stage, which begins anew."""

    tokens: int = 512  # of a sequence
    batch: int = 4  # sequences a step
    steps: int = 250
    second_steps: int = 25
    second_rate: float = 1e-3
    sequences: int = 32  # of held-out text, that every chunk reads
    chunks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    seeds: tuple[int, ...] = (1, 2, 3)
    second: tuple[int, ...] = SECOND
    base: Path = BASE
    runs: Path = RUNS

    def directory(self, member: str, seed: int, chunk: int) -> Path:
        """Of the first stage (chunk 0), or of the second one at a chunk."""
        return self.runs / f"{MEMBERS[member]}_{seed}{f'_then_{chunk}' if chunk else ''}"


FULL = Grid()
QUICK = Grid(64, 2, 4, 3, 1e-3, 4, (1, 8, 32, 64), (1,), (32, 8))


def first_cell(member: str, seed: int) -> str:
    return f"{member}, seed {seed}"


def second_cell(member: str, seed: int, chunk: int) -> str:
    return f"{member}, seed {seed}, then chunk {chunk}"


def words_of(member: str, seed: int, grid: Grid, chunk: int) -> list[str]:
    """Of a run of either stage. ATLAS writes once a chunk, as the base has it."""
    orthogonal = load(grid.base, [f"memory.preset={MEMBERS[member]}"]).memory.ns_steps > 0
    period, kept = (chunk, RETENTION) if orthogonal else (1, 0.0)
    words = [f"memory.preset={MEMBERS[member]}", f"memory.chunk={chunk}", f"memory.ns_period={period}"]
    words += [f"memory.alpha_start={kept}", f"memory.eta_per_token={STEP}"]
    # The graph of a write at each of 512 tokens takes 19 GB in a batch of four, for ATLAS.
    micro_batch = 1 if chunk == 1 else grid.batch
    words += [f"model.seq_length={grid.tokens}", f"train.global_batch={grid.batch}", f"train.micro_batch={micro_batch}"]
    return [*words, *COMMON, f"train.validate_sequences={grid.sequences}", f"run.seed={seed}"]


def lasting(steps: int) -> list[str]:
    """The words of a run of so many steps."""
    words = [f"train.steps={steps}", f"train.warmup_steps={steps // 10}", f"train.validate_every={steps}"]
    return [*words, f"checkpoint.every={max(1, steps // 4)}"]


def first(member: str, seed: int, grid: Grid) -> record.Cell:
    """Train the first stage, and read it with every chunk."""
    return _trained(grid.directory(member, seed, 0), [*words_of(member, seed, grid, CHUNK), *lasting(grid.steps)], grid)


def second(member: str, seed: int, chunk: int, grid: Grid) -> record.Cell:
    """Go on from the first stage, and read what comes of it with every chunk."""
    source = grid.directory(member, seed, 0)
    rate = [f"train.lr={grid.second_rate}", f"train.min_lr={grid.second_rate / 10}", f"train.start_from={source}"]
    words = [*words_of(member, seed, grid, chunk), *lasting(grid.second_steps), *rate]
    return _trained(grid.directory(member, seed, chunk), words, grid)


def _trained(directory: Path, words: list[str], grid: Grid) -> record.Cell:
    """Bits per byte by chunk, and the words of the run; or what went wrong."""
    status = record.train_quietly([str(grid.base), *words, f"run.directory={directory}"], directory)
    if status:
        last = (directory / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1]
        return {"wrong": f"status {status}: {last}", "words": words}
    return {"bits_per_byte": read_at(directory, grid), "words": words}


def read_at(directory: Path, grid: Grid) -> dict[str, float]:
    """Bits per byte of a run's validation sequences, read with each chunk."""
    from atlas_megatron.evaluate.chunks import measured, of_validation
    from atlas_megatron.evaluate.perplexity import summary
    from atlas_megatron.inference.reader import open_reader
    from atlas_megatron.parallel import world

    try:
        reader = open_reader(directory)
        rows = of_validation(reader.config, str(directory), grid.sequences).tokens
        found = {}
        for chunk in grid.chunks:
            bits = summary([measured(reader.at_chunk(chunk), rows)])["bits_per_byte"]
            assert bits is not None
            found[str(chunk)] = round(bits, 5)
        return found
    finally:
        world.leave()


def train(results: record.Record, grid: Grid) -> None:
    """Every cell that is missing, seed by seed; the dearest second stage, of one token, last."""
    for seed in grid.seeds:
        jobs = {first_cell(member, seed): partial(first, member, seed, grid) for member in MEMBERS}
        record.side_by_side(results, jobs)
    for chunk in grid.second:
        for seed in grid.seeds:
            whole = [member for member in MEMBERS if "wrong" not in results.cells[first_cell(member, seed)]]
            jobs = {second_cell(member, seed, chunk): partial(second, member, seed, chunk, grid) for member in whole}
            record.side_by_side(results, jobs)


def curves(results: record.Record, member: str, grid: Grid) -> dict[str, list[dict[int, float]]]:
    """By stage: bits per byte by chunk, of each seed that trained to its end."""
    stages = {f"trained at {CHUNK}": [first_cell(member, seed) for seed in grid.seeds]}
    for chunk in grid.second:
        stages[f"then at {chunk}"] = [second_cell(member, seed, chunk) for seed in grid.seeds]
    found = {}
    for stage, names in stages.items():
        cells = [results.cells.get(name, {}).get("bits_per_byte") for name in names]
        found[stage] = [{int(chunk): bits for chunk, bits in cell.items()} for cell in cells if cell]
    return {stage: seeds for stage, seeds in found.items() if seeds}


def averaged(seeds: Sequence[dict[int, float]]) -> dict[int, float]:
    return {chunk: mean(one[chunk] for one in seeds) for chunk in seeds[0]}


def draw(results: record.Record, grid: Grid) -> None:
    """A panel a member: the mean of the seeds of each stage against the chunk; every seed as a dot."""
    with pyplot.style.context(record.STYLE):
        figure, panels = pyplot.subplots(1, len(MEMBERS), figsize=(13, 4.2), layout="constrained", sharey=True)
        for axes, member in zip(panels, MEMBERS, strict=True):
            for number, (stage, seeds) in enumerate(curves(results, member, grid).items()):
                middle = averaged(seeds)
                axes.plot(list(middle), list(middle.values()), color=f"C{number}", label=stage)
                for one in seeds:
                    axes.plot(list(one), list(one.values()), "o", color=f"C{number}", markersize=2.5, alpha=0.6)
            axes.axvline(CHUNK, color="grey", linestyle=":", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_xticks(grid.chunks, list(map(str, grid.chunks)), fontsize="small")
            axes.minorticks_off()
            axes.set_title(member)
            axes.set_xlabel("chunk that the model is read with (tokens)")
        panels[0].set_ylabel("validation bits per byte")
        panels[0].legend()
        results.save_figure(figure)


def table(results: record.Record, grid: Grid) -> record.Table:
    """A row a member and stage: the mean of the seeds at each chunk."""
    rows = []
    for member in MEMBERS:
        for stage, seeds in curves(results, member, grid).items():
            rows.append((member, stage, *(f"{bits:.3f}" for bits in averaged(seeds).values())))
    return record.Table(("memory", "stage", *map(str, grid.chunks)), rows)


def seen(results: record.Record, grid: Grid) -> list[str]:
    """What another chunk costs each member, and what a second stage changes beside its control."""
    said = []
    control = grid.second[0]
    for member in MEMBERS:
        found = {stage: averaged(seeds) for stage, seeds in curves(results, member, grid).items()}
        start = found.get(f"trained at {CHUNK}")
        if start is None:
            continue
        best = min(start, key=lambda chunk: start[chunk])
        others = [chunk for chunk in (grid.chunks[0], 8, grid.chunks[-1]) if chunk in start]
        apart = record.listed(f"{start[chunk] - start[CHUNK]:+.3f} at {chunk}" for chunk in others)
        said.append(f"{member} reads best at chunk {best}; from chunk {CHUNK} its bits differ by {apart}.")
        for chunk in grid.second[1:]:
            after, more = found.get(f"then at {chunk}"), found.get(f"then at {control}")
            if after and more:
                said[-1] += (
                    f" A second stage at {chunk}, read there, has {after[chunk]:.3f}. The control has "
                    f"{more[chunk]:.3f} there and {more[CHUNK]:.3f} at its own chunk."
                )
    return said


def describe(results: record.Record, grid: Grid) -> None:
    """The page, from the numbers."""
    config = load(grid.base, words_of("ATLAS", 1, grid, CHUNK))
    wrong = [f"{name} ({cell['wrong']})" for name, cell in results.cells.items() if "wrong" in cell]
    failed = f" Runs that did not train to their end: {'; '.join(wrong)}." if wrong else ""
    results.write_text(
        "One memory, read with other chunks",
        f"Bits per byte of held-out Python sources, {grid.sequences} sequences of {grid.tokens} bytes, by the chunk "
        f"that a checkpoint is read with; means of {record.seeds_said(grid.seeds)}. Models have the pattern "
        f"{config.model.pattern} and are {config.model.hidden_size} wide. They train at chunk {CHUNK} for {grid.steps} "
        f"steps of {grid.batch * grid.tokens:,} bytes. *Then at*: a second stage of {grid.second_steps} steps more at "
        f"that chunk, with weights alone taken and a learning rate of {grid.second_rate:g}. The one at "
        f"{grid.second[0]} is the control.{failed}",
        [table(results, grid)],
        seen(results, grid),
    )


def main(words: Sequence[str] | None = None) -> int:
    """Train what is missing, then draw and describe."""

    def experiment() -> None:
        asked = record.options("evaluation_chunk", __doc__ or "", words, reports=True)
        grid = QUICK if asked.quick else FULL
        settings = {**vars(grid), "chunk": CHUNK, "base": grid.base.read_text(encoding="utf-8")}
        # Second stages at more chunks may come, and runs may lie elsewhere.
        del settings["second"], settings["runs"]
        results = record.Record("evaluation_chunk", asked, settings)
        if not asked.report:
            prepare_bytes()
            train(results, grid)
        draw(results, grid)
        describe(results, grid)

    return record.run("evaluation_chunk", experiment)


if __name__ == "__main__":
    sys.exit(main())
