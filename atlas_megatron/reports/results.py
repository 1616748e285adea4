"""Results that grow cell by cell in one JSON file: what is finished is on the disk and never computed again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from atlas_megatron.files.scratch import write_whole

PACKAGES = ("torch", "megatron-core", "numpy", "matplotlib")

Cell = dict[str, Any]


class Results:
    """One JSON file: a header that says what made it, its settings, and named cells."""

    def __init__(self, path: Path, header: dict[str, Any], settings: dict[str, Any]) -> None:
        """Take up what is there. Raises ValueError where it was made with other settings, or is no JSON."""
        self.path = path
        # Through JSON and back, so that tuples compare equal to the lists they are stored as.
        settings = json.loads(json.dumps(settings))
        made = {
            "commit": commit(), "versions": versions(),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        }  # fmt: skip
        self.content: dict[str, Any] = {**header, **made, "settings": settings, "cells": {}}
        if self.path.is_file():
            self._take_up(header, settings)

    def _take_up(self, header: dict[str, Any], settings: dict[str, Any]) -> None:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            there = stored["settings"]
            if not (isinstance(there, dict) and isinstance(stored["cells"], dict)):
                raise ValueError("its settings or its cells are no object")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path} holds no results; move it away, or choose another --out") from error
        other = sorted(key for key in settings | there if settings.get(key) != there.get(key))
        if other:
            raise ValueError(
                f"{self.path} was made with other constants ({', '.join(other)}); move it away, or choose another --out"
            )
        self.content = stored | header

    @property
    def cells(self) -> dict[str, Cell]:
        """The finished cells by name."""
        return self.content["cells"]

    def cell(self, name: str, compute: Callable[[], Cell], said: str = "") -> None:
        """Compute and store the cell, unless it is there; says how long it took. said: its name for people."""
        if name in self.cells:
            return
        started = time.perf_counter()
        found = compute()
        cell = {"seconds": round(time.perf_counter() - started, 2), **found, "commit": commit()}
        self.cells[name] = cell
        self._save()
        print(f"{self.path.stem}: {said or name} ({cell['seconds']:.1f} s)", flush=True)

    def _save(self) -> None:
        # Renamed whole: an interrupted run leaves the cells it had.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.content, indent=1) + "\n")


def commit() -> str:
    """What `git describe` calls this project's tree."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
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
