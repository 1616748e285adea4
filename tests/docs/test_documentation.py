"""README and the documentation: commands that exist and run, code that runs, keys and links that are there.

A fenced block of shell is run, line by line, in a folder with a small trained model. A comment before it changes that:

    <!-- run with: WORDS -->    each line is run with these words behind it, for it would take too long
    <!-- not run: REASON -->    only its commands and options are looked up
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, get_type_hints

import pytest

from atlas_megatron.config import Config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>(?:run with|not run): [^>]*) -->\n)?```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S
)
# The order of the pages is the order in which a reader runs them: a later one needs what an earlier one made.
ORDER = ("README.md", "quickstart.md", "huggingface.md")
SHELL = ("atlas-", "make ", "launch/", "python ", "torchrun ", "pip ", ".venv")
SUFFIXES = (".py", ".json", ".jsonl", ".bin", ".idx", ".toml", ".txt", ".lock")  # of files
SECONDS = 300


class Block(NamedTuple):
    page: str
    language: str
    mark: str
    body: str


class Line(NamedTuple):
    page: str
    command: str
    mark: str


def blocks() -> list[Block]:
    pages = sorted(PAGES, key=lambda page: (ORDER.index(page.name) if page.name in ORDER else len(ORDER), page.name))
    found = []
    for page in pages:
        for one in BLOCK.finditer(page.read_text(encoding="utf-8")):
            found.append(Block(page.name, one["language"], one["mark"] or "", one["body"]))
    return found


def lines() -> list[Line]:
    """Every command of a block of shell: continued lines joined, comments cut off."""
    found = []
    for block in blocks():
        if block.language == "sh":
            for text in block.body.replace("\\\n", " ").splitlines():
                command = re.sub(r"\s#.*$", "", text).strip()
                found += [Line(block.page, command, block.mark)] if command else []
    return found


@cache
def site() -> ModuleType:
    return _module("hooks")


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"docs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def help_of(name: str) -> str:
    if name.startswith("launch/"):
        return (ROOT / name).read_text(encoding="utf-8")
    return str(site().help_of(site().COMMANDS[name]))


def test_every_block_has_a_language_and_no_shell_stands_outside_of_one() -> None:
    for block in blocks():
        assert block.language in ("sh", "python", "toml", "text"), block
    for page in PAGES:
        outside = BLOCK.sub("", page.read_text(encoding="utf-8"))
        starts = tuple(f"    {word}" for word in SHELL)
        assert not [line for line in outside.splitlines() if line.startswith(starts)], page


def test_figures_are_those_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert _module("figures").main([]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_keys_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    site().linked(site().FENCED.sub("", text), page, ROOT / "docs" / page.name)
    sections = get_type_hints(Config)
    for section, key in re.findall(r"`([a-z]+)\.([a-z_0-9]+)(?:[ =][^`]*)?`", text):
        if section in sections and f".{key}" not in SUFFIXES:
            assert key in get_type_hints(sections[section]), f"{page.name} names {section}.{key}"


def test_generated_pages_have_every_key_and_every_command() -> None:
    configuration, commands = site().configuration(), site().command_lines()
    for section, kind in get_type_hints(Config).items():
        part = configuration.partition(f"## \\[{section}]")[2].partition("\n## ")[0]
        keys = get_type_hints(kind)
        assert re.findall(r"^\| `(\w+)` \|", part, re.M) == list(keys)
    assert commands.count("usage: ") == len(site().COMMANDS)
    assert "train.steps" in commands and "[run]" not in commands


@pytest.mark.parametrize("line", sorted(set(lines())), ids=lambda line: f"{line.page}: {line.command[:40]}")
def test_a_documented_command_has_its_options(line: Line) -> None:
    for command in line.command.split(" && "):
        words = shlex.split(command)
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
            assert {word for word in words[1:] if "=" not in word} <= set(targets)
        elif (name := named(words)) is not None:
            options = [word for word in words if word.startswith("--") and word != "--nproc-per-node"]
            for option in options:
                assert option.partition("=")[0] in help_of(name), f"{name} has no {option}"
        else:
            assert words[0] in ("git", "cd", "source", "pip", "curl", "docker", "srun"), line


def named(words: list[str]) -> str | None:
    """The command as docs/hooks.py names it, or a script of launch/."""
    first = words[0].rpartition("bin/")[2]
    if first.startswith("launch/"):
        return first
    if first == "torchrun":
        script = next(word for word in words if word.startswith(("tools/", "atlas_megatron.")))
        return "atlas-train" if script == "atlas_megatron.train" else f"python {script}"
    if first == "python" and words[1].startswith("tools/"):
        return f"python {words[1]}"
    return first if first in site().COMMANDS else None


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "python" and not b.mark], ids=lambda b: b.page)
def test_python_blocks_run(block: Block) -> None:
    exec(compile(block.body, block.page, "exec"), {})


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like the checkout, with small data and a run of two steps under the names that the pages use."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("configs", "launch", "tools", "atlas_megatron", "kernels", "README.md", "setup.py"):
        (folder / name).symlink_to(ROOT / name)
    sources = " ".join(map(str, sorted((ROOT / "atlas_megatron/config").glob("*.py"))))
    _run(folder, f"python tools/prepare_data.py {sources} --out data/quickstart --train-tokenizer 512 --validation 0.2")
    for name in ("mine", "other"):
        shutil.copytree(folder / "data/quickstart", folder / "data" / name)
    _run(folder, shlex.join(["atlas-train", "configs/quickstart.toml", *SHORT, "run.directory=runs/quickstart"]))
    yield folder


SHORT = ("train.steps=2", "train.warmup_steps=1", "train.validate_every=2", "train.validate_sequences=8")


def _run(folder: Path, command: str) -> None:
    paths = os.pathsep.join((str(ROOT / "kernels"), str(ROOT)))
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PYTHONPATH": paths, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_documented_lines_run_in_their_order(desk: Path) -> None:
    done = set()
    for line in lines():
        if line.mark.startswith("not run") or (line.command, line.mark) in done:
            continue
        done.add((line.command, line.mark))
        if "convert_hf.py export" in line.command and (desk / "exported/quickstart").exists():
            continue  # two pages show it
        _run(desk, f"{line.command} {line.mark.removeprefix('run with: ')}")
    assert len(done) > 15
