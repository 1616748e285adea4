"""Where the shipped configurations lie: in the checkout, or in an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# setup.py puts the checkout's configs/ into the wheel as atlas_megatron/configs.
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def config_file(path: str | Path) -> Path:
    """The path itself; or the shipped file, for a path that begins with configs/ and is not in this folder."""
    path = Path(path)
    if path.is_file() or path.is_absolute() or path.parts[:1] != ("configs",):
        return path
    shipped = CONFIGS.joinpath(*path.parts[1:])
    return shipped if shipped.is_file() else path
