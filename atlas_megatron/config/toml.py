"""A configuration read from TOML, changed by ``section.key=value`` words, and written as TOML again."""

from __future__ import annotations

import difflib
import inspect
import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from atlas_megatron.config.presets import PRESETS
from atlas_megatron.config.sections import LATER, RENAMED, Config
from atlas_megatron.config.shipped import config_file
from atlas_megatron.config.values import parse_word, toml_value, typed

# Parts of Megatron's words for what has no key here, and what would do.
NOT_HERE = {
    "fsdp": "FSDP is not built here. AdamW's states are sharded over data ranks already, Muon's by "
    "train.muon_layer_wise=true; parallel.tensor, pipeline and context split the rest",
    "offload": "nothing is offloaded to the CPU. train.recompute=true, a smaller train.micro_batch and more devices "
    "save memory",
    "tp_comm": "tensor-parallel communication does not overlap with products here. parallel.sequence=true, or fewer "
    "parallel.tensor, send less",
    "mtp": "multi-token prediction is not built here. Leave it out",
}


def load_saved(path: str | Path) -> Config:
    """The configuration that a run saved, which lists all keys of its time: one of LATER that it lacks was not there
    yet. Raises as `load`."""
    return load(path, absent=LATER)


def load(
    path: str | Path, overrides: Sequence[str] = (), *, absent: Mapping[str, Mapping[str, Any]] | None = None
) -> Config:
    """Read a TOML file, then apply ``section.key=value`` words to it, last word winning.

    A shipped file is found as configs/NAME.toml from anywhere. A value is written as in TOML; a bare word is a string.
    absent: keys of each section where the file does not have them: a value, or what makes it of the section. Raises
    ValueError for an unknown section or key (the nearest known one is named), a value of another type, a word of
    another form, or a file that is not TOML.
    """
    path = config_file(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; name a config, for example configs/quickstart.toml")
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}; mend that line") from error
    tables = {section: _under_new_names(section, table) for section, table in tables.items()}
    for section, table in tables.items():
        _check_key(section)
        if not isinstance(table, dict):
            raise ValueError(f"config section {section!r} is {table!r}; write it as a table: [{section}]")
    for section, keys in (absent or {}).items():
        table = tables.get(section, {})
        was = {key: value(table) if callable(value) else value for key, value in keys.items()}
        tables[section] = was | table
    memory = tables.get("memory", {})
    if "preset" in memory:
        tables["memory"] = _preset(memory["preset"]) | memory
    presets = [word.partition("=")[2] for word in overrides if word.startswith("memory.preset=")]
    if presets:
        tables["memory"] = tables.get("memory", {}) | _preset(parse_word(presets[-1], str))
    for word in overrides:
        name, equals, value = word.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot and section and key):
            raise ValueError(f"{word!r} is not an override; write section.key=value, for example train.steps=100")
        key = RENAMED.get((section, key), key)
        _check_key(section, key)
        tables.setdefault(section, {})[key] = parse_word(value, _types(section)[key])
    config = _from_tables(tables)
    pattern = cut_evenly(config.model.pattern, config.parallel.pipeline * config.parallel.virtual)
    return replace(config, model=replace(config.model, pattern=pattern))


def _under_new_names(section: str, table: Any) -> Any:
    """Keys of a section as they are called now. Raises ValueError where one stands under both names."""
    if not isinstance(table, dict):
        return table
    for (where, old), new in RENAMED.items():
        if where == section and old in table and new in table:
            raise ValueError(f"{section}.{old} is the former name of {section}.{new}, and both are given; keep {new}")
    return {RENAMED.get((section, key), key): value for key, value in table.items()}


def cut_evenly(pattern: str, stages: int) -> str:
    """The pattern with cuts into so many pipeline stages of about as many blocks each, unless it has cuts of its own.

    A block is a mixer with the MLP or the experts behind it. A pattern of fewer blocks than stages stays as it is.
    """
    blocks = re.findall("[^-E][-E]?|[-E]", pattern)
    if "|" in pattern or not 1 < stages <= len(blocks):
        return pattern
    ends = [round(len(blocks) * stage / stages) for stage in range(stages + 1)]
    return "|".join("".join(blocks[a:b]) for a, b in itertools.pairwise(ends))


def _preset(name: Any) -> dict[str, Any]:
    if name == "":
        return {}
    if name not in PRESETS:
        raise ValueError(
            f"memory.preset={name!r} is unknown; {_nearest(str(name), list(PRESETS))}presets: {', '.join(PRESETS)}"
        )
    return PRESETS[name]


def to_toml(config: Config) -> str:
    """The whole resolved configuration as TOML; `load` reads it back to an equal Config."""
    blocks = []
    for section in fields(config):
        values = getattr(config, section.name)
        lines = [f"{f.name} = {toml_value(getattr(values, f.name))}" for f in fields(values)]
        blocks.append("\n".join([f"[{section.name}]", *lines]))
    return "\n\n".join(blocks) + "\n"


@cache
def describe() -> str:
    """Every section with its keys, defaults and meanings, as declared above: the config's help."""
    blocks = []
    for section, kind in _sections().items():
        names = {f.name for f in fields(kind)}
        lines = [line.strip() for line in inspect.getsource(kind).splitlines()]
        kept = [f"  {line}" for line in lines if line.startswith("#") or line.partition(":")[0] in names]
        blocks.append("\n".join([f"[{section}]", *kept]))
    return "\n\n".join(blocks)


@cache
def _sections() -> dict[str, type]:
    """Each section's class. Kept, as are the keys' types: reading them takes longer than all else that `load` does."""
    return get_type_hints(Config)


@cache
def _types(section: str) -> dict[str, type]:
    return get_type_hints(_sections()[section])


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def _check_key(section: str, key: str | None = None) -> None:
    sections = list(_sections())
    if section not in sections:
        raise ValueError(
            f"unknown config section {section!r}; {_nearest(section, sections)}sections: {', '.join(sections)}"
        )
    keys = list(_types(section))
    if key is not None and key not in keys:
        for part, instead in NOT_HERE.items():
            if part in key:
                raise ValueError(f"{section}.{key}: {instead} (docs/scale.md)")
        raise ValueError(
            f"unknown config key {f'{section}.{key}'!r}; {_nearest(key, keys)}keys of [{section}]: {', '.join(keys)}"
        )


def _from_tables(tables: dict[str, Any]) -> Config:
    built = {}
    for section, table in tables.items():
        for key in table:
            _check_key(section, key)
        types = _types(section)
        kind = _sections()[section]
        built[section] = kind(**{key: typed(f"{section}.{key}", value, types[key]) for key, value in table.items()})
    return Config(**built)
