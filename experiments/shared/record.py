"""What an experiment leaves behind: a JSON that grows cell by cell, a picture, a page; and how it is started."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from atlas_megatron import train
from atlas_megatron.cli.ending import command
from atlas_megatron.reports.results import Cell as Cell
from atlas_megatron.reports.results import Results
from atlas_megatron.reports.style import STYLE as STYLE
from atlas_megatron.reports.style import save

SEEN = "## What was seen"
ROOT = Path(__file__).resolve().parents[2]
OURS = "ours"  # the generator of an experiment's sequences, where nothing else is said
NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?")
# At the beginning of a line these would make a list or a heading of a paragraph's words.
MARKS = re.compile(r" (?=([-+*>#]+|\d+[.)])( |$))")


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line.

    report: draw and describe only what is there. generator, passes: who draws the sequences, and how often pairs are
    told.
    """

    quick: bool
    out: Path
    report: bool = False
    generator: str = OURS
    passes: int = 1

    @property
    def words(self) -> str:
        """The options as words of the command line, without `--out` and `--report`."""
        said = [] if self.generator == OURS else ["--generator", self.generator]
        said += [] if self.passes == 1 else ["--passes", str(self.passes)]
        return " ".join(["", *(["--quick"] if self.quick else []), *said])

    @property
    def suffix(self) -> str:
        """What the results' name has after the experiment's: the generator and the passes, where they are not ours."""
        return ("" if self.generator == OURS else f"_{self.generator}") + (
            "" if self.passes == 1 else f"_{self.passes}_passes"
        )


def options(
    name: str,
    description: str,
    words: Sequence[str] | None,
    *,
    reports: bool = False,
    generators: Sequence[str] = (),
    passes: bool = False,
) -> Options:
    """Read the command line of `python -m experiments.<name>`.

    reports: whether the experiment can describe a part of its cells. generators: those that can draw its sequences,
    beside ours. passes: whether the last one of them can tell pairs several times.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: python -m experiments.{name} --quick",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny grid, a minute or two; into runs/experiments")
    parser.add_argument("--out", type=Path, help="folder of the results (docs/results, with --quick runs/experiments)")
    if reports:
        parser.add_argument("--report", action="store_true", help="train nothing: draw and describe what is there")
    if generators:
        parser.add_argument(
            "--generator", default=OURS, choices=[OURS, *generators], help="of the sequences (default: %(default)s)"
        )
    if passes:
        parser.add_argument(
            "--passes", type=int, default=1, help=f"how often {generators[-1]} tells the pairs (default: %(default)s)"
        )
    given = parser.parse_args(words)
    default = ROOT / ("runs/experiments" if given.quick else "docs/results")
    generator, times = vars(given).get("generator", OURS), vars(given).get("passes", 1)
    if times < 1 or (times > 1 and generator != generators[-1]):
        parser.error(f"--passes {times}: give 1, or more with --generator {generators[-1]}")
    return Options(given.quick, given.out or default, reports and given.report, generator, times)


@dataclass(frozen=True)
class Table:
    """A Markdown table; a column of numbers stands to the right. An empty string is a cell with nothing in it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        """Raises ValueError where a row has not one cell for each of the head."""
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"the row of {row[0]!r} has {len(row)} cells, its head {len(self.head)}; give as many")

    def markdown(self) -> str:
        """Its lines; a `|` in a cell is escaped."""
        head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in (self.head, *self.rows))
        rules = ["---:" if _numbers([row[place] for row in self.rows]) else "---" for place in range(len(head))]
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, rules, *rows))


def _numbers(column: Sequence[str]) -> bool:
    """Whether a column holds a number, and nothing but numbers."""
    filled = [cell for cell in column if cell]
    return bool(filled) and all(NUMBER.fullmatch(cell) for cell in filled)


