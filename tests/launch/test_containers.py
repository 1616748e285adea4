"""launch/containers: what can be held of a Dockerfile without docker, and pip's resolution of the pins.

Neither has been built. Here instructions are parsed, and what would make a build of tomorrow another one is refused.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "launch/containers").glob("Dockerfile.*"))
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
EXTRAS = ["hf", "muon", "eval"]  # by default
KNOWN = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "CMD"}
# Options of pip that let it take what the pins do not name.
LOOSE = {"-U", "--upgrade", "-i", "--index-url", "--extra-index-url", "-f", "--find-links", "--pre", "--no-index"}
WITH_VALUE = {"-c", "--constraint", "-r", "--requirement", "-e", "--editable"}


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~;\s]", requirement.strip(), maxsplit=1)[0].lower().replace("_", "-")


PINNED = {name_of(line) for line in CONSTRAINTS.splitlines() if "==" in line and not line.startswith("#")}


def project() -> dict[str, Any]:
    """What setup.py tells setuptools."""
    with patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return dict(setup.call_args.kwargs)


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile: comments out, continued lines in one."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(first.upper(), rest.strip()) for first, _, rest in (line.partition(" ") for line in whole.splitlines())]


def commands(run: str) -> list[list[str]]:
    """The words of each command of a RUN."""
    return [shlex.split(part) for part in re.split(r"&&|\s\|\s", run)]


def wrong_with(text: str) -> list[str]:
    """What a Dockerfile does that it must not."""
    found, wrong = instructions(text), []
    if not found or found[0][0] != "FROM":
        wrong.append("does not begin with FROM")
    for kind, rest in found:
        if kind not in KNOWN:
            wrong.append(f"{kind} is no instruction that these files use")
        elif kind == "FROM":
            tag = re.fullmatch(r"[\w./-]+:([\w.-]+)", rest)
            if not tag or tag[1] in ("latest", "devel", "main"):
                wrong.append(f"{rest} has no tag that stays")
        elif kind == "COPY":
            wrong += [f"{source} is not there" for source in rest.split()[:-1] if not (ROOT / source).exists()]
        elif kind == "RUN":
            for words in commands(rest):
                wrong += wrong_with_pip(words)
    if re.search(r"https?://", text):
        wrong.append("names an address")
    return wrong


def wrong_with_pip(words: list[str]) -> list[str]:
    if "install" not in words or not any(word == "pip" or word.endswith("/pip") for word in words):
        return []
    words = words[words.index("install") + 1 :]
    wrong = [f"pip takes {word}" for word in words if word.partition("=")[0] in LOOSE]
    pins = any(word in ("-c", "--constraint") for word in words) or "--no-deps" in words
    if not pins:
        wrong.append(f"pip install {' '.join(words)} has no pins")
    values = {place + 1 for place, word in enumerate(words) if word in WITH_VALUE}
    for place, word in enumerate(words):
        if place not in values and not word.startswith("-") and "==" not in word and name_of(word) not in PINNED:
            wrong.append(f"pip installs {word}, which constraints.txt does not pin")
    return wrong


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_dockerfile_is_sound(file: Path) -> None:
    assert wrong_with(file.read_text()) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("FROM nvidia/cuda", "has no tag that stays"),
        ("FROM nvidia/cuda:latest", "has no tag that stays"),
        ("RUN pip install einops", "has no pins"),
        ("RUN a && python -m pip install -c constraints.txt left-pad", "left-pad, which constraints.txt does not pin"),
        ("RUN .venv/bin/pip install -c constraints.txt -U einops", "pip takes -U"),
        ("RUN pip install -c constraints.txt --index-url=x einops", "pip takes --index-url"),
        ("COPY nowhere /opt", "nowhere is not there"),
        ("ADD x y", "ADD is no instruction"),
        ("RUN wget https://example.org/x", "names an address"),
    ],
)
def test_what_is_not_sound_is_found(line: str, said: str) -> None:
    text = f"FROM image:1.0\nWORKDIR /x\n{line}\n"
    assert [words for words in wrong_with(text) if said in words], wrong_with(text)


def test_both_are_there_and_bring_the_project() -> None:
    assert [file.name for file in FILES] == ["Dockerfile.cuda", "Dockerfile.ngc"]
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    for file in FILES:
        copies = [rest.split()[:-1] for kind, rest in instructions(file.read_text()) if kind == "COPY"]
        copied = {source for sources in copies for source in sources}
        assert {"setup.py", "constraints.txt", "atlas_megatron", "kernels", "configs", "tools", "launch"} <= copied
        assert not copied & set(ignored)
    told = (ROOT / "docs/containers.md").read_text()
    assert "**Neither of these has been built.**" in told and all(file.name in told for file in FILES)


def test_every_requirement_of_what_is_installed_is_pinned() -> None:
    said = project()
    for file in FILES:
        default = dict(instructions(file.read_text()))["ARG"].partition("=")[2].strip('"')
        extras = re.split(r"[,|]", default)
        assert extras == EXTRAS and set(extras) <= said["extras_require"].keys()
        wanted = [*said["install_requires"], *(word for extra in extras for word in said["extras_require"][extra])]
        assert not {name_of(word) for word in wanted} - PINNED


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_shell_of_a_run_parses(file: Path) -> None:
    for kind, rest in instructions(file.read_text()):
        if kind == "RUN":
            assert subprocess.run(["bash", "-n", "-c", rest], capture_output=True, check=False).returncode == 0, rest


def test_on_ngc_all_but_torch_is_asked_for(tmp_path: Path) -> None:
    """The very words of the Dockerfile, on metadata of the project's form."""
    ngc = (ROOT / "launch/containers/Dockerfile.ngc").read_text()
    (run,) = (rest for kind, rest in instructions(ngc) if kind == "RUN")
    (pins,) = (part for part in run.split("&&") if "constraints.txt > " in part)
    (listed,) = (part for part in run.split("&&") if "importlib.metadata" in part)
    said = project()
    lines = [*said["install_requires"]]
    lines += [f'{word}; extra == "{extra}"' for extra, words in said["extras_require"].items() for word in words]
    metadata = tmp_path / "atlas_megatron-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    required = "".join(f"Requires-Dist: {line}\n" for line in lines)
    metadata.write_text(f"Metadata-Version: 2.1\nName: atlas-megatron\nVersion: 0.1.0\n{required}")
    (tmp_path / ".venv").mkdir()
    (tmp_path / "constraints.txt").write_text(CONSTRAINTS)
    python = f"env PYTHONPATH={shlex.quote(str(tmp_path))} {sys.executable} -S"
    script = f"EXTRAS='{'|'.join(EXTRAS)}'; set -e; {pins}; {listed.replace('.venv/bin/python', python)}"
    subprocess.run(["bash", "-o", "pipefail", "-c", script], cwd=tmp_path, check=True)
    asked = (tmp_path / ".venv/requirements.txt").read_text().split("\n")[:-1]
    extras = [word for extra in EXTRAS for word in said["extras_require"][extra]]
    assert sorted(asked) == sorted(word for word in (*said["install_requires"], *extras) if name_of(word) != "torch")
    kept = {name_of(line) for line in (tmp_path / ".venv/constraints.txt").read_text().splitlines()}
    assert {"megatron-core", "transformers", "numpy", "setuptools"} <= kept
    assert not {name for name in kept if re.match("torch|triton|nvidia-|cuda-", name)}


@pytest.mark.slow
def test_pip_resolves_the_pins(tmp_path: Path) -> None:
    """As Dockerfile.cuda asks for them, from nothing; nothing is installed."""
    pip = [sys.executable, "-m", "pip"]
    asked = subprocess.run([*pip, "index", "versions", "einops"], capture_output=True, timeout=120, check=False)
    if asked.returncode:
        pytest.skip("no package index answers here: whether the pins fit each other is not tried")
    said, report = project(), tmp_path / "report.json"
    words = [*said["install_requires"], *(word for extra in EXTRAS for word in said["extras_require"][extra])]
    dry = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
    command = [*pip, *dry, "-c", str(ROOT / "constraints.txt"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    found = {one["metadata"]["name"]: one["metadata"]["version"] for one in json.loads(report.read_text())["install"]}
    assert {name_of(name) for name in found} <= PINNED and found["megatron-core"] == "0.19.2"
