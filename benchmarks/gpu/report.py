"""check.json and check.md, made of the lines that there are, whenever a section ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.gpu.lines import BEGUN, DONE, Lines, figures, of_last_run, states


def write(lines: Lines) -> dict[str, Any]:
    """Both files, beside the lines; what check.json holds."""
    run, kept = of_last_run(lines.read())
    found = states(kept)
    report = run | {
        "sections": figures(kept),
        "not_run": {
            f"{section} / {part}": why or ("did not end" if state == BEGUN else state)
            for (section, part), (state, why) in found.items()
            if state != DONE
        },
    }
    _whole(lines.path.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    _whole(lines.path.with_suffix(".md"), markdown(report))
    return report


def _whole(path: Path, text: str) -> None:
    """Renamed into place: a kill leaves the one that was there."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def markdown(report: dict[str, Any]) -> str:
    """The goals beside what was measured, every figure as a row, and what was not run."""
    dry = "Host code on the fake GPU: nothing was measured"
    title = f"# {dry if report.get('dry_run') else report.get('device')}"
    rows = [title, "", f"`{report.get('command')}` at {report.get('commit')}", ""]
    if not report.get("dry_run"):
        rows += [
            "The last run; check.jsonl has every one. *Green*: all errors are within the tolerances of "
            "benchmarks/gpu/numerics.py.", "", goals.table(report["sections"]),
        ]  # fmt: skip
    rows += ["| what | figure |", "|---|---|", *_rows("", report["sections"])]
    rows += [f"| {name} | not run: {why} |" for name, why in report["not_run"].items()]
    return "\n".join(rows) + "\n"


def _rows(name: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in _rows(f"{name} / {key}" if name else key, inner)]
    if isinstance(value, list) and any(isinstance(item, float) for item in value):
        return []
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return [f"| {name} | {shown[:300]} |".replace("\n", " ")]
