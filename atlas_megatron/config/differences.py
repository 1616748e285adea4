"""What tells one configuration from another: from the defaults, for the screen, and from the one that a run had."""

from __future__ import annotations

from dataclasses import fields, replace

from atlas_megatron.config.presets import PRESETS
from atlas_megatron.config.sections import Config, MemoryConfig
from atlas_megatron.config.values import toml_value

# Where a run lies, and how it is watched and repaired, make nothing of what it learns another.
ASIDE = (
    "run.directory", "data.workers", "data.allow_change", "log.", "resilience.", "parallel.", "checkpoint.",
    "train.log_every", "train.stats_every", "train.evaluate_", "train.sample_", "train.profile",
)  # fmt: skip


def changed_toml(config: Config) -> str:
    """The keys that differ from their defaults, as TOML; a preset's own keys are its defaults. `load` reads it back.

    Where the run lies is always said.
    """
    defaults = replace(Config(), memory=MemoryConfig(**PRESETS.get(config.memory.preset, {})))
    blocks = []
    for section in fields(config):
        values, usual = getattr(config, section.name), getattr(defaults, section.name)
        lines = [
            f"{f.name} = {toml_value(getattr(values, f.name))}"
            for f in fields(values)
            if getattr(values, f.name) != getattr(usual, f.name) or (section.name, f.name) == ("run", "directory")
        ]
        if lines:
            blocks.append("\n".join([f"[{section.name}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def differences(ours: Config, theirs: Config) -> list[str]:
    """The keys, as ``section.key=ours (was theirs)``, by which a run would learn otherwise."""
    found = []
    for section in fields(ours):
        a, b = getattr(ours, section.name), getattr(theirs, section.name)
        for f in fields(a):
            name, mine, other = f"{section.name}.{f.name}", getattr(a, f.name), getattr(b, f.name)
            if mine == other or name.startswith(ASIDE):
                continue
            if name == "model.pattern" and mine.replace("|", "") == other.replace("|", ""):
                continue
            found.append(f"{name}={toml_value(mine)} (was {toml_value(other)})")
    return found


def model_differences(ours: Config, theirs: Config) -> list[str]:
    """The fields, as ``section.key: ours, theirs``, in which two configurations describe different models.

    How a model is run (implementation and outer gradient of the memory, Transformer Engine, pipeline cuts) is not part
    of what it is, nor is how long its sequences are: ours may be longer.
    """
    found = []
    for section in ("model", "memory", "attention", "recurrent", "delta", "experts"):
        a, b = getattr(ours, section), getattr(theirs, section)
        for f in fields(a):
            mine, other = getattr(a, f.name), getattr(b, f.name)
            if f.name in ("impl", "preset", "anchor_gradient", "transformer_engine"):
                continue
            if f.name == "pattern":
                mine, other = mine.replace("|", ""), other.replace("|", "")
            grows = f.name == "seq_length"
            if mine != other and not (grows and mine > other):
                more = " (it may grow, not shrink)" if grows else ""
                found.append(f"{section}.{f.name}: {mine!r}, the checkpoint has {other!r}{more}")
    return found
