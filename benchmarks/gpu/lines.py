"""Figures as lines of one file, each on the disk before the next is measured; and what they come to together."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FILE = "check.jsonl"
# What became of a part of a section.
BEGUN, DONE, FAILED, SKIPPED = "begun", "done", "failed", "skipped"


class Lines:
    """Appends to the check.jsonl of a folder; several processes may do so in turn."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE

    def add(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def figure(self, at: tuple[str, ...], value: object) -> None:
        """at: section's title first, then as deep as it goes."""
        self.add({"at": at, "is": value})

    def part(self, section: str, part: str, state: str, why: str = "") -> None:
        self.add({"section": section, "part": part, "state": state} | ({"why": why} if why else {}))

    def read(self) -> list[dict[str, Any]]:
        """All whole lines: of a process that was killed the last one may be half a line."""
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


def of_last_run(lines: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what the last run said of itself, its lines and those of earlier ones of the same code on the same device)."""
    headers = [line["run"] for line in lines if "run" in line]
    if not headers:
        return {}, lines
    same = {key: headers[-1].get(key) for key in ("commit", "device", "dry_run")}
    kept, taken = [], False
    for line in lines:
        if "run" in line:
            taken = all(line["run"].get(key) == value for key, value in same.items())
        elif taken:
            kept.append(line)
    return headers[-1], kept


def figures(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures by section, as deep as their names; of two of one name the later one."""
    found: dict[str, Any] = {}
    for line in lines:
        if "at" in line:
            *path, last = line["at"]
            inner = found
            for name in path:
                if not isinstance(inner.get(name), dict):
                    inner[name] = {}
                inner = inner[name]
            inner[last] = line["is"]
    return found


def states(lines: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[str, str]]:
    """(section, part): (its last state, why)."""
    return {
        (line["section"], line["part"]): (line["state"], line.get("why", "")) for line in lines if "state" in line
    }
