"""`--version`, the same in every command."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = "atlas-megatron"
# What decides the numbers that come out, beside this package.
BESIDE = ("torch", "megatron-core")


def add_version(parser: argparse.ArgumentParser) -> None:
    """Give a command its `--version`."""
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions and leave")


def versions() -> str:
    """One line: this package's version, then those that it computes with."""
    beside = ", ".join(f"{package} {_of(package)}" for package in BESIDE)
    return f"{PACKAGE} {_of(PACKAGE)} ({beside})"


class _Version(argparse.Action):
    """Looked up when it is asked for: each package's metadata is a file."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(versions())
        parser.exit()


def _of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _of_the_checkout() if package == PACKAGE else "not installed"


def _of_the_checkout() -> str:
    """Of a checkout that is used without being installed."""
    setup = Path(__file__).resolve().parents[2] / "setup.py"
    lines = setup.read_text(encoding="utf-8").splitlines() if setup.is_file() else []
    said = [line.split('"')[1] for line in lines if line.strip().startswith('version="')]
    return said[0] if said else "unknown"
