"""Figures that stand in a committed JSON: a command writes them, or compares with them and names what differs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atlas_megatron.cli.version import add_version

ROOT = Path(__file__).resolve().parents[1]
Figures = dict[str, dict[str, Any]]


def parser_of(command: str, described: str | None, table: Path) -> argparse.ArgumentParser:
    """The parser of a command that measures `table`, with --write and --check."""
    parser = argparse.ArgumentParser(
        description=described,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: python -m {command} --check",
    )
    add_version(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help=f"write {table.relative_to(ROOT)}")
    what.add_argument("--check", action="store_true", help="compare with it; exit 1 where something grew")
    return parser


def asked(parser: argparse.ArgumentParser, words: Sequence[str] | None, table: Path) -> argparse.Namespace:
    """The parsed words. Ends with status 2 where there is nothing to compare with."""
    arguments = parser.parse_args(words)
    if arguments.check and not table.exists():
        parser.error(f"{table.relative_to(ROOT)} is not there; run with --write first")
    return arguments


def said(bad: Sequence[str], good: Sequence[str]) -> int:
    """Print what is only worth saying, and to stderr what must not be. The exit status: 1 where something must not."""
    for line in good:
        print(f"{line}; --write keeps it")
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


def write(table: Path, report: Mapping[str, Any]) -> None:
    """Write a table. `report` begins with the command and versions that made it."""
    table.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {table.relative_to(ROOT)}")
