"""Draw runs: of each loss.png (training and validation loss), position_loss.png (loss against position in the context),
diagnostics.png (what its memory layers measured) and evaluation.png (what train.evaluate_tasks scored); of several also
compare.png, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version
from atlas_megatron.reports import style as plotting
from atlas_megatron.reports.runs import compare_runs, plot_run

EXAMPLES = """\
examples:
  python tools/plot.py runs/quickstart                        # pictures into runs/quickstart
  python tools/plot.py runs/first runs/second                 # of each, and runs/first/compare.png
  python tools/plot.py runs/* --out docs/results/compare.png
"""


def main(words: Sequence[str] | None = None) -> int:
    """Draw what the command line asks for; its exit status."""
    return command("plot", lambda: _plot(_parser().parse_args(words)), left="pictures that are there are whole")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plot.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_version(parser)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory, with metrics.jsonl")
    parser.add_argument("--out", metavar="FILE", help="where the comparison goes (default: compare.png in the first)")
    return parser


def _plot(arguments: argparse.Namespace) -> int:
    if arguments.out is not None and len(arguments.runs) < 2:
        raise ValueError(f"--out {arguments.out} names a comparison, but one run was given; give two or leave it")
    if arguments.out is not None:
        plotting.check_name(Path(arguments.out))
    for run in arguments.runs:
        for path in plot_run(run):
            print(path)
    if len(arguments.runs) > 1:
        print(compare_runs(arguments.runs, arguments.out))
    return 0
