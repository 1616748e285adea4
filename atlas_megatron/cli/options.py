"""Options that several commands have."""

from __future__ import annotations

import argparse
import re

UNITS = {"": 1, "K": 1024, "M": 1024**2}


def add_trust_remote_code(parser: argparse.ArgumentParser) -> None:
    """--trust-remote-code, of what opens an exported model."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that lies in an exported folder; without it, the code installed here reads its weights",
    )


def lengths_of(text: str, option: str = "--lengths") -> tuple[int, ...]:
    """Tokens of a list as 1000,4K,10M, in rising order. Raises ValueError for another form."""
    found = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)([kKmM]?)", word.strip())
        if not match:
            raise ValueError(f"{option} {text!r}: {word.strip()!r} is no length; write for example 1000,4K,10M")
        found.append(int(match[1]) * UNITS[match[2].upper()])
    return tuple(sorted(set(found)))
