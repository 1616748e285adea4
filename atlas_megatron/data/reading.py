"""The documents of many files in order, from any place on; and the place that a preparation has come to.

Imports neither torch nor Megatron, so that preparation's worker processes start fast.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from atlas_megatron.data.corpus import Document, documents
from atlas_megatron.data.records import Skipped


@dataclass(frozen=True)
class Place:
    """Behind a document: its file, how many documents of that file are done, and what was bad in the files before."""

    file: int = 0
    documents: int = 0
    skipped: int = 0
    named: tuple[str, ...] = ()


class DocumentReader:
    """Documents in order. Some are read ahead of those that are written, so their places wait here for `written`.

    On from a place, its file is read from its beginning, and the documents that are done are gone past.
    """

    def __init__(
        self,
        files: Sequence[Path],
        key: str,
        skipped: Skipped | None,
        advance: Callable[[int], None],
        place: Place | None = None,
    ) -> None:
        """skipped: where bad records are counted. advance: called with the bytes of the files that were read."""
        self._files, self._key, self._skipped, self._advance = files, key, skipped, advance
        self._place = place or Place()
        self._waiting: deque[Place] = deque()

    def __iter__(self) -> Iterator[Document]:
        begin = self._place
        for file in self._files[: begin.file]:
            self._advance(file.stat().st_size)
        if self._skipped is not None:
            self._skipped.count, self._skipped.named = begin.skipped, list(begin.named)
        for number in range(begin.file, len(self._files)):
            bad = self._bad_so_far()
            for count, document in enumerate(documents(self._files[number], self._key, self._skipped), start=1):
                if number > begin.file or count > begin.documents:
                    self._waiting.append(Place(number, count, *bad))
                    yield document
                self._advance(document.file_bytes)

    def _bad_so_far(self) -> tuple[int, tuple[str, ...]]:
        if self._skipped is None:
            return self._place.skipped, self._place.named
        return self._skipped.count, tuple(self._skipped.named)

    def written(self) -> Place:
        """The place behind the next document in order, which is now written."""
        return self._waiting.popleft()
