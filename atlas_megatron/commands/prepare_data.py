"""Prepare text for training: tokenizer, Megatron .bin/.idx sets, a train/validation split."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version
from atlas_megatron.data.shards import Shard
from atlas_megatron.files.resumable import folder_beside

if TYPE_CHECKING:
    from atlas_megatron.data.corpus import Summary

EXAMPLES = """\
examples:
  a tokenizer of 32,000 trained on the text itself, one document in 200 held out
    python tools/prepare_data.py 'books/**/*.txt' --out data/books --train-tokenizer 32000 --validation 0.005
  JSON lines with the text under "content", four processes, an existing tokenizer
    python tools/prepare_data.py web-*.jsonl --key content --out data/web --tokenizer models/llama --workers 4
  Parquet, nothing held out; JSON lines as they are published, the text under "meta" and there "text"
    python tools/prepare_data.py code.parquet --out data/code --tokenizer data/books/tokenizer --validation 0
    python tools/prepare_data.py 'crawl/*.jsonl.zst' --key meta.text --skip-bad --out data/crawl --train-tokenizer 32000
  four nodes, each with its share of the files, then one that joins them; copies of a text are left out
    python tools/prepare_data.py 'crawl/*.jsonl.zst' --dedup --tokenizer models/llama --out data/crawl --shard 0/4
    ... --shard 1/4, 2/4, 3/4 on the others; when all are done, the same words with --merge in its place:
    python tools/prepare_data.py 'crawl/*.jsonl.zst' --dedup --tokenizer models/llama --out data/crawl --merge 4
  a validation split out of data that are tokens already
    python tools/prepare_data.py data/old/train --out data/new --tokenizer models/llama --validation 0.01

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
    add_version(parser)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE",
        help="files or globs: .jsonl, .ndjson and .json (a document a line, or an item of a list), .parquet (a row), "
        "anything else is one plain-text document; each also as .gz, .zst, .bz2 or .xz. Or prefixes of .bin/.idx data, "
        "whose documents are split anew",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the data go")
    parser.add_argument("--overwrite", action="store_true", help="replace what was prepared there otherwise")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", default="", metavar="FOLDER", help="a local Hugging Face tokenizer folder")
    tokenizer.add_argument(
        "--train-tokenizer",
        type=int,
        default=0,
        metavar="VOCAB",
        help="train a byte-level BPE of VOCAB tokens on the training split, into OUT/tokenizer",
    )
    parser.add_argument(
        "--key", default="text", help="of the text in JSON and Parquet; a.b for b inside of a (default: %(default)s)"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out records that cannot be read, count and name them"
    )
    parser.add_argument(
        "--validation",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of documents held out, chosen by a hash of their text; 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--dedup", action="store_true", help="leave out all but the first of equal texts (by SHA-256), and count them"
    )
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--shard", default="", metavar="I/N", help="prepare the I-th of N shares of the files, from 0/N on"
    )
    several.add_argument(
        "--merge", type=int, default=0, metavar="N", help="join N shards that were prepared with these same words"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that encode (default: %(default)s)"
    )
    return parser


def _prepare(arguments: argparse.Namespace) -> int:
    # Writing token files uses no accelerator, so what core says of absent ones is noise here.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    # Here, not at the top: Megatron loads torch, and --help and the worker processes do without.
    from atlas_megatron.data.merging import merge
    from atlas_megatron.data.prepare import Options, input_files, prepare
    from atlas_megatron.data.records import Skipped

    options = Options(
        arguments.tokenizer,
        arguments.train_tokenizer,
        arguments.key,
        arguments.validation,
        arguments.workers,
        arguments.dedup,
    )
    shard = Shard.parse(arguments.shard) if arguments.shard else None
    skipped = Skipped() if arguments.skip_bad else None
    files = [file for file in input_files(arguments.inputs) if file.is_file()]
    total = sum(file.stat().st_size for file in (shard.of(files) if shard else files))
    unfinished = None if arguments.merge else shard.folder(arguments.out) if shard else arguments.out
    columns = (TextColumn("{task.description:>9}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with _saying_what_is_kept(unfinished), Progress(*columns, console=Console(stderr=True)) as progress:
        # How much is copied into files in the end hangs on the copies that are left out.
        stages = {
            name: progress.add_task(name, total=size, visible=False)
            for name, size in (("tokenizer", total), ("tokens", total), ("files", None))
        }

        def advance(stage: str, size: int) -> None:
            progress.update(stages[stage], advance=size, visible=True)

        inputs, out, overwrite = arguments.inputs, arguments.out, arguments.overwrite
        if arguments.merge:
            summary, written = merge(inputs, out, options, advance, arguments.merge, overwrite)
        else:
            summary, written = prepare(inputs, out, options, advance, skipped, overwrite, shard)
    if skipped and skipped.count:
        print(skipped, file=sys.stderr)
    elif summary.skipped:
        print(f"left out {summary.skipped:,} bad records when it was prepared", file=sys.stderr)
    _say(arguments, summary, written, shard)
    return 0


def _say(arguments: argparse.Namespace, summary: Summary, written: bool, shard: Shard | None) -> None:
    for name, split in summary.splits.items():
        print(f"{name:>10}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes")
    if arguments.dedup and not shard:
        print(f"left out {summary.duplicates:,} copies of documents that are there already")
    out: Path = shard.folder(arguments.out) if shard else arguments.out
    if not arguments.train_tokenizer and Path(summary.tokenizer) == out / "tokenizer":
        print(f"{arguments.tokenizer} has no tokenizer.json; converted, it is {summary.tokenizer}")
    print(f"{out} " + (f"written; vocabulary {summary.vocab_size:,}" if written else "is up to date"))
    if shard:
        print(f"when all {shard.count} are there: the same words, with --merge {shard.count} in the place of --shard")


@contextmanager
def _saying_what_is_kept(out: Path | None) -> Iterator[None]:
    """Where work on `out` ends early and another start goes on with it, a line says so."""
    try:
        yield
    except BaseException:
        if out is not None and folder_beside(out).is_dir():
            print(f"{folder_beside(out)} keeps what is done; the same command goes on from there", file=sys.stderr)
        raise


def main(words: Sequence[str] | None = None) -> int:
    """Prepare what the command line asks for; its exit status."""
    remedy = "give fewer --workers, or leave out the documents that are too large"
    work = lambda: _prepare(_parser().parse_args(words))  # noqa: E731
    return command("prepare_data", work, on_memory=remedy, left="no data were written")
