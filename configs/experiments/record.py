"""What an experiment leaves behind: a JSON that grows cell by cell, a picture, a paragraph; and how it is started."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: a machine that trains has no screen
from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
STYLE = {
    "figure.dpi": 160,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
PACKAGES = ("torch", "megatron-core", "numpy", "matplotlib")

Cell = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    quick: bool
    out: Path


def options(name: str, description: str, words: Sequence[str] | None) -> Options:
    """Read the command line of configs/experiments/<name>.py."""
    parser = argparse.ArgumentParser(
        prog=f"{name}.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: python configs/experiments/{name}.py --quick",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny grid, a minute or two; into runs/experiments")
    parser.add_argument("--out", type=Path, help="folder of the results (docs/results, with --quick runs/experiments)")
    given = parser.parse_args(words)
    default = ROOT / ("runs/experiments" if given.quick else "docs/results")
    return Options(given.quick, given.out or default)


class Record:
    """The results of one experiment, <out>/<name>.json: each finished cell is on the disk and never run again."""

    def __init__(self, name: str, asked: Options, settings: dict[str, Any]) -> None:
        """Take up what is there. Raises ValueError where it was made with other settings, or is no JSON."""
        self.path = asked.out / f"{name}.json"
        command = f"python configs/experiments/{name}.py{' --quick' if asked.quick else ''}"
        # Through JSON and back, so that tuples compare equal to the lists they are stored as.
        settings = json.loads(json.dumps(settings))
        self.content: dict[str, Any] = {
            "experiment": name, "command": command, "commit": commit(), "versions": versions(),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "settings": settings, "cells": {},
        }  # fmt: skip
        if self.path.is_file():
            self._take_up(settings)

    def _take_up(self, settings: dict[str, Any]) -> None:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            there = stored["settings"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self.path} holds no results; move it away, or choose another --out") from error
        other = sorted(key for key in settings | there if settings.get(key) != there.get(key))
        if other:
            raise ValueError(
                f"{self.path} was made with other constants ({', '.join(other)}); move it away, or choose another --out"
            )
        self.content = stored

    @property
    def cells(self) -> dict[str, Cell]:
        """The finished cells by name."""
        return self.content["cells"]

    def cell(self, name: str, compute: Callable[[], Cell]) -> None:
        """Compute and store the cell, unless it is there; says how long it took."""
        if name in self.cells:
            return
        started = time.perf_counter()
        found = compute()
        seconds = round(time.perf_counter() - started, 2)
        self.cells[name] = {**found, "seconds": seconds, "commit": commit()}
        self._save()
        print(f"{self.content['experiment']}: {name} ({seconds:.1f} s)", flush=True)

    def _save(self) -> None:
        # Renamed whole: an interrupted run leaves the cells it had.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    def save_figure(self, figure: Figure) -> None:
        """The picture, beside the JSON."""
        figure.savefig(self.path.with_suffix(".png"))
        pyplot.close(figure)

    def write_text(self, title: str, paragraphs: Sequence[str]) -> None:
        """The text, beside the JSON: what was seen, and the command that shows it again."""
        name = self.path.stem
        body = [textwrap.fill(" ".join(paragraph.split()), 110, break_on_hyphens=False) for paragraph in paragraphs]
        said = [f"# {title}", f"![{title}]({name}.png)", *body]
        command, made_at = self.content["command"], self.content["commit"]
        made = f"Made by `{command}`, commit {made_at}; numbers in [{name}.json]({name}.json)."
        self.path.with_suffix(".md").write_text("\n\n".join([*said, made]) + "\n", encoding="utf-8")


def commit() -> str:
    """What `git describe` calls this tree."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return described.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Python's and those of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def run(name: str, experiment: Callable[[], None]) -> int:
    """Run a script's body; 0, or 2 after one line on what is wrong."""
    try:
        experiment()
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0
