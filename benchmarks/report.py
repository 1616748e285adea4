"""The JSON of a timing: figures under the command, commit, machine and versions that made them."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from atlas_megatron.reports.results import commit


def made_by(name: str, device: str = "") -> dict[str, Any]:
    """The head of a report. name: the benchmark's module; device: what was timed on, if not all threads of this CPU."""
    return {
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "commit": commit(),
        "device": f"{platform.processor() or platform.machine()}, {device or f'{torch.get_num_threads()} threads'}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def write(path: Path, report: dict[str, Any]) -> None:
    """Write a report, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
