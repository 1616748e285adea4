"""`atlas-train CONFIG.toml [section.key=value ...]`: pretrain, or go on where the run stopped."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from atlas_megatron.cli.ending import (
    GONE,
    LOST,
    UNTIL_SAID,
    USER,
    Ending,
    ending_of,
    flushed,
    print_anything,
    unforeseen,
)
from atlas_megatron.cli.quiet import quieten
from atlas_megatron.resilience.stop_signals import StopSignals

if TYPE_CHECKING:
    from atlas_megatron.config import Config
    from atlas_megatron.estimate.machine import Machine

EXAMPLES = """\
examples:
  atlas-train configs/quickstart.toml
  atlas-train configs/quickstart.toml train.steps=50 run.directory=runs/short
  atlas-train configs/quickstart.toml train.start_from=runs/quickstart memory.chunk=16 run.directory=runs/second
  atlas-train configs/atlas-340m.toml --dry-run
  atlas-train configs/atlas-340m.toml --dry-run world=64 memory=80GiB parallel.tensor=2 parallel.context=4
  atlas-train configs/atlas-340m.toml --plan world=64 memory=80GiB
  torchrun --nproc-per-node 8 -m atlas_megatron.train configs/atlas-340m.toml parallel.tensor=2

The same command again resumes from the newest whole checkpoint, or says that the run is done.
SIGTERM, SIGUSR1 or Ctrl-C ends a run after the step in hand, with a checkpoint; a second Ctrl-C ends it at once.

every key, its default and its meaning:

"""
ON_MEMORY = (
    "lower train.micro_batch or model.seq_length, set train.recompute=true, or take more devices (parallel.tensor, "
    "pipeline, context): --dry-run says what each would take"
)
# An attribute of errors that came after the processes had joined.
SAID_BY_ANOTHER = "said_by_another"


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; its exit status.

    0: done, or stopped by a signal with a checkpoint. 1: NaN or inf. 2: a user's error. 3: another process ended. 4: a
    step hung (see watchdog). 5: an error that nobody foresaw, with its traceback. 130: a Ctrl-C before there was a step
    to save, or a second one.
    """
    # Signals first, all else is imported behind them: torch and Megatron take seconds, a checkpoint minutes. What comes
    # meanwhile ends the run after its first step, saved.
    with StopSignals() as signals:
        try:
            print_anything()
            status = _main(words, signals)
            error = flushed()
            if error and not status:
                _say_once((ending_of(error, ON_MEMORY) or Ending(USER, GONE)).line)
                return USER
            return status
        except KeyboardInterrupt:
            _say_once("interrupted; no step of this start was saved")
            return 130
        finally:
            flushed()


def _main(words: Sequence[str] | None, signals: StopSignals) -> int:
    quieten()
    from atlas_megatron.config import load
    from atlas_megatron.estimate.machine import Machine, is_machine_word

    config = None
    try:
        arguments = _parser().parse_intermixed_args(words)
        estimates = arguments.dry_run or arguments.plan
        words = [word for word in arguments.overrides if estimates and is_machine_word(word)]
        machine = Machine.of(words)
        given = [word for word in arguments.overrides if word not in words]
        config = load(arguments.config, given)
        if estimates:
            signals.release()
        if arguments.plan:
            return _plan(config, machine, frozenset(word.partition("=")[0] for word in given))
        if arguments.dry_run:
            return _dry_run(config, machine)
        return _train(config, signals)
    except KeyboardInterrupt:
        _say_once(f"interrupted; {_what_is_left(config)}")
        return 130
    except BaseException as error:
        found = ending_of(error, ON_MEMORY)
        if found is None and isinstance(error, SystemExit):
            raise
        status, line = found or unforeseen(error)
        if status == LOST:
            print(f"atlas-train: {line}", file=sys.stderr)
        else:
            _say_once(line, error)
        return status


def _say_once(line: str, error: BaseException | None = None) -> None:
    """The run's last line, from the first process that has it to say: what ends them all would be said by each.

    Before they have joined, as where there is no error, the first process of each machine says it. The others give it
    time for that: torchrun stops all as soon as one has failed.
    """
    if getattr(error, SAID_BY_ANOTHER, os.environ.get("LOCAL_RANK", "0") != "0"):
        if error is not None:
            time.sleep(UNTIL_SAID)
        return
    with suppress(OSError):
        print(f"atlas-train: {line}", file=sys.stderr)


def _what_is_left(config: Config | None) -> str:
    """What the same command would go on from."""
    from atlas_megatron.checkpoint import step_folders
    from atlas_megatron.files import integrity

    found = step_folders.checkpoints(Path(config.run.directory, "checkpoints")) if config else []
    saved = [folder for folder in found if integrity.is_marked(folder)]
    if not saved:
        return "there is no checkpoint yet: the same command begins at step 1"
    return f"the same command resumes from {saved[0]}"


