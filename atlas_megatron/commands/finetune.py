"""Fine-tune an exported Hugging Face model on long texts, on one process or with DeepSpeed's ZeRO on many."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tomllib
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from atlas_megatron.cli.version import add_version

EXAMPLES = """\
examples:
  text, in sequences of 32,768 tokens read in segments of 2,048, on one device; where that is longer than in training,
  gradients end as the exported model's do, or, with --detach-every 0, pass over every cut
    python tools/finetune.py exported/340m --data 'books/*.txt' --out tuned/340m --length 32768 --segment 2048
  the same on 8 GPUs with ZeRO-2 in bfloat16, gradients over 4 segments at a time
    torchrun --nproc-per-node 8 tools/finetune.py exported/340m --data 'books/*.txt' --out tuned/340m \\
        --length 32768 --segment 2048 --detach-every 4 --deepspeed configs/deepspeed/zero2.json --bf16
  prompts with answers (a line: {"input": ..., "question": ..., "target": ...}); only the answers are learned
    python tools/finetune.py exported/340m --data babilong.jsonl --out tuned/babilong --config configs/babilong.toml
  chats (a line: {"messages": [{"role": ..., "content": ...}, ...]}) by the tokenizer's template, of which the turns of
  the assistant are learned; and prompts with special tokens of the tokenizer
    python tools/finetune.py exported/340m --data chats.jsonl.gz --out tuned/chat --skip-bad
    python tools/finetune.py exported/340m --data qa.jsonl --out tuned/qa --prompt '<|user|>{input}<|bot|>'
  data that tools/prepare_data.py wrote, what it would cost on 16 devices
    python tools/finetune.py exported/340m --data data/books/train --validation data/books/validation \\
        --out tuned/books --length 16384 --devices 16 --batch 16 --dry-run

