"""Prepare text for training: tokenizer, Megatron .bin/.idx sets, a train/validation split."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

EXAMPLES = """\
examples:
  a tokenizer of 32,000 trained on the text itself, one document in 200 held out
    python tools/prepare_data.py 'books/**/*.txt' --out data/books --train-tokenizer 32000 --validation 0.005
  JSON lines with the text under "content", four processes, an existing tokenizer
    python tools/prepare_data.py web-*.jsonl --key content --out data/web --tokenizer models/llama --workers 4
  Parquet, nothing held out
    python tools/prepare_data.py code.parquet --out data/code --tokenizer data/books/tokenizer --validation 0

then, in a run's TOML:
  [data]
  train = ["0.7 data/books/train", "0.3 data/code/train"]
  validation = ["data/books/validation"]
  tokenizer = "data/books/tokenizer"
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare_data.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE",
        help="files or globs: .jsonl (a document a line), .parquet (a row), anything else is one plain-text document",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the data go; replaced whole")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", default="", metavar="FOLDER", help="a local Hugging Face tokenizer folder")
    tokenizer.add_argument(
        "--train-tokenizer",
        type=int,
        default=0,
        metavar="VOCAB",
        help="train a byte-level BPE of VOCAB tokens on the training split, into OUT/tokenizer",
    )
    parser.add_argument("--key", default="text", help="of the text in .jsonl and .parquet (default: %(default)s)")
    parser.add_argument(
        "--validation",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of documents held out, chosen by a hash of their text; 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that encode (default: %(default)s)"
    )
    return parser


def _prepare(arguments: argparse.Namespace) -> None:
    # Writing token files uses no accelerator, so what core says of absent ones is noise here.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    # Here, not at the top: Megatron loads torch, and --help and the worker processes do without.
    from atlas_megatron.corpus import expand
    from atlas_megatron.prepare import Options, prepare

    options = Options(
        arguments.tokenizer, arguments.train_tokenizer, arguments.key, arguments.validation, arguments.workers
    )
    total = sum(file.stat().st_size for file in expand(arguments.inputs))
    columns = (TextColumn("{task.description:>9}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        stages = {name: progress.add_task(name, total=total, visible=False) for name in ("tokenizer", "tokens")}

        def advance(stage: str, size: int) -> None:
            progress.update(stages[stage], advance=size, visible=True)

        summary, written = prepare(arguments.inputs, arguments.out, options, advance)
    for name, split in summary.splits.items():
        print(f"{name:>10}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes")
    print(f"{arguments.out} " + (f"written; vocabulary {summary.vocab_size:,}" if written else "is up to date"))


def main(words: Sequence[str] | None = None) -> int:
    """Prepare what the command line asks for; 0, or 2 after one line on what is wrong."""
    arguments = _parser().parse_args(words)
    try:
        _prepare(arguments)
    except (ValueError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
