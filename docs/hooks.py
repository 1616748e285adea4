"""What mkdocs asks while it builds: pages that are made from the sources, and links that leave the documentation.

The configuration comes from the dataclasses of its sections, command lines from their parsers. Pages that stand beside
what they describe (kernels/README.md, experiments/README.md, CHANGELOG.md) are taken in.
"""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Pages of other folders, by their place here.
TAKEN_IN = {
    "kernels.md": "kernels/README.md",
    "experiments.md": "experiments/README.md",
    "changes.md": "CHANGELOG.md",
}
# Each command as it is typed, and its module.
COMMANDS = {
    "atlas-train": "atlas_megatron.train",
    "atlas-sweep": "atlas_megatron.commands.sweep",
    "atlas-generate": "atlas_megatron.generate",
    "atlas-eval": "atlas_megatron.evaluate.command",
    "atlas-serve": "atlas_megatron.serving.command",
    "atlas-doctor": "atlas_megatron.doctor",
    "python tools/prepare_data.py": "atlas_megatron.commands.prepare_data",
    "python tools/quickstart.py": "atlas_megatron.commands.quickstart",
    "python tools/plot.py": "atlas_megatron.commands.plot",
    "python tools/convert_hf.py": "atlas_megatron.commands.convert_hf",
    "python tools/finetune.py": "atlas_megatron.commands.finetune",
    "python tools/make_babilong.py": "atlas_megatron.commands.make_babilong",
    "python tools/ladder.py": "atlas_megatron.commands.ladder",
    "python tools/scaling.py": "atlas_megatron.commands.scaling",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]+)(#[^()\s]*)?\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
KEY = re.compile(r"(?P<name>\w+): (?P<type>[^=]+?)(?: = (?P<default>.*?))?(?:  # (?P<meaning>.*))?$")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    os.environ["COLUMNS"] = "100"
    pages = {"configuration.md": configuration(), "commands.md": command_lines()}
    for place, source in TAKEN_IN.items():
        pages[place] = (ROOT / source).read_text(encoding="utf-8")
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links are followed from where a page's source stands. One that leaves the documentation becomes a path."""
    place = page.file.src_uri
    source = ROOT / TAKEN_IN.get(place, f"docs/{place}")
    blocks = FENCED.findall(markdown)
    parts = [linked(part, source, DOCS / place) for part in FENCED.split(markdown)]
    return "".join(part + block for part, block in zip(parts, [*blocks, ""], strict=True))


def linked(text: str, source: Path, place: Path) -> str:
    """Text with its links as the page at `place` needs them. Raises ValueError for one that leads nowhere."""

    def one(found: re.Match[str]) -> str:
        mark, words, target, anchor = found.groups()
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        leads = Path(os.path.normpath(source.parent / target))
        generated = leads.parent == DOCS and leads.name in {"configuration.md", "commands.md", *TAKEN_IN}
        taken = {ROOT / file: DOCS / name for name, file in TAKEN_IN.items()}
        leads = taken.get(leads, leads)
        if not (leads.exists() or generated or leads in taken.values()):
            raise ValueError(f"{source.relative_to(ROOT)} links to {target}, which is not there")
        if leads.is_relative_to(DOCS) and leads.is_dir():
            return words
        if leads.is_relative_to(DOCS) and leads.suffix != ".py":
            return f"{mark}[{words}]({os.path.relpath(leads, place.parent)}{anchor or ''})"
        path = str(leads.relative_to(ROOT))
        if words == leads.stem:
            return f"`{words}`"
        return f"`{path}`" if words.strip("`") in (path, leads.name) else f"{words} (`{path}`)"

    return LINK.sub(one, text)


def configuration() -> str:
    """Every section of a configuration: its keys, types, defaults and meanings."""
    from atlas_megatron.config.toml import describe

    said = [
        "# Configuration",
        "A run is one TOML file. A word `section.key=value` on the command line wins over it. `atlas-train --help` "
        "prints this page. An unknown key is refused, and the nearest known one is named.",
    ]
    for block in describe().split("\n\n"):
        title, *lines = block.splitlines()
        rows, above = [], []
        for line in map(str.strip, lines):
            if line.startswith("#"):
                above.append(line.removeprefix("#").strip())
                continue
            found = KEY.match(line)
            assert found is not None, line
            meaning = " ".join([*above, found["meaning"] or ""]).strip()
            rows.append("| " + " | ".join(_cell(t) for t in (f"`{found['name']}`", *_typed(found), meaning)) + " |")
            above = []
        said += [f"## {_cell(title)}", "| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows)]
    return "\n\n".join(said) + "\n"


def _typed(found: re.Match[str]) -> tuple[str, str]:
    return f"`{found['type'].strip()}`", f"`{found['default']}`" if found["default"] else ""


def _cell(text: str) -> str:
    # A star or an underscore of a meaning is a symbol, not emphasis.
    parts = re.split(r"(`[^`]*`)", text.replace("|", "\\|"))
    return "".join(part if part.startswith("`") else re.sub(r"([*_<\[])", r"\\\1", part) for part in parts)


def command_lines() -> str:
    """Every command's own help."""
    said = ["# Command lines", "Each command prints its part of this page with `--help`."]
    for name, module in COMMANDS.items():
        said += [f"## {name}", f"```text\n{help_of(module).rstrip()}\n```"]
    said.append("The keys of a configuration, which `atlas-train --help` prints too, have [a page](configuration.md).")
    return "\n\n".join(said) + "\n"


def help_of(module: str) -> str:
    """What a command prints for --help; of atlas-train without the configuration, which has a page."""
    printed = io.StringIO()
    before, sys.argv = sys.argv, [module.rpartition(".")[2], "--help"]
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            import_module(module).main(["--help"])
    except SystemExit:
        pass
    finally:
        sys.argv = before
    return printed.getvalue().partition("\n[run]\n")[0]