def _parser() -> argparse.ArgumentParser:
    from atlas_megatron.cli.version import add_version
    from atlas_megatron.config import describe

    parser = argparse.ArgumentParser(
        prog="atlas-train",
        description="Pretrain ATLAS on Megatron-Core, on GPUs or on a CPU.",
        epilog=EXAMPLES + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("config", metavar="CONFIG.toml", help="what to train; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print size, FLOPs, memory, communication, layout, an estimate of the time, and what is missing; train "
        "nothing. world=N: on N devices; device=H100: of this kind; memory=80GiB: of this size; mfu=0.3: the part of "
        "their peak that is reached; price=2.5: of a device for an hour, for the cost; in nodes of "
        "parallel.devices_per_node (8)",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="rank the layouts of world=N devices by estimates (memory, waiting, bytes, MFU, hours), say why the "
        "others fall out, and train nothing; what is given of parallel.*, train.micro_batch, train.recompute and "
        "recompute_layers stays. memory=, device=, mfu= and price= as for --dry-run",
    )
    return parser


# They import Megatron in their bodies: it takes seconds, which --help and a mistyped key should not cost.


def _dry_run(config: Config, machine: Machine) -> int:
    from rich.console import Console

    from atlas_megatron.config.checks import validate
    from atlas_megatron.config.differences import changed_toml
    from atlas_megatron.estimate.dry_run import DryRun
    from atlas_megatron.estimate.machine import in_nodes
    from atlas_megatron.evaluate.in_training import copy_held, wrong_with_tasks
    from atlas_megatron.model.build import parameter_dtype
    from atlas_megatron.training.readiness import (
        epochs_read,
        how_it_goes_on,
        wrong_with_data,
        wrong_with_devices,
        wrong_with_directory,
    )

    config, world_size = in_nodes(config), machine.world_size(config)
    validate(config, world_size)
    wrong = wrong_with_data(config) or wrong_with_tasks(config)
    config, kept_from, said = (config, [], []) if wrong else how_it_goes_on(config)
    said += [] if wrong else epochs_read(config)
    print(changed_toml(config))
    for line in said:
        print(f"{line}\n")
    bf16 = parameter_dtype(config).itemsize == 2
    console = Console(soft_wrap=True, highlight=False)
    console.print(DryRun(config, world_size, machine.memory, bf16, machine).report())
    copied, fits = copy_held(config, world_size, machine.memory)
    if copied:
        print(copied if fits else f"does not fit: {copied}")
    # Both are read by people and by launch/slurm.sh: the first would end a run on any machine that sees these files.
    for line in (*wrong, *kept_from, *wrong_with_directory(config)):
        print(f"cannot train yet: {line}")
    for line in wrong_with_devices(config):
        print(f"not on this machine: {line}")
    return 0


def _plan(config: Config, machine: Machine, given: frozenset[str]) -> int:
    from rich.console import Console

    from atlas_megatron.estimate.machine import in_nodes
    from atlas_megatron.estimate.plan import CHOSEN, Planner
    from atlas_megatron.estimate.plan_report import report
    from atlas_megatron.model.build import parameter_dtype

    if machine.devices is None:
        raise ValueError("--plan wants the number of devices; write for example world=64")
    bf16 = parameter_dtype(config).itemsize == 2
    planner = Planner(in_nodes(config), machine.devices, machine, given & frozenset(CHOSEN), bf16=bf16)
    Console(soft_wrap=True, highlight=False).print(report(planner, planner.plan()))
    return 0


def _train(config: Config, signals: StopSignals) -> int:
    from rich.console import Console

    from atlas_megatron.checkpoint import best, checkpoint
    from atlas_megatron.config.checks import validate
    from atlas_megatron.config.differences import changed_toml
    from atlas_megatron.estimate import room
    from atlas_megatron.evaluate.in_training import watcher_of
    from atlas_megatron.model.build import num_params
    from atlas_megatron.parallel import world
    from atlas_megatron.resilience import run_lock
    from atlas_megatron.training.metrics import read, summary_table
    from atlas_megatron.training.readiness import wrong_with_directory
    from atlas_megatron.training.trainer import Trainer

    validate(config, world.size())
    room.check_training(config, world.size())
    for line in wrong_with_directory(config):
        raise ValueError(line)
    watcher = watcher_of(config, world.size())
    first = world.rank() == 0
    world.join(config)
    try:
        if first:
            print(f"{changed_toml(config)}# every key: {Path(config.run.directory, checkpoint.CONFIG)}\n")
        with leaving_nothing_empty(config), world.naming_the_lost(config):
            with run_lock.held(config.run.directory, print) as lock:
                trainer = Trainer(config, signals, lock, watcher)
                done = trainer.progress.step >= config.train.steps
                finished = trainer.train()
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        setattr(error, SAID_BY_ANOTHER, not world.is_first_to_say(str(error)))
        raise
    finally:
        world.leave()
    if first and finished:
        if done:
            print(
                f"{config.run.directory} is done: step {trainer.progress.step} of {config.train.steps}; "
                "raise train.steps to train on, or choose another run.directory"
            )
        records = read(config.run.directory)
        table = summary_table(records, num_params(config))
        Console(soft_wrap=True).print(table)
        parent = checkpoint.folder_of(config.run.directory)
        if parent.is_dir():
            print("\n".join(filter(None, (f"checkpoints in {parent}", best.line(parent)))))
    return 0


@contextmanager
def leaving_nothing_empty(config: Config) -> Iterator[None]:
    """A start that fails before its first record removes the folders that it made, and what it indexed in them."""
    directory = Path(config.run.directory)
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        yield
    finally:
        if made and os.environ.get("RANK", "0") == "0" and not (directory / "config.toml").exists():
            for name in ("index", "wandb"):
                shutil.rmtree(directory / name, ignore_errors=True)
            # Only empty ones go.
            with suppress(OSError):
                for folder in made:
                    folder.rmdir()


if __name__ == "__main__":
    sys.exit(main())