Run the same command again and it goes on from the newest whole checkpoint in OUT.training, or says that it is done. OUT
appears when the run is done, with the code, configuration and tokenizer that came in.
"""
ON_DETACHING = (
    "truncate gradients at every N-th cut, 0: at none (default: 0; where a sequence is longer than those that the "
    "model was trained on, gradients of memories end after a quarter of that length, as the exported model's do)"
)
ON_MEMORY = (
    "give a smaller --segment or --micro-batch, --checkpointing, or a higher stage of ZeRO: --dry-run tells each"
)


def main(words: Sequence[str] | None = None) -> int:
    """Fine-tune as the command line says; 0, or 2 after one line on what is wrong."""
    words = sys.argv[1:] if words is None else words
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path)
    _quieten()
    from atlas_megatron.cli.ending import ended

    def finetune() -> int:
        file = first.parse_known_args(words)[0].config
        # Before the command line's own, which therefore win.
        return _finetune(_parser().parse_args([*(_options_of(file) if file else []), *words]))

    try:
        # Every process meets what goes wrong; one says it.
        return ended("finetune", finetune, ON_MEMORY, says=os.environ.get("RANK", "0") == "0")
    except KeyboardInterrupt:
        said = "interrupted; the same command goes on from the newest checkpoint, if there is one"
        print(f"finetune: {said}", file=sys.stderr)
        return 130


def _finetune(arguments: argparse.Namespace) -> int:
    # Here, not at the top: transformers and Megatron take seconds, which --help should not cost.
    from atlas_megatron.finetune import plan, run
    from atlas_megatron.finetune.settings import from_arguments

    if arguments.devices is not None and arguments.devices < 1:
        raise ValueError(f"--devices is {arguments.devices}; give 1 or more")
    settings = from_arguments(vars(arguments))
    planned = plan.plan(settings, arguments.devices or plan.world_size())
    if planned.skipped and planned.skipped.count and os.environ.get("RANK", "0") == "0":
        print(planned.skipped, file=sys.stderr)
    if arguments.dry_run:
        from rich.console import Console

        from atlas_megatron.finetune.estimate import report

        Console().print(report(planned))
        return 0
    if arguments.devices:
        raise ValueError("--devices is of --dry-run; torchrun --nproc-per-node says on how many processes a run is")
    if planned.done:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"{settings.out} is done: these settings trained it for {planned.steps:,} steps; choose another --out "
                "to train anew"
            )
        return 0
    try:
        out = run.finetune(planned)
    except BaseException:
        with suppress(OSError):
            settings.work.rmdir()  # where nothing came into it
        raise
    if os.environ.get("RANK", "0") == "0":
        print(f"wrote {out}; checkpoints are in {settings.work}, to remove when it is good")
    return 0


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="finetune.py", description=__doc__, epilog=EXAMPLES, formatter_class=plain)
    add_version(parser)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL_FOLDER", help="an exported model; the code installed here reads its weights")
    add(
        "--trust-remote-code",
        action=argparse.BooleanOptionalAction,
        help="run the code that lies in the model's folder instead",
    )
    add("--data", nargs="+", required=True, metavar="FILE", help="text, JSON, .parquet, or a prefix of .bin/.idx")
    add("--out", type=Path, required=True, metavar="FOLDER", help="the model that comes out; nothing is written over")
    add("--config", type=Path, metavar="TOML", help="options by their names here; the command line's own win")
    add("--deepspeed", type=Path, metavar="JSON", help="configs/deepspeed/{zero1,zero2,zero3,zero3_offload}.json")
    add("--validation", nargs="+", default=(), metavar="FILE", help="as --data, of which the loss is told")
    add("--key", help="of the text in JSON and .parquet; a.b for b inside of a (default: text)")
    add("--prompt", type=_newlines, help=r"of a line with a target (default: '{input}\n{question}\n')")
    add(
        "--skip-bad",
        action=argparse.BooleanOptionalAction,
        help="leave out records that cannot be read, count and name them",
    )

    context = parser.add_argument_group("context")
    add = context.add_argument
    add("--length", type=int, help="tokens of a text's sequence (default: the model's seq_length); of answers the most")
    add("--segment", type=int, help="tokens read at once (default: the model's seq_length)")
    add("--detach-every", type=int, metavar="N", help=ON_DETACHING)
    add(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="keep of a segment its first memory alone and read it again (default: where gradients cross cuts)",
    )

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--epochs", type=float, help="passes over the data (default: 1)")
    add("--steps", type=int, help="instead of --epochs")
    add("--batch", type=int, help="sequences of a step on all devices together (default: 8)")
    add("--micro-batch", type=int, help="sequences on a device at once (default: 1)")
    add("--lr", type=float, help="largest learning rate of AdamW (default: 1e-4)")
    add("--schedule", help="cosine, linear or constant (default: cosine)")
    add("--warmup", type=int, metavar="STEPS", help="in which the learning rate rises (default: 0)")
    add("--weight-decay", type=float, help="(default: 0.1)")
    add("--clip", type=float, help="largest norm of the gradients, 0 for any (default: 1)")
    add("--write-budget", type=float, help="of memories with write gates, beside the loss (default: 0)")
    add("--seed", type=int, help="of the order of the data (default: 0)")
    add(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16; the optimizer of --deepspeed keeps float32",
    )

    saving = parser.add_argument_group("saving and telling")
    add = saving.add_argument
    add("--save-every", type=int, metavar="STEPS", help="checkpoints (default: 100)")
    add("--keep", type=int, help="checkpoints that are kept (default: 2)")
    add("--validate-every", type=int, metavar="STEPS", help="(default: 100)")
    add("--log-every", type=int, metavar="STEPS", help="(default: 1)")
    add(
        "--dry-run",
        action=argparse.BooleanOptionalAction,
        help="tell parameters, tokens, steps and memory by ZeRO stage; train nothing",
    )
    add("--devices", type=int, metavar="N", help="of --dry-run (default: those of this run)")
    return parser


def _options_of(file: Path) -> list[str]:
    """A file's settings as words of the command line, which may follow. Raises ValueError for one that is not TOML."""
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not TOML: {error}") from error
    words: list[str] = []
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            words += [option, *map(str, value)]
        else:
            no = "--no-" + option[2:]
            words.append((option if value else no) if isinstance(value, bool) else f"{option}={value}")
    # An option last, for a list takes every word until the next.
    return [*words, f"--config={file}"]


def _newlines(text: str) -> str:
    return text.replace(r"\n", "\n")


def _quieten() -> None:
    """Leave the screen to what is asked for: the libraries warn of absent accelerators, and of each other."""
    for library in ("accelerate", "DeepSpeed", "megatron"):
        logging.getLogger(library).setLevel(logging.ERROR)
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"megatron\.|torch\.|transformers\.|accelerate\.")
