"""`atlas-train CONFIG.toml [section.key=value ...]`: pretrain, or go on where the run stopped."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from atlas_megatron.stopping import StopSignals

if TYPE_CHECKING:
    from atlas_megatron.config import Config
    from atlas_megatron.machine import Machine

EXAMPLES = """\
examples:
  atlas-train configs/quickstart.toml
  atlas-train configs/quickstart.toml train.steps=50 run.directory=runs/short
  atlas-train configs/atlas-340m.toml --dry-run
  atlas-train configs/atlas-340m.toml --dry-run world=64 memory=80GiB parallel.tensor=2 parallel.context=4
  torchrun --nproc-per-node 8 -m atlas_megatron.train configs/atlas-340m.toml parallel.tensor=2

The same command again resumes from the newest whole checkpoint, or says that the run is done.
SIGTERM or SIGUSR1 ends a run after the step in hand, with a checkpoint.

every key, its default and its meaning:

"""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; its exit status.

    0: done, or stopped by a signal with a checkpoint. 1: NaN or inf. 2: a user's error. 3: another process ended. 4: a
    step hung (see watchdog).
    """
    # Signals first, all else is imported behind them: torch and Megatron take seconds, a checkpoint minutes. What comes
    # meanwhile ends the run after its first step, saved.
    with StopSignals() as signals:
        return _main(words, signals)


def _main(words: Sequence[str] | None, signals: StopSignals) -> int:
    from atlas_megatron.config import load
    from atlas_megatron.machine import Machine, is_machine_word

    arguments = _parser().parse_intermixed_args(words)
    words = [word for word in arguments.overrides if arguments.dry_run and is_machine_word(word)]
    try:
        machine = Machine.of(words)
        config = load(arguments.config, [word for word in arguments.overrides if word not in words])
        quieten()
        if arguments.dry_run:
            signals.release()
            return _dry_run(config, machine)
        return _train(config, signals)
    except ConnectionError as error:
        print(f"atlas-train: {error}", file=sys.stderr)
        return 3
    except (ValueError, OSError) as error:
        print(f"atlas-train: {error}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        print(f"atlas-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("atlas-train: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from atlas_megatron.config import describe

    parser = argparse.ArgumentParser(
        prog="atlas-train",
        description="Pretrain ATLAS on Megatron-Core, on GPUs or on a CPU.",
        epilog=EXAMPLES + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG.toml", help="what to train; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print size, FLOPs, memory, communication and layout; train nothing. world=N: on N devices, memory=80GiB: "
        "of this size, in nodes of parallel.devices_per_node (8)",
    )
    return parser


# Both import Megatron in their bodies: it takes seconds, which --help and a mistyped key should not cost.


def _dry_run(config: Config, machine: Machine) -> int:
    from rich.console import Console

    from atlas_megatron.config import to_toml
    from atlas_megatron.config_checks import validate
    from atlas_megatron.dry_run import DryRun
    from atlas_megatron.machine import in_nodes
    from atlas_megatron.model import parameter_dtype

    config, world_size = in_nodes(config), machine.world_size(config)
    validate(config, world_size)
    print(to_toml(config))
    bf16 = parameter_dtype(config).itemsize == 2
    Console(soft_wrap=True).print(DryRun(config, world_size, machine.memory, bf16).report())
    return 0


def _train(config: Config, signals: StopSignals) -> int:
    from rich.console import Console

    from atlas_megatron import checkpoint, run_lock
    from atlas_megatron.config import to_toml
    from atlas_megatron.config_checks import validate
    from atlas_megatron.metrics import read, summary_table
    from atlas_megatron.model import num_params
    from atlas_megatron.parallel import world
    from atlas_megatron.trainer import Trainer

    validate(config, world.size())
    first = world.rank() == 0
    world.join(config)
    try:
        if first:
            print(to_toml(config))
        with world.naming_the_lost(config), run_lock.held(config.run.directory, print) as lock:
            trainer = Trainer(config, signals, lock)
            done = trainer.position.step >= config.train.steps
            finished = trainer.train()
    finally:
        world.leave()
    if first and finished:
        if done:
            print(
                f"{config.run.directory} is done: step {trainer.position.step} of {config.train.steps}; "
                "raise train.steps to train on, or choose another run.directory"
            )
        records = read(config.run.directory)
        table = summary_table(records, num_params(config))
        Console(soft_wrap=True).print(table)
        print(f"checkpoints in {checkpoint.folder_of(config.run.directory)}")
    return 0


def quieten() -> None:
    """Leave the screen to the run's own lines: core warns of absent accelerators, and of itself, at every start."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.CRITICAL)  # it raises what it logs
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.|torch\.distributed\.checkpoint")
    # Core asks views of its gradient buffers for a gradient of their own; there is none, as it expects.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")


if __name__ == "__main__":
    sys.exit(main())
