"""Convert between Megatron checkpoints and Hugging Face folders.

    python tools/convert_hf.py export RUN_OR_CHECKPOINT FOLDER [--dry-run] [--shard-size 2GB]
    python tools/convert_hf.py import FOLDER RUN [section.key=value ...] [--dry-run]
"""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; its exit status: 0 done, 2 a user's error."""

    def convert() -> int:
        arguments = _parser().parse_intermixed_args(words)
        _quieten()
        return _export(arguments) if arguments.direction == "export" else _import(arguments)

    remedy, left = "give a smaller --shard-size, or a machine with more memory", "nothing was left behind"
    return command("convert_hf", convert, on_memory=remedy, left=left)


def size_of(text: str) -> int:
    """Bytes of a size like 500MB or 2GiB. Raises ValueError for another form."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * UNITS[(found[2] or "").upper()]) if found else 0
    if size < 1:
        raise ValueError(f"--shard-size {text!r} is no size; write for example 2GB")
    return size


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="convert_hf", description=__doc__, formatter_class=plain)
    add_version(parser)
    parser.add_argument("direction", choices=["export", "import"])
    parser.add_argument("source", type=Path, help="a run, one of its checkpoints, or a Hugging Face folder")
    parser.add_argument("target", type=Path, help="what is written; must not exist")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the imported run's configuration")
    parser.add_argument("--dry-run", action="store_true", help="list every parameter with its names, write nothing")
    parser.add_argument("--shard-size", default="2GB", help="largest file of weights; about twice as much is in memory")
    return parser


# Both import Megatron in their bodies: it takes seconds, which --help and a mistyped word should not cost.


def _export(arguments: argparse.Namespace) -> int:
    if arguments.overrides:
        raise ValueError(f"export takes no {arguments.overrides[0]!r}: the model is what its checkpoint says")
    shard_size = size_of(arguments.shard_size)
    from atlas_megatron.hf import export

    if arguments.dry_run:
        print(export.dry_run(arguments.source))
        return 0
    print(f"wrote {export.export(arguments.source, arguments.target, shard_size)}")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from atlas_megatron.hf import importing

    if arguments.dry_run:
        print(importing.dry_run(arguments.source))
        return 0
    run = importing.import_folder(arguments.source, arguments.target, arguments.overrides)
    print(f"wrote {run}; {train_on(run)}")
    return 0


def train_on(run: Path) -> str:
    """How to train an imported run: a command that runs, or what it still needs, as a folder tells no data, no rate."""
    from atlas_megatron.config import load

    config = load(run / "config.toml")
    words = ["atlas-train", str(run / "config.toml")]
    needs = "" if config.data.train else "\nPREFIX is of data that tools/prepare_data.py wrote with --tokenizer "
    words += [] if config.data.train else ['data.train=["PREFIX"]']
    needs += config.data.tokenizer if needs else ""
    if not config.data.tokenizer:
        words.append("data.tokenizer=FOLDER")
    train = config.train
    schedule = f"train.lr={train.lr:g}, train.warmup_steps={train.warmup_steps}, train.steps={train.steps}"
    return f"train on with: {shlex.join(words)}{needs}\nthe schedule is this run's, not the model's: {schedule}"


def _quieten() -> None:
    """Leave the screen to what is asked for: the libraries warn of absent accelerators at every start."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.|torch\.distributed\.checkpoint")
