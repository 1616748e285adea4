"""Train one configuration at several learning rates, and seeds, on this machine; a table, sweep.json and sweep.png.

Runs lie below run.directory, lr_RATE_seed_SEED. The same command goes on where it was interrupted."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version

EXAMPLES = """\
examples:
  atlas-sweep configs/quickstart.toml --lr 1e-3 3e-3 6e-3 run.directory=runs/rates
  atlas-sweep configs/quickstart.toml --lr 1e-3 3e-3 --seeds 1 2 3 --jobs 2 train.steps=100 run.directory=runs/rates
  atlas-sweep configs/quickstart.toml --lr 1e-3 3e-3 --dry-run
"""

EXAMPLE = {"--lr": "1e-3 3e-3", "--seeds": "1 2"}


def main(words: Sequence[str] | None = None) -> int:
    """Run the sweep that the command line asks for; its exit status."""
    words = sys.argv[1:] if words is None else words
    work = lambda: _sweep(_parser().parse_intermixed_args(words), shlex.join(words))  # noqa: E731
    return command("atlas-sweep", work, left="runs have saved; the same command goes on")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atlas-sweep", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_version(parser)
    parser.add_argument("config", metavar="CONFIG.toml", help="what to train; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    parser.add_argument("--lr", nargs="+", required=True, metavar="RATE", help="peak learning rates")
    parser.add_argument("--seeds", nargs="+", default=[], metavar="SEED", help="default: the config's")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, one process each (1)")
    parser.add_argument("--dry-run", action="store_true", help="print the runs; train nothing")
    return parser


def _sweep(arguments: argparse.Namespace, words: str) -> int:
    import torch

    from atlas_megatron.config import load
    from atlas_megatron.scaling import sweep

    if arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs} is no number of runs; give at least 1")
    # Behind --lr and --seeds argparse takes overrides for one value more.
    listed = [word for word in (*arguments.lr, *arguments.seeds) if "=" in word]
    config = load(arguments.config, [*arguments.overrides, *listed])
    rates, seeds = _numbers("--lr", arguments.lr, float), _numbers("--seeds", arguments.seeds, int)
    runs = sweep.points(config, rates, seeds or [config.run.seed])
    train = config.train
    print(f"{len(runs)} runs of {train.steps:,} steps, {arguments.jobs} at a time, below {config.run.directory}")
    if arguments.dry_run:
        print("\n".join(f"  {run.directory.name}: {'done' if sweep.outcome_of(run) else 'to train'}" for run in runs))
        return 0
    outcomes = sweep.train_all(runs, arguments.jobs, torch.cuda.device_count(), _say)
    _write(config.run.directory, words, outcomes)
    return 0


def _numbers[T: (int, float)](option: str, words: Sequence[str], kind: type[T]) -> list[T]:
    """The values of an option that are no overrides. Raises ValueError for one that is no number either."""
    found = []
    for word in (word for word in words if "=" not in word):
        try:
            found.append(kind(word))
        except ValueError as error:
            raise ValueError(f"{option} {word!r} is no number; give some, as {option} {EXAMPLE[option]}") from error
    return found


def _say(outcome: object) -> None:
    values = vars(outcome)
    loss = "met NaN or inf" if values["loss"] is None else f"validation loss {values['loss']:.4f}"
    print(f"lr {values['lr']:g}, seed {values['seed']}: {loss}", flush=True)


def _write(directory: str, words: str, outcomes: Sequence) -> None:
    """The table to the screen; numbers and picture into the sweep's directory."""
    from matplotlib import pyplot

    from atlas_megatron.files.scratch import write_whole
    from atlas_megatron.reports.results import commit, versions
    from atlas_megatron.reports.runs import STYLE
    from atlas_megatron.reports.style import save
    from atlas_megatron.scaling import sweep

    seeds = sorted({outcome.seed for outcome in outcomes})
    table = Table("learning rate", *(f"seed {seed}" for seed in seeds), "mean", title="validation loss, nats a token")
    for lr, average in sweep.means(outcomes).items():
        losses = [outcome.loss for outcome in outcomes if outcome.lr == lr]
        table.add_row(f"{lr:g}", *("NaN" if x is None else f"{x:.4f}" for x in (*losses, average)))
    for column in table.columns:
        column.justify = "right"
    Console(soft_wrap=True).print(table)
    found = list(sweep.sentences(outcomes))
    print("\n".join(found))
    made = {"command": f"atlas-sweep {words}", "commit": commit(), "versions": versions(), "found": found}
    file = Path(directory) / "sweep.json"
    write_whole(file, json.dumps(made | {"runs": [vars(outcome) for outcome in outcomes]}, indent=1) + "\n")
    with pyplot.style.context(STYLE):
        figure, axes = pyplot.subplots(layout="constrained")
        sweep.draw(axes, outcomes)
        print(f"{file}, {save(figure, Path(directory) / 'sweep.png')}")


if __name__ == "__main__":
    sys.exit(main())
