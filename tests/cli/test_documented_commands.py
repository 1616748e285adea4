"""Every command of README, docs/ and the help texts that names a config: it loads, and fits the world it is given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from atlas_megatron.config import Config, load
from atlas_megatron.config.checks import validate
from atlas_megatron.estimate.machine import Machine, in_nodes, is_machine_word

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")))
SOURCES = (*PAGES, "atlas_megatron/train.py", "launch/local.sh", "launch/slurm.sh")
STARTS = (r"\S*atlas-train", r"launch/local\.sh", r"launch/slurm\.sh", r"torchrun .* atlas_megatron\.train")
COMMAND = re.compile(rf"^ *((?:{'|'.join(STARTS)}) configs/.*)$", re.MULTILINE)


def documented() -> list[tuple[str, str]]:
    """(file, command): continued lines joined, comments cut off."""
    found = []
    for source in SOURCES:
        text = (ROOT / source).read_text(encoding="utf-8").replace("\\\n", " ")
        found += [(source, command.partition("#")[0].strip()) for command in COMMAND.findall(text)]
    return found


def option(words: list[str], name: str, default: int) -> int:
    return int(words[words.index(name) + 1]) if name in words else default


def world_of(words: list[str]) -> int:
    """Processes that the command starts or asks about."""
    asked = [int(word.partition("=")[2]) for word in words if word.startswith("world=")]
    if asked:
        return asked[0]
    if "slurm.sh" in words[0]:
        gpus = option(words, "--gpus-per-node", 8)
        return option(words, "--nodes", 1) * (gpus or option(words, "--processes-per-node", 1))
    return option(words, "--nproc-per-node", 1) * option(words, "--processes", 1)


def test_commands_are_found() -> None:
    assert len(documented()) >= 15
    assert {source for source, _ in documented()} >= {*SOURCES} - {*PAGES} | {"README.md"}


@pytest.mark.parametrize(("source", "command"), documented())
def test_the_config_takes_them(source: str, command: str) -> None:
    words = shlex.split(command)
    (path,) = [word for word in words if re.fullmatch(r"configs/\S+\.toml", word)]
    overrides = [word for word in words if re.match(r"[a-z_0-9]+\.[a-z_0-9]+=", word)]
    sweeps: list[list[str]] = [[]]
    if "--array" in words:
        key, _, values = words[words.index("--array") + 1].partition("=")
        overrides.remove(f"{key}={values}")
        sweeps = [[f"{key}={value}"] for value in values.split(",")]
    if "--plan" in words:
        # It looks for layouts that fit the world; the config need not.
        assert Machine.of([word for word in words[words.index("--plan") + 1 :] if is_machine_word(word)]).devices
        sweeps = []
    for sweep in sweeps:
        config = load(ROOT / path, [*overrides, *sweep])
        # A process a GPU of any machine; where a dry run is asked about a larger one, in nodes.
        validate(in_nodes(config), max(world_of(words), smallest(config)))


def smallest(config: Config) -> int:
    """Processes that the layout takes at least, where a command takes all GPUs that it finds."""
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.context