class Record(Results):
    """The results of one experiment, <out>/<name>.json, with a picture and a page beside them."""

    def __init__(self, name: str, asked: Options, settings: dict[str, Any]) -> None:
        """Take up the results that are there. Raises ValueError as `Results` does."""
        command = f"python -m experiments.{name}{asked.words}"
        super().__init__(asked.out / f"{name}{asked.suffix}.json", {"experiment": name, "command": command}, settings)

    def save_figure(self, figure: Figure) -> None:
        """Save the picture beside the JSON."""
        save(figure, self.path.with_suffix(".png"))

    def write_text(self, title: str, caption: str, blocks: Sequence[str | Table], observed: Sequence[str] = ()) -> None:
        """The page beside the JSON: caption, picture, blocks, what was seen, and the command that shows it again.

        caption: what was measured, on what, over how many seeds. blocks: tables, and paragraphs that explain them.
        """
        name = self.path.stem
        said = [f"# {title}", _filled(caption), f"![{title}]({name}.png)"]
        said += [block.markdown() if isinstance(block, Table) else _filled(block) for block in blocks]
        said += [SEEN, *map(_filled, observed)] if observed else []
        commits = sorted({cell["commit"] for cell in self.cells.values()})
        made_at = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
        made = f"Made by `{self.content['command']}`, {made_at}; numbers in [{name}.json]({name}.json)."
        self.path.with_suffix(".md").write_text("\n\n".join([*said, made]) + "\n", encoding="utf-8")


def _filled(paragraph: str) -> str:
    bound = MARKS.sub("\0", " ".join(paragraph.split()))
    return textwrap.fill(bound, 110, break_on_hyphens=False, break_long_words=False).replace("\0", " ")


def listed(values: Iterable[object]) -> str:
    """Values in a sentence: `1, 2 and 3`."""
    *before, last = map(str, values)
    return f"{', '.join(before)} and {last}" if before else last


def seeds_said(seeds: Sequence[int]) -> str:
    """How many seeds, in words of a caption."""
    return "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def longer_said(longer: dict[str, int]) -> str:
    """Which models take how many times the steps, in sentences of a caption."""
    alike = {times: [name for name in longer if longer[name] == times] for times in longer.values()}
    take = {times: "takes" if len(names) == 1 else "take" for times, names in alike.items()}
    return " ".join(f"{listed(alike[times]).capitalize()} {take[times]} {times} times the steps." for times in alike)


def side_by_side(results: Record, jobs: dict[str, Callable[[], Cell]], *, fresh: bool = True) -> None:
    """Compute the cells that are missing, one to a core (on a GPU one by one), with the seconds that each took.

    A job is a partial of a module's function. It runs in a process of one thread. With `fresh` each job has a process
    of its own, and so its own peak of memory. Where a job fails, no other is begun. What it raised is raised when those
    beside it have ended.
    """
    start, most = multiprocessing.get_context("spawn"), 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(
        most, start, torch.set_num_threads, (1,), max_tasks_per_child=1 if fresh else None
    ) as workers:
        running = {workers.submit(_timed, job): name for name, job in jobs.items() if name not in results.cells}
        try:
            for done in as_completed(running):
                results.cell(running[done], done.result)
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise


def train_quietly(words: Sequence[str], directory: Path) -> int:
    """Run `atlas-train` with these words, its lines in log.txt of the run's directory. Gives its exit status."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "log.txt").open("a", encoding="utf-8") as lines, redirect_stdout(lines), redirect_stderr(lines):
        return train.main(words)


def _timed(job: Callable[[], Cell]) -> Cell:
    started = time.perf_counter()
    found = job()
    # Words and messages as they are in the checkout, wherever it lies.
    if "words" in found:
        found["words"] = [word.replace(f"{ROOT}/", "") for word in found["words"]]
    if "wrong" in found:
        found["wrong"] = found["wrong"].replace(f"{ROOT}/", "")
    return {**found, "seconds": round(time.perf_counter() - started, 2)}


def run(name: str, experiment: Callable[[], None]) -> int:
    """Run an experiment's body. Gives the exit status."""
    return command(name, lambda: experiment() or 0, left="the same command goes on from here")
