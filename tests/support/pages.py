"""What every page of results is: a caption, a picture, tables, and paragraphs that can be read."""

from __future__ import annotations

import re

LONGEST = 120  # words of a paragraph
BAR = re.compile(r"(?<!\\)\|")  # between cells; one that is escaped is a cell's own


def hold(page: str) -> None:
    """Fail where a page is not: title, caption, picture, at least one table, what made it."""
    title, caption, picture, *rest = page.rstrip("\n").split("\n\n")
    assert title.startswith("# ") and picture.startswith("![")
    made, tables = rest[-1], [block for block in rest if block.startswith("|")]
    assert made.startswith("Made by `python -m experiments.") and tables
    for table in tables:
        _hold_table(table)
    for paragraph in (caption, *rest):
        if paragraph not in tables:
            assert len(paragraph.split()) <= LONGEST, f"{len(paragraph.split())} words: {paragraph}"
            # Such a line would begin a list, a table or a quotation.
            assert not re.search(r"^([-+*>|]|\d+[.)])( |$)", paragraph, re.MULTILINE), paragraph


def _hold_table(table: str) -> None:
    head, rule, *rows = table.splitlines()
    cells = len(BAR.split(head))
    assert rows and re.fullmatch(r"\|( ---:? \|)+", rule), table
    for line in (rule, *rows):
        assert line.endswith(" |") and len(BAR.split(line)) == cells, line
