"""Options that several commands have."""

from __future__ import annotations

import argparse


def add_trust_remote_code(parser: argparse.ArgumentParser) -> None:
    """--trust-remote-code, of what opens an exported model."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that lies in an exported folder; without it, the code installed here reads its weights",
    )
