"""One preparation in several processes, on one machine or many: each takes a run of the files, one joins them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shard:
    """The part `number` of `count`, counted from 0."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.number < self.count:
            raise ValueError(
                f"there is no shard {self.number}/{self.count}; the first of four is 0/4, the last one 3/4"
            )

    @staticmethod
    def parse(word: str) -> Shard:
        """Read `I/N`. Raises ValueError."""
        number, _, count = word.partition("/")
        if not (number.isdecimal() and count.isdecimal()):
            raise ValueError(f"{word!r} names no shard; the first of four is 0/4, the last one 3/4")
        return Shard(int(number), int(count))

    def folder(self, out: Path) -> Path:
        """Where it lies until it is merged into `out`."""
        return out.with_name(f"{out.name}.{self.number}-of-{self.count}")

    def of(self, files: Sequence[Path]) -> list[Path]:
        """Its files: neighbours in order, so that shards one after the other are the whole; of about equal bytes.

        Raises ValueError where there are fewer files than shards.
        """
        if len(files) < self.count:
            raise ValueError(
                f"{len(files)} files cannot be shared out to {self.count} shards; give {len(files)} shards or fewer, "
                "or split the files"
            )
        sizes = [file.stat().st_size for file in files]
        whole, before, begins = sum(sizes), 0, [0]
        for place, size in enumerate(sizes):
            wanted = len(begins)
            if wanted == self.count:
                break
            # A shard begins where its share does, and early enough to leave each later one a file.
            due = before + size / 2 >= whole * wanted / self.count or len(files) - place == self.count - wanted
            if place > begins[-1] and due:
                begins.append(place)
            before += size
        return list(files[begins[self.number] : [*begins, len(files)][self.number + 1]])


def shards(count: int) -> list[Shard]:
    """All of so many. Raises ValueError for none."""
    if count < 1:
        raise ValueError(f"{count} shards cannot be merged; give as many as there are")
    return [Shard(number, count) for number in range(count)]
