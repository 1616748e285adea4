"""What must hold between an optimizer's keys, and what of it Megatron-Core cannot do."""

from __future__ import annotations

from atlas_megatron.config.layers import uses
from atlas_megatron.config.sections import Config

# What decides which states an optimizer keeps, and of which parameters.
STATES = ("optimizer", "muon_memories", "muon_scalar_optimizer", "muon_layer_wise")
# Keys that would change nothing without Muon, by what they ask for.
MUONS = {"muon_memories": "moves start weights as all others", "muon_layer_wise": "is sharded in a way of its own"}


def check_optimizer(config: Config) -> None:
    """Raise ValueError where keys of the optimizer contradict each other, or core has no such optimizer."""
    train = config.train
    if train.optimizer == "adamw":
        for key, why in MUONS.items():
            if getattr(train, key):
                raise ValueError(
                    f"train.{key}=true with train.optimizer='adamw', which {why}; set train.{key}=false, or "
                    "train.optimizer='muon'"
                )
        return
    if train.muon_memories and not uses(config.model.pattern, "memory"):
        raise ValueError(
            f"train.muon_memories=true but model.pattern={config.model.pattern!r} has no memory; set it false"
        )
    if train.muon_memories and config.memory.locals:
        raise ValueError(
            f"train.muon_memories=true with memory.locals={list(config.memory.locals)}, whose start weights are "
            "several matrices a head; set train.muon_memories=false"
        )
    if train.muon_layer_wise and train.precision == "float32":
        raise ValueError(
            "train.muon_layer_wise=true with train.precision='float32': core's layer-wise optimizer takes bfloat16 "
            "parameters alone; set train.precision='bfloat16', or train.muon_layer_wise=false"
        )
    if train.muon_layer_wise and train.muon_scalar_optimizer != "adam":
        raise ValueError(
            f"train.muon_layer_wise=true with train.muon_scalar_optimizer={train.muon_scalar_optimizer!r}, whose "
            "states core does not shard; set muon_scalar_optimizer='adam', or muon_layer_wise=false"
        )


def states_differences(ours: Config, theirs: Config) -> list[str]:
    """The keys, as ``train.key: ours, theirs``, by which two optimizers keep other states."""
    if ours.train.optimizer == theirs.train.optimizer == "adamw":
        return []
    pairs = [(key, getattr(ours.train, key), getattr(theirs.train, key)) for key in STATES]
    return [f"train.{key}: {mine!r}, the checkpoint has {other!r}" for key, mine, other in pairs if mine != other]
