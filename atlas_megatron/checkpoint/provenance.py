"""What a run is trained with, as every checkpoint carries it: the tokenizer's files, and what tells data from others.

A run that goes on compares: with another tokenizer, or other data under the same name, it would train on without sense.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atlas_megatron.config import Config
from atlas_megatron.data.batches import blend
from atlas_megatron.data.declared_tokens import TOKENIZER_FILES, carried
from atlas_megatron.data.tokenizer import Tokenizer, load_tokenizer

DATA = "data.json"
# A file is told from another by its size and by so many windows of so many bytes: a terabyte is not read whole.
WINDOWS, WINDOW = 64, 1 << 16


@dataclass(frozen=True)
class Provenance:
    """Tokenizer and data as they were when a run started, or when it was looked."""

    files: dict[str, bytes]  # of the tokenizer
    said: dict[str, Any]  # what `data.json` says: the tokenizer's fingerprint, and each set of the training data

    @staticmethod
    def of(config: Config) -> Provenance:
        """What the configuration names; what is not there is left out, as of an import that has no data yet."""
        folder = Path(config.data.tokenizer)
        files = carried(folder) if config.data.tokenizer else {}
        said: dict[str, Any] = {}
        if files:
            said["tokenizer"] = load_tokenizer(folder).fingerprint
        pairs = blend(config.data.train)
        if pairs and all(Path(f"{prefix}.{kind}").is_file() for _, prefix in pairs for kind in ("idx", "bin")):
            said["train"] = [
                {"prefix": prefix, "weight": weight, "digest": _digest(prefix)} for weight, prefix in pairs
            ]
        return Provenance(files, said)

    def write(self, folder: Path) -> None:
        """Into a checkpoint."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        (folder / DATA).write_text(json.dumps(self.said, indent=1) + "\n", encoding="utf-8")

    def changes_since(self, checkpoint: Path) -> list[str]:
        """In which of both this is another than a checkpoint's: `tokenizer`, `data`; what it does not say is not told.

        Checkpoints from before the data were noted hold a tokenizer alone. Raises ValueError for a broken `data.json`.
        """
        before = _read(checkpoint)
        own = None if "tokenizer" in before else own_tokenizer(checkpoint)
        if own:
            before["tokenizer"] = own.fingerprint
        changed = []
        if before.get("tokenizer", self.said.get("tokenizer")) != self.said.get("tokenizer"):
            changed.append("tokenizer")
        if "train" in before and _drawn(before["train"]) != _drawn(self.said.get("train", [])):
            changed.append("data")
        return changed


def own_tokenizer(checkpoint: Path) -> Tokenizer | None:
    """The tokenizer that a checkpoint carries; None where it has none, as those of weights alone may."""
    return load_tokenizer(checkpoint) if any((checkpoint / name).is_file() for name in TOKENIZER_FILES) else None


def digests(checkpoint: Path) -> dict[str, str]:
    """What a checkpoint notes of its training data: the digest of each set, by its prefix; empty where it notes none.

    Raises ValueError for a broken `data.json`.
    """
    sets = _read(checkpoint).get("train", [])
    return {one["prefix"]: one["digest"] for one in sets if {"prefix", "digest"} <= one.keys()}


def refusal(checkpoint: Path, config: Config, changes: list[str]) -> str:
    """One line: what differs from what the checkpoint was trained with, and what to do."""
    lines = {
        "tokenizer": f"with another tokenizer than data.tokenizer={config.data.tokenizer} is now",
        "data": f"on other data than data.train={list(config.data.train)} are now",
    }
    said = " and ".join(lines[change] for change in changes)
    return (
        f"{checkpoint} was trained {said}; bring the former back (a checkpoint carries its tokenizer's files), choose "
        "another run.directory, or set data.allow_change=true to go on with what there is now"
    )


def _drawn(sets: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """What decides what is read: a set may lie elsewhere by now."""
    return [(one.get("weight"), one.get("digest")) for one in sets]


def _read(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / DATA
    if not file.is_file():
        return {}
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        _drawn(said.get("train", []))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is broken ({error}); bring it back from a copy") from error
    return said


def _digest(prefix: str) -> str:
    """SHA-256 over the sizes of a .bin/.idx pair and evenly spaced windows of both."""
    found = hashlib.sha256()
    for kind in ("idx", "bin"):
        file = Path(f"{prefix}.{kind}")
        size = file.stat().st_size
        found.update(f"{kind} {size}\n".encode())
        with file.open("rb") as stream:
            last = max(0, size - WINDOW)
            for start in sorted({last * number // (WINDOWS - 1) for number in range(WINDOWS)}):
                stream.seek(start)
                found.update(stream.read(WINDOW))
    return found.hexdigest()
