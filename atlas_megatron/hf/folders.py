"""What both directions of a conversion share: lists of parameters, and of disagreements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atlas_megatron.config import Config
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.hf.names import Name


def config_of(description: AtlasConfig) -> Config:
    """A run's configuration that describes this model; all else in it is where it starts."""
    whole = Config()
    sections: dict[str, Any] = {
        name: replace(getattr(whole, name), **values) for name, values in description.sections().items()
    }
    return replace(whole, **sections)


def check_shapes(
    source: Path, wanted: Sequence[tuple[str, tuple[int, ...]]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError naming every tensor that is missing, too much, or of another shape than the configuration's."""
    names = {name for name, _ in wanted}
    wrong = [f"{name} is missing" for name, _ in wanted if name not in found]
    wrong += [f"{name} is of no layer" for name in found if name not in names]
    wrong += [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in wanted
        if name in found and tuple(found[name]) != shape
    ]
    if wrong:
        raise ValueError(f"{source} does not hold what its configuration says: {'; '.join(wrong)}")


def listing(parameters: Sequence[tuple[Name, tuple[int, ...]]]) -> str:
    """The mapping, a line a parameter: both names, shape, layout."""
    rows = [(name.megatron, name.hf, str(list(shape)), name.layout) for name, shape in parameters]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
