"""--version, in every command."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from atlas_megatron.cli.version import versions
from atlas_megatron.generate import main

ROOT = Path(__file__).parents[2]
FILES = [file for room in ("tools", "benchmarks", "atlas_megatron") for file in (ROOT / room).rglob("*.py")]
COMMANDS = sorted(file for file in FILES if "= argparse.ArgumentParser(" in file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", COMMANDS, ids=lambda file: file.name)
def test_every_command_takes_it(file: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert any(isinstance(called, ast.Name) and called.id == "add_version" for called in calls)


def test_it_names_what_decides_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert not left.value.code
    said = capsys.readouterr().out
    assert said == f"{versions()}\n" and said.startswith("atlas-megatron 0.") and "(torch 2." in said


def test_a_tool_says_nothing_else() -> None:
    """Not even what Megatron-Core warns of when it is imported."""
    command = [sys.executable, str(ROOT / "tools" / "ladder.py"), "--version"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    )
    assert (done.stdout, done.stderr) == (f"{versions()}\n", "")
