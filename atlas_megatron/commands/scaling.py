"""Loss against compute: fit L(C) = E + A C^-a through finished runs with error bars, compare kinds of model at equal
compute, and write a JSON, a text and a log-log picture.

C is the run's tokens times the training FLOPs a token of its model, the memories' inner loop included."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version
from atlas_megatron.files.scratch import write_whole
from atlas_megatron.reports.results import commit, versions
from atlas_megatron.reports.runs import STYLE
from atlas_megatron.reports.style import save
from atlas_megatron.scaling import compare as scaling

EXAMPLES = """\
examples:
  python tools/scaling.py runs/scale/*                                        # one curve through all runs
  python tools/scaling.py runs/atlas/* runs/omeganet/* --compare memory.preset
  python tools/scaling.py runs/memory/* runs/attention/* --compare model.pattern --out docs/results/mine
"""


def table(kinds: Sequence[scaling.Kind]) -> Table:
    found = Table(title="runs, by rising compute")
    for column in ("run", "kind", "parameters", "without embeddings", "tokens", "FLOPs", "inner loop", "loss"):
        found.add_column(column, justify="left" if column in ("run", "kind") else "right")
    for row in rows(kinds):
        found.add_row(*row)
    return found


def rows(kinds: Sequence[scaling.Kind]) -> list[tuple[str, ...]]:
    return [
        (
            run.directory, run.kind, f"{run.all_parameters:,}", f"{run.parameters:,}", f"{run.tokens:,}",
            f"{run.compute:.3e}", f"{run.inner:.0%}", f"{run.loss:.4f}",
        )
        for kind in kinds for run in kind.runs
    ]  # fmt: skip


def write(kinds: Sequence[scaling.Kind], against: str, out: Path, command: str) -> list[Path]:
    """OUT.json, OUT.md and OUT.png."""
    # A name may have dots of its own: with_suffix would take what follows the last one.
    paths = [out.parent / f"{out.name}.{ending}" for ending in ("json", "md", "png")]
    if not out.name:
        raise ValueError(f"--out '{out}' is no name; give one, for example --out runs/scaling")
    out.parent.mkdir(parents=True, exist_ok=True)
    made = {"command": command, "commit": commit(), "versions": versions()}
    write_whole(paths[0], json.dumps(made | scaling.content(kinds, against), indent=1) + "\n")
    head = "| run | kind | parameters | without embeddings | tokens | FLOPs | inner loop | loss |"
    lines = [head, "|---|---|" + "---:|" * 6, *(f"| {' | '.join(row)} |" for row in rows(kinds))]
    parts = [
        f"# Loss against {against}", f"![loss against {against}]({paths[2].name})",
        *scaling.sentences(kinds, against), "\n".join(lines), f"{scaling.METHOD}.",
        f"Made by `{command}`, commit {made['commit']}; numbers in [{paths[0].name}]({paths[0].name}).",
    ]  # fmt: skip
    write_whole(paths[1], "\n\n".join(parts) + "\n")
    with pyplot.style.context(STYLE):
        figure, axes = pyplot.subplots(layout="constrained")
        scaling.draw(axes, kinds, against)
        save(figure, paths[2])
    return paths


def main(words: Sequence[str] | None = None) -> int:
    """Fit what the command line asks for; its exit status."""
    words = sys.argv[1:] if words is None else words
    return command("scaling", lambda: _fit(_parser().parse_args(words), shlex.join(words)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scaling.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_version(parser)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a finished run's directory")
    parser.add_argument("--compare", metavar="KEY", default="", help="a curve for each value of this key of the config")
    parser.add_argument("--against", choices=tuple(scaling.AGAINST), default="compute")
    parser.add_argument("--out", type=Path, metavar="NAME", default=Path("runs/scaling"), help="default runs/scaling")
    return parser


def _fit(arguments: argparse.Namespace, words: str) -> int:
    kinds = scaling.kinds_of(scaling.read_runs(arguments.runs, arguments.compare), arguments.against)
    written = write(kinds, arguments.against, arguments.out, f"python tools/scaling.py {words}")
    Console(soft_wrap=True).print(table(kinds))
    print("\n".join(scaling.sentences(kinds, arguments.against)))
    print("\n".join(map(str, written)))
    return 0
