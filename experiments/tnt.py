"""Memories that reset: TNT's hierarchy (arXiv 2511.07343) on one long sequence, its ablations, the time to one loss.

    base      one memory, at several chunks: fresh anchors learn more a token, and wait for each other
    TNT       a global memory of chunk 256 that is read at its chunk's start, and one to three local memories of small
              chunks, which begin anew every 1,024 tokens
    ablation  without the global memory, and with queries moved into the span of their shard's keys
    stage 2   the last weights, trained for a tenth of the steps more at local chunks a quarter as long

All models have the parameters of the first, within 1 %. A cell is kept as it ends: interrupt it and call it again. The
base at chunk 8 takes ten minutes on a core, the others two to six.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median

from matplotlib import pyplot

from atlas_megatron.config import load
from atlas_megatron.training.metrics import read
from experiments import recipe
from experiments.shared import protocol, record
from experiments.shared.protocol import Contender, Protocol

BASE = record.ROOT / "configs" / "experiments" / "tnt.toml"
RUNS = record.ROOT / "runs" / "experiments" / "tnt"
STAGE = "tnt"
SEEDS = (1, 2, 3)
STEPS = 200
EVERY = 25  # steps between validations
SECOND = 10  # stage 2 takes one step for so many of stage 1
SHARD = 1024  # tokens: a quarter of the sequence, as in TNT's quality runs
DAMPED = "memory.anchor_gradient=0.3"
GLOBAL = "memory.read=chunk"


def _locals(*chunks: int) -> str:
    return "memory.locals=[" + ", ".join(f'"{chunk}/{SHARD}"' for chunk in chunks) + "]"


CONTENDERS: dict[str, Contender] = {
    "base, chunk 256": Contender((), "one memory"),
    "base, chunk 64": Contender(("memory.chunk=64",), "fresher anchors"),
    # The exact outer gradient is a product of one Jacobian a chunk. Over 256 and 512 of them it overflowed at steps 149
    # and 71 of the first seed.
    "base, chunk 16, damped": Contender(("memory.chunk=16", DAMPED), "fresher anchors"),
    "base, chunk 8, damped": Contender(("memory.chunk=8", DAMPED), "the freshest, and the slowest"),
    "TNT {8}": Contender((GLOBAL, _locals(8)), "a global memory and one local"),
    "TNT {8}, with projection": Contender((GLOBAL, _locals(8), "memory.projection=true"), "the projection"),
    "TNT {8}, without global": Contender(("memory.chunk=8", f"memory.shard={SHARD}"), "the global memory: reset alone"),
    "TNT {8, 16}": Contender((GLOBAL, _locals(8, 16)), "two local memories"),
    "TNT {4, 8, 16}": Contender((GLOBAL, _locals(4, 8, 16)), "three local memories"),
    "TNT {16}": Contender((GLOBAL, _locals(16)), "the local chunk"),
}
# Stage 2 of a contender: the local chunks that it goes on with.
SECOND_STAGES = {"TNT {8}": (2,), "TNT {8, 16}": (2, 4)}
QUICK = ("base, chunk 256", "TNT {8}")
OBSERVED = (
    "As in TNT's Table 3, more local memories are better: two improve on one and three on two, in the mean. Two and "
    "three are ahead of the base at chunk 256 with every seed. Three are ahead of the base at chunk 8 too, and need no "
    "damping.",
    "A memory of chunk 8 that begins anew every 1,024 tokens (*without global*) is nearly level with the base at chunk "
    "8. It takes half the time a step. It needs no damping either: its outer gradient ends with its shard.",
    "Unlike in TNT's Table 3 the global memory adds nothing beside one local. The likeliest reason: a chunk of 256 "
    "writes with steps that sum to a tenth, so it holds little, and the sum of both reads is noisier than one. Steps "
    "eight times as large made the base at chunk 256 worse (a trial of one seed and 100 steps, not in the JSON).",
    "The projection costs bits with two seeds of three, where it helped TNT. Keys start here as the queries of the "
    "token before, so queries lie in the keys' span already, and Pi turns them towards its commonest directions. "
    "Shards of 256 tokens were 0.05 bits behind shards of 1,024 (such a trial too).",
    "The second stage has a tenth more steps than the first, at a smaller chunk. It ends ahead of the first with every "
    "seed. No control with the same further steps at the first chunk was run.",
    "TNT's seventeenfold speed is of a TPU that its base leaves idle. Two CPU cores have nothing idle: what is saved "
    "here is work alone.",
)
SLOWEST = "base, chunk 8, damped"
TIMED = (SLOWEST, "base, chunk 16, damped", "base, chunk 64", "TNT {8}", "TNT {8}, without global", "TNT {16}")
# The time of a step is measured apart, one model at a time and in turns, for a machine is never equally busy for hours.
ROUNDS = 3
TIMED_STEPS = 8


def trained(base: Path, words: list[str], directory: Path, keep: bool = False) -> record.Cell:
    """As `protocol.trained`, with the bits at each validation: [steps, bits]."""
    # What an interrupted run left would be resumed, and its steps be missing here.
    shutil.rmtree(directory, ignore_errors=True)
    found = protocol.trained(base, words, directory, keep=True)
    if found["bits_per_byte"] is not None:
        validated = [r for r in read(directory) if "validation_bits_per_byte" in r]
        found["curve"] = [[r["step"], round(r["validation_bits_per_byte"], 4)] for r in validated]
    if not keep:
        shutil.rmtree(directory, ignore_errors=True)
    return found


def timed(base: Path, words: list[str], directory: Path) -> record.Cell:
    """The seconds of each step of a short run, but for the first, which compiles and allocates."""
    shutil.rmtree(directory, ignore_errors=True)
    short = [f"train.steps={TIMED_STEPS}", "train.warmup_steps=1", f"train.validate_every={TIMED_STEPS}"]
    found = protocol.trained(base, [*words, *short, "train.validate_sequences=1"], directory, keep=True)
    if "wrong" not in found:
        found = {"step_seconds": [round(r["step_seconds"], 4) for r in read(directory)[1:]]}
    shutil.rmtree(directory, ignore_errors=True)
    return found


def second_stage(base: Path, first: list[str], words: list[str], directory: Path) -> record.Cell:
    """Stage 1 again where its weights are gone, then stage 2 from them."""
    if not (directory / "checkpoints").is_dir():
        trained(base, first, directory, keep=True)
    found = trained(base, [*words, f"train.start_from={directory}"], directory.with_name(f"{directory.name}_second"))
    shutil.rmtree(directory, ignore_errors=True)
    return found


def jobs(comparison: Protocol, names: Sequence[str], seed: int, stage: int) -> dict[str, partial[record.Cell]]:
    """Every run of a seed in stage 1, or in stage 2, by its cell's name."""
    found: dict[str, partial[record.Cell]] = {}
    base, steps = comparison.base, comparison.steps
    for name in names:
        directory, words = comparison.runs / f"{_plain(name)}_{seed}", words_of(comparison, name, seed)
        if stage == 1:
            job = partial(trained, base, words, directory, name in SECOND_STAGES)
            found[protocol.seed_cell(STAGE, name, seed)] = job
        elif name in SECOND_STAGES:
            more = max(1, steps // SECOND)
            length = [f"train.steps={more}", "train.warmup_steps=0", f"train.validate_every={more}"]
            later = [*words, *length, "train.lr=1e-3", "train.min_lr=1e-4", _locals(*SECOND_STAGES[name])]
            found[protocol.seed_cell(STAGE, _second(name), seed)] = partial(second_stage, base, words, later, directory)
    return found


def time_steps(results: record.Record, comparison: Protocol, names: Sequence[str], rounds: int) -> None:
    """Time every contender in turns, one process at a time."""
    for turn, name in product(range(1, rounds + 1), names):
        words, directory = words_of(comparison, name, comparison.seeds[0]), comparison.runs / f"{_plain(name)}_time"
        job = partial(timed, comparison.base, words, directory)
        record.side_by_side(results, {time_cell(name, turn): job})


def words_of(comparison: Protocol, name: str, seed: int) -> list[str]:
    first = CONTENDERS[next(iter(CONTENDERS))]
    words = comparison.words_of(CONTENDERS[name], first, comparison.steps, seed, None)
    return [*words, f"train.validate_every={EVERY}"]


def time_cell(name: str, turn: int) -> str:
    return f"time: {name}, round {turn}"


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _second(name: str) -> str:
    chunks = ", ".join(map(str, SECOND_STAGES[name]))
    return f"{name}, stage 2 {{{chunks}}}"


def all_names(names: Sequence[str]) -> list[str]:
    """The rows: contenders, each with its second stage behind it."""
    return [row for name in names for row in (name, *([_second(name)] if name in SECOND_STAGES else []))]


def seconds_a_step(results: record.Record, name: str) -> float | None:
    """The median of all timed steps of a contender; None: not timed."""
    cells = (results.cells.get(time_cell(name, turn), {}) for turn in range(1, ROUNDS + 1))
    steps = [seconds for cell in cells for seconds in cell.get("step_seconds", ())]
    return median(steps) if steps else None


def steps_to(cell: record.Cell, bits: float) -> float | None:
    """Steps of training until so many bits are reached, between validations in a straight line; None: never."""
    curve = cell.get("curve") or []
    for (before, high), (step, low) in zip(curve, curve[1:], strict=False):
        if low <= bits <= high:
            return float(before + (step - before) * (high - bits) / (high - low))
    return None


def time_to(results: record.Record, name: str, seeds: Sequence[int], bits: float | None) -> float | None:
    """Seconds of training until so many bits, the median of the seeds that reach them; None: none does, or untimed."""
    seconds = seconds_a_step(results, name)
    if bits is None or seconds is None:
        return None
    found = [steps for cell in cells_of(results, name, seeds) if (steps := steps_to(cell, bits)) is not None]
    return median(found) * seconds if found else None


def cells_of(results: record.Record, name: str, seeds: Sequence[int]) -> list[record.Cell]:
    return [results.cells.get(protocol.seed_cell(STAGE, name, seed), {}) for seed in seeds]


def common_loss(results: record.Record, seeds: Sequence[int]) -> float | None:
    """The highest of what the timed ones reach: all of them pass it."""
    reached = [protocol.reached(results, STAGE, name, seeds) for name in TIMED]
    known = [mean([b for b in found if b is not None]) for found in reached if any(b is not None for b in found)]
    return max(known) if known else None


def draw(results: record.Record, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Left: the loss against the time of training. Right: every contender's loss."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for name in (n for n in TIMED if n in names):
        cells = [cell for cell in cells_of(results, name, seeds) if cell.get("curve")]
        second = seconds_a_step(results, name)
        if cells and second is not None:
            steps = [step for step, _ in cells[0]["curve"]]
            bits = [mean(cell["curve"][i][1] for cell in cells) for i in range(len(steps))]
            style = "-" if name.startswith("TNT") else "--"
            left.plot([step * second for step in steps], bits, style, marker=".", label=name)
    left.set(xlabel="seconds of training on one core", ylabel="validation bits per byte", xscale="log")
    left.minorticks_off()
    left.set_xticks((20, 50, 100, 200), ("20", "50", "100", "200"))
    left.legend(fontsize="small")
    rows = all_names(names)
    for row, name in enumerate(rows):
        found = [b for b in protocol.reached(results, STAGE, name, seeds) if b is not None]
        right.plot(found, [row] * len(found), "o", color="C0", alpha=0.6, markersize=4)
        if found:
            right.plot([mean(found)] * 2, [row - 0.3, row + 0.3], color="C0", linewidth=2)
    right.set_yticks(range(len(rows)), rows, fontsize="small")
    right.invert_yaxis()
    right.set_xlabel("validation bits per byte (dots: seeds)")
    results.save_figure(figure)


def table(results: record.Record, names: Sequence[str], seeds: Sequence[int]) -> record.Table:
    """Of every row its seeds, how far it is from the base and from TNT {8}, its speed, its time to the common loss."""
    base, one = (protocol.reached(results, STAGE, name, seeds) for name in QUICK)
    bits, rows = common_loss(results, seeds), []
    for name in all_names(names):
        found = protocol.reached(results, STAGE, name, seeds)
        own = cells_of(results, name, seeds)
        known = [b for b in found if b is not None]
        others = zip(QUICK, (base, one), strict=True)
        apart = [protocol.apart(other, found) if name != first else None for first, other in others]
        said = ("" if a is None else f"{a[0]:+.3f}{'' if a[1] == 'every seed' else ' (' + a[1] + ')'}" for a in apart)
        seconds, time = seconds_a_step(results, name), time_to(results, name, seeds, bits) if name in TIMED else None
        said_of = ("failed" if "wrong" in cell else "" for cell in own)
        by_seed = (word if b is None else f"{b:.3f}" for b, word in zip(found, said_of, strict=True))
        average = f"{mean(known):.3f}" if known else ""
        speed = "" if seconds is None else f"{seconds:.2f}"
        rows.append((name, *by_seed, average, *said, speed, "" if time is None else f"{time:,.0f}"))
    measured = ("mean", "from base", "from TNT {8}", "s a step", "s to one loss")
    return record.Table(("model", *(f"seed {seed}" for seed in seeds), *measured), rows)


def describe(
    results: record.Record, names: Sequence[str], comparison: Protocol, observed: Sequence[str] = ()
) -> None:
    """The page, from the numbers. observed: paragraphs of what was seen."""
    config = load(comparison.base, comparison.words)
    tokens = comparison.steps * config.train.global_batch * config.model.seq_length
    bits = common_loss(results, comparison.seeds)
    results.write_text(
        "Memories that reset: TNT's hierarchy",
        f"Bits per byte of held-out Python sources after {tokens:,} bytes in {comparison.steps} steps of one sequence "
        f"of {config.model.seq_length:,}, from {record.seeds_said(comparison.seeds)}. Memories are OmegaNet's, with a "
        f"window of {config.memory.window}. Models have {protocol.parameters(config):,} parameters, equal within 1 %, "
        "and one learning rate. *TNT {8}*: a global memory of chunk 256, read at its chunk's start, and a local one of "
        f"chunk 8 that begins anew every {SHARD:,} tokens. {_missing(results, names, comparison.seeds)}",
        [
            table(results, names, comparison.seeds),
            "*From*: the row's bits less those of the base at chunk 256, and of TNT {8}; less than zero is better, and "
            "a difference counts where it has one sign in every seed. *Damped*: memory.anchor_gradient=0.3, without "
            f"which the outer gradient overflows. *s to one loss*: seconds of training until {bits or 0:.3f} bits, "
            "which all of those reach. Steps are timed apart, one model at a time on one core, in "
            f"{ROUNDS} rounds of {TIMED_STEPS - 1}; the median counts.",
        ],
        [*seen(results, comparison.seeds), *observed],
    )


def _missing(results: record.Record, names: Sequence[str], seeds: Sequence[int]) -> str:
    wanted = [protocol.seed_cell(STAGE, name, seed) for name in all_names(names) for seed in seeds]
    missing = [cell for cell in wanted if cell not in results.cells]
    if not missing:
        return ""
    return f"{len(missing)} of {len(wanted)} runs are not trained yet: not all means are of the same seeds."


def seen(results: record.Record, seeds: Sequence[int]) -> list[str]:
    """How much sooner than the base at chunk 8 the others reach the common loss."""
    bits = common_loss(results, seeds)
    times = {name: time for name in TIMED if (time := time_to(results, name, seeds, bits)) is not None}
    slowest = times.get(SLOWEST)
    if slowest is None or len(times) == 1:
        return []
    said = record.listed(f"{name} {slowest / time:.1f}" for name, time in times.items() if name != SLOWEST)
    return [f"Times as fast as {SLOWEST}, to {bits:.3f} bits: {said}."]


def main(words: Sequence[str] | None = None) -> int:
    """Train what is missing, then draw and describe."""

    def experiment() -> None:
        asked = record.options("tnt", __doc__ or "", words, reports=True)
        names = QUICK if asked.quick else tuple(CONTENDERS)
        seeds, steps = ((1,), 3) if asked.quick else (SEEDS, STEPS)
        more = ("train.validate_sequences=1", f"model.seq_length={SHARD}") if asked.quick else ()
        comparison = Protocol(BASE, more, steps, (), seeds, RUNS)
        results = record.Record("tnt", asked, {"steps": steps, "base": BASE.read_text(encoding="utf-8")})
        if not asked.report:
            recipe.prepare_bytes()
            for stage, seed in product((1, 2), seeds):
                record.side_by_side(results, jobs(comparison, names, seed, stage))
            time_steps(results, comparison, names, 1 if asked.quick else ROUNDS)
        draw(results, names, seeds)
        describe(results, names, comparison, () if asked.quick else OBSERVED)

    return record.run("tnt", experiment)


if __name__ == "__main__":
    sys.exit(main())
