"""Every figure of README and of the documentation comes from a JSON of docs/results, through this file.

A figure carries a mark behind it, which GitHub and mkdocs do not show:

    1.873<!-- quickstart.json bits_per_byte .3f -->

that is a file, a path into it, and a format of Python. A table that is made whole stands between two marks:

    <!-- table: trainers -->
    <!-- end of table -->

`python docs/figures.py` fails where a figure is not what its JSON says; with --write it is put right.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
FIGURE = re.compile(r"(?P<shown>[+-]?[\d.,]+)(?P<stars>\**)<!-- (?P<file>\w+\.json) (?P<path>\S+) (?P<form>\S+) -->")
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def pages() -> list[Path]:
    """README and the documentation, but for the pages that experiments write."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def figure(found: re.Match[str]) -> str:
    value = read(found["file"])
    for key in found["path"].split("/"):
        value = value[key]
    # Between the number and its mark may stand the stars of bold type.
    mark = found[0].removeprefix(found["shown"])
    return f"{value:{found['form']}}{mark}"


def made(rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown; the first is the head, and all but the first column hold numbers."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---|" + "---:|" * (len(rows[0]) - 1), *body]) + "\n"


def memory() -> str:
    """benchmarks.memory: milliseconds, and beside titans-pytorch."""
    shapes, peer = read("memory_cpu.json")["shapes"], "titans-pytorch NeuralMemory"
    head = ["forward and backward"]
    for name in shapes:
        head += [f"{name.replace(' ', ', ')}: ms", "times titans-pytorch's"]
    rows = [head]
    first = next(iter(shapes.values()))["seconds"]
    for name in first:
        if "reference" in name or name.endswith(": op"):
            continue
        cells = [name.removesuffix(": layer")]
        for shape in shapes.values():
            seconds = shape["seconds"]
            cells += [f"{1e3 * seconds[name]:,.0f}", f"{seconds[name] / seconds[peer]:.2f}"]
        rows.append(cells)
    return made(rows)


def trainers() -> str:
    """benchmarks.trainers: tokens a second by kind of model and length."""
    speeds = read("trainers_cpu.json")["tokens_per_second"]
    lengths = list(next(iter(speeds.values())))
    rows = [["tokens/s at sequence length", *(f"{int(length):,} tokens" for length in lengths)]]
    return made(rows + [[kind, *(f"{by[length]:,.0f}" for length in lengths)] for kind, by in speeds.items()])


def presets() -> str:
    """benchmarks.presets: seconds beside OmegaNet's, and what packed documents add."""
    found = read("presets_cpu.json")
    packed, cuts = found["packed_over_whole"], found["documents"]
    heads = [f"extra time: {len(cuts[name])} documents in {sum(cuts[name]):,} tokens" for name in packed]
    rows = [["preset", "times OmegaNet's seconds", *heads]]
    for preset, ratio in found["of_omeganet"].items():
        percents = [round(100 * (by[preset] - 1)) if preset in by else None for by in packed.values()]
        more = ["" if n is None else f"{n:+d} %" if n else "0 %" for n in percents]
        rows.append([preset, f"{ratio:.2f}", *more])
    return made(rows)


def serving() -> str:
    """benchmarks.serving: tokens a second, time to the first token."""
    ways = read("serving_cpu.json")["ways"]
    said = {"vllm": "vLLM", "generate": "transformers' generate", "atlas": "atlas-generate"}
    first = ways["vllm"]
    requests, lengths = list(first["tokens_per_second"]), list(first["first_token_seconds"])
    head = [f"{number} at once: tokens/s" for number in requests]
    rows = [["", *head, *(f"{int(length) // 1024}K read: s to the first token" for length in lengths)]]
    for way, by in ways.items():
        speeds = [f"{by['tokens_per_second'][number]:,.0f}" for number in requests]
        rows.append([said[way], *speeds, *(f"{by['first_token_seconds'][length]:.2f}" for length in lengths)])
    return made(rows)


def sessions() -> str:
    """benchmarks.serving: bytes of a session by the tokens that it has read."""
    found = read("serving_cpu.json")["session_bytes"]
    said = {"model": "this model", "full attention": "the same with full attention for every mixer"}
    lengths = list(found["model"])
    rows = [["", *(f"after {int(length):,} tokens" for length in lengths)]]
    return made(rows + [[said[kind], *(f"{by[length]:,}" for length in lengths)] for kind, by in found.items()])


def shards() -> str:
    """benchmarks.shards: tokens a second, and beside the plain memory of the same chunk."""
    shapes = read("shards_cpu.json")["shapes"]
    rows = [["tokens/s (times the plain memory's)", *shapes]]
    for name in next(iter(shapes.values())):
        cells = []
        for shape in shapes.values():
            times = shape[name].get("times_the_plain")
            cells.append(f"{shape[name]['tokens_per_second']:,}" + (f" ({times:.2f})" if times else ""))
        rows.append([name, *cells])
    return made(rows)


def optimizers() -> str:
    """experiments.language_model: bits per byte after a quarter of the tokens, by outer optimizer and seed."""
    stage, cells = "optimizers: ", read("language_model.json")["cells"]
    seeds = sorted({name.rpartition(", ")[2] for name in cells if name.startswith(stage) and ", seed " in name})
    names = ["AdamW", "Muon", "Muon, memories too"]
    rows = [["bits per byte", *seeds]]
    for name in names:
        found = [cells.get(f"{stage}{name}, {seed}") for seed in seeds]
        if any(found):
            rows.append([name, *(f"{cell['bits_per_byte']:.3f}" if cell else "" for cell in found)])
    return made(rows)


TABLES: dict[str, Callable[[], str]] = {
    "optimizers": optimizers,
    "memory": memory,
    "trainers": trainers,
    "presets": presets,
    "shards": shards,
    "serving": serving,
    "sessions": sessions,
}


def put_right(text: str) -> str:
    """A page with every figure as its JSON says."""
    return TABLE.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], FIGURE.sub(figure, text))


def main(words: Sequence[str] | None = None) -> int:
    """Check all pages, or write them anew."""
    write = "--write" in (sys.argv[1:] if words is None else words)
    wrong = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        right = put_right(text)
        if text != right and write:
            page.write_text(right, encoding="utf-8")
        elif text != right:
            lines = [line for line in right.splitlines() if line not in text.splitlines()]
            wrong.append(f"{page.relative_to(ROOT)} does not say what docs/results has: {lines[0]}")
    said = [*wrong, "run python docs/figures.py --write"] if wrong else ["figures: all as docs/results has them"]
    print("\n".join(said))
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
