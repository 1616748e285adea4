"""How every picture of the project looks. Importing it sends them to files: a machine that trains has no screen."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from atlas_megatron.files.scratch import file_beside

matplotlib.use("Agg")

STYLE = {
    "figure.dpi": 160,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def check_name(path: Path) -> None:
    """Raise ValueError for a name that no picture can have, before it is drawn."""
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in known:
        raise ValueError(f"'{path}' is no picture's name; let it end with one of .{', .'.join(known)}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file that can be replaced; name another one")


def save(figure: Figure, path: Path) -> Path:
    """Write a picture, whole or not at all, and close it; its path. Raises as `check_name`."""
    from matplotlib import pyplot

    try:
        check_name(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_beside(path) as written:
            figure.savefig(written, format=path.suffix.lower().removeprefix("."))
    finally:
        pyplot.close(figure)
    return path


def plain(name: str) -> str:
    """A name as a picture shows it: no mathematics between dollars, in one line, and never hidden from a legend."""
    shown = " ".join(name.split()).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
