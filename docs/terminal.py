"""A picture of the quickstart in a terminal: `python docs/terminal.py runs/quickstart` draws it into docs/results."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).parent / "results" / "quickstart_terminal.svg"
FIRST, LAST, WRITTEN = 7, 7, 10  # lines: of the log's beginning and end, and of the sample
TIME = len("2026-01-01 00:00:00+00:00  ")  # before each line of the log; the screen does not show it
COLUMNS = 112
# rich's own template loads a font from the network.
FORMAT = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
  line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


def shown(run: Path) -> list[Text]:
    """What the screen showed of a run, shortened where a line of dots stands."""
    log = [line[TIME:] for line in (run / "log.txt").read_text(encoding="utf-8").splitlines()]
    sample = (run / "sample.txt").read_text(encoding="utf-8").splitlines()
    text = [Text("$ make quickstart", style="bold")]
    for line in (*log[:FIRST], "...", *log[-LAST:]):
        text.append(Text(line, style="green" if "validation" in line else ""))
    begins = next(place for place, line in enumerate(sample) if line.startswith("=== continuation"))
    return [*text, Text(), *(Text(line) for line in sample[begins : begins + WRITTEN])]


def main(words: list[str]) -> int:
    """Draw the run that the command line names."""
    if len(words) != 1 or not (Path(words[0]) / "sample.txt").is_file():
        print(f"docs/terminal.py: {words} is no run with a sample; give it: python docs/terminal.py runs/quickstart")
        return 2
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere)
        for line in shown(Path(words[0])):
            console.print(line, overflow="ellipsis", no_wrap=True)
    console.save_svg(str(PICTURE), title="make quickstart", code_format=FORMAT, unique_id="run")
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
