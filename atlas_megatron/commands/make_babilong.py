"""Write examples of BABILong to fine-tune on: stories of bAbI's kind told anew and hidden in text of yours."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version
from atlas_megatron.data.tokenizer import load_tokenizer
from atlas_megatron.evaluate.babilong_training import training_rows, write_rows
from atlas_megatron.evaluate.filler import TextFolder

EXAMPLES = """\
examples:
  prompts with answers of 1,000 to 16,000 tokens, and an exported model that learns the answers
    python tools/make_babilong.py qa1 qa2 qa3 qa4 qa5 --tokenizer exported/340m --filler books \\
        --lengths 1000 16000 --count 20000 --out data/babilong.jsonl
    python tools/finetune.py exported/340m --data data/babilong.jsonl --out tuned/340m --config configs/babilong.toml
  the same as documents to pretrain on
    python tools/make_babilong.py qa1 --tokenizer data/books/tokenizer --filler books \\
        --lengths 256 2000 --count 20000 --as-text --out data/qa1.jsonl
    python tools/prepare_data.py data/qa1.jsonl --out data/qa1 --tokenizer data/books/tokenizer

No example is one that atlas-eval asks, whatever the seeds.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make_babilong.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="qa1 ... qa5, in turn")
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="of the model; lengths are in its tokens")
    parser.add_argument("--filler", required=True, metavar="FOLDER", help="text files in which the facts are hidden")
    parser.add_argument(
        "--lengths", nargs=2, type=int, required=True, metavar=("SHORTEST", "LONGEST"), help="context and question"
    )
    parser.add_argument("--count", type=int, default=10_000, help="examples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines; must not exist")
    parser.add_argument("--as-text", action="store_true", help='write {"text": ...} for tools/prepare_data.py instead')
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Write what the command line asks for; its exit status."""
    return command("make_babilong", lambda: _make(_parser().parse_args(words)), left="nothing was written")


def _make(arguments: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(arguments.tokenizer)
    folder = TextFolder(arguments.filler, tokenizer)
    rows = training_rows(arguments.tasks, tokenizer, tuple(arguments.lengths), arguments.count, arguments.seed, folder)
    count = write_rows(rows, arguments.out, arguments.as_text)
    print(f"wrote {count:,} examples to {arguments.out}")
    return 0
