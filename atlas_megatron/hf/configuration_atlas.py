"""What an ATLAS model is: the sections [model], [memory], [attention], [recurrent] and [delta] of its configuration."""

from __future__ import annotations

import copy
from dataclasses import fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from packaging.version import Version
from transformers import PretrainedConfig

from .kernels_atlas import MemoryRule, layer_start

if TYPE_CHECKING:
    from .mixer_atlas import Mixer

# Of transformers; setup.py names the same. This file is the first that is imported of a model.
MINIMUM = "5.0.0"
if Version(transformers.__version__).release < Version(MINIMUM).release:
    raise ValueError(
        f"transformers {transformers.__version__} is older than {MINIMUM}, the first that ATLAS models run with; "
        f"install a newer one: pip install 'transformers>={MINIMUM}'"
    )

# All that travels with a model, in the form in which transformers reads of a file what belongs to it: 5.0.0 copies what
# is named here alone, and later ones tell folders of one name apart by the content of these files.
TRAVELS = """
import .attention
import .attention_atlas
import .autocast
import .baselines_atlas
import .cache_atlas
import .cells
import .chunked
import .convolution_atlas
import .decays
import .delta_rule
import .dual
import .features
import .gated_delta
import .gated_norm
import .gelu
import .hybrid_atlas
import .kernels_atlas
import .layer_norm
import .layer_start
import .layout
import .leaving
import .local_memories
import .memories
import .memory_atlas
import .mixer_atlas
import .mlp_once
import .mlp_scan
import .mlp_sources
import .modeling_atlas
import .newton_schulz
import .one_token
import .op
import .packing
import .place_atlas
import .products
import .projection
import .reads
import .reference
import .registry_atlas
import .room
import .rule
import .shards
import .short_conv
import .write_gate
import .writes
"""

# Keys under the names that they had in exports of before.
RENAMED = {("memory", "memory"): "network"}
# The keys of each section and where they start. What they mean: `atlas-train --help`. What a memory learns by starts as
# the kernels have it.
SECTIONS: dict[str, dict[str, Any]] = {
    "memory": {
        "preset": "",
        **{RENAMED.get(("memory", f.name), f.name): f.default for f in fields(MemoryRule)},
        "heads": 4,
        "head_dim": 64,
        "expansion": 4,
        "feature_map": "hadamard",
        "degree": 2,
        "sketch_width": 0,
        "omega_gates": "pair",
        "step_in_momentum": False,
        "retention": True,
        "write_gate": False,
        "locals": (),
        "projection": False,
        "conv_size": 4,
        "late_keys": True,
        "open_gate": True,
        "copy_start": True,
        "gate_rank": 32,
        "alpha_start": 0.0,
        "theta_start": 0.9,
        "gamma_start": 0.5,
        "eta_start": 0.0,
        "eta_per_token": 0.005,
        "eta_sum": 0.1,
        "impl": "auto",
    },
    "attention": {
        "heads": 4,
        "head_dim": 64,
        "window": 128,
        "rotary_base": 10000.0,
        "persistent": 0,
        "segment": 128,
    },
    "recurrent": {"heads": 4, "head_dim": 64},
    "delta": {
        "heads": 4,
        "head_dim": 64,
        "conv_size": 4,
        "late_keys": False,
        "open_gate": False,
        "copy_start": False,
        "impl": "auto",
    },
}
# The [model] section's keys lie flat in the configuration.
MODEL = (
    "pattern",
    "hidden_size",
    "ffn_hidden_size",
    "vocab_size",
    "seq_length",
    "tied_embeddings",
    "norm_epsilon",
    "init_std",
    "transformer_engine",
)
# Of the memory's keys those that came after models had been exported, and what such a folder's model is.
LATER = {"open_gate": False, "copy_start": False, "residual": True}
# What a model whose state is of constant size answers to tools that want a longest input: it has none.
ENDLESS = 1 << 20
# Names that generic tools read; each follows from the description.
FOLLOWING = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
# How a model is run, not what it is.
RUN = ("impl", "preset", "anchor_gradient", "transformer_engine")


class FollowsError(NotImplementedError, ValueError):
    """Another value for what follows from other keys: transformers' tools expect the first base, ours the second."""


class AtlasConfig(PretrainedConfig):
    """An ATLAS model. pattern: one symbol a layer, as in `model.pattern`, without pipeline cuts.

    The class behind each symbol stands in registry_atlas.py.
    memory, attention, recurrent, delta: the sections of those names; keys that are not given start as SECTIONS has
    them. gradient_reach: see `memory_atlas.reach_of`. Raises ValueError for a key that a section does not have.
    """

    model_type = "atlas"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "tie_word_embeddings": "tied_embeddings",
        "intermediate_size": "ffn_hidden_size",
        "initializer_range": "init_std",
        "rms_norm_eps": "norm_epsilon",
    }

    def __init__(
        self,
        pattern: str = "M-M-*-M-",
        hidden_size: int = 256,
        ffn_hidden_size: int = 704,
        vocab_size: int = 4096,
        seq_length: int = 512,
        tied_embeddings: bool = True,
        norm_epsilon: float = 1e-5,
        init_std: float = 0.02,
        transformer_engine: bool = False,
        memory: dict[str, Any] | None = None,
        attention: dict[str, Any] | None = None,
        recurrent: dict[str, Any] | None = None,
        delta: dict[str, Any] | None = None,
        use_cache: bool = True,
        gradient_reach: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **rest: Any,
    ) -> None:
        self.pattern = pattern.replace("|", "")
        self.hidden_size = hidden_size
        self.ffn_hidden_size = ffn_hidden_size
        self.vocab_size = vocab_size
        self.seq_length = seq_length
        self.tied_embeddings = tied_embeddings
        self.norm_epsilon = norm_epsilon
        self.init_std = init_std
        self.transformer_engine = transformer_engine
        # A folder's configuration names its architecture and lists all keys of its time.
        if "architectures" in rest:
            memory = {RENAMED.get(("memory", key), key): value for key, value in (memory or {}).items()}
            memory = {**LATER, "eta_per_token": layer_start.former_eta_per_token(memory), **memory}
        self.memory = _complete("memory", memory)
        self.attention = _complete("attention", attention)
        self.recurrent = _complete("recurrent", recurrent)
        self.delta = _complete("delta", delta)
        self.use_cache = use_cache
        if gradient_reach is not None and (type(gradient_reach) is not int or gradient_reach < 0):
            raise ValueError(f"gradient_reach={gradient_reach!r} is no number of tokens; give 0 or more, or none")
        self.gradient_reach = gradient_reach
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        super().__init__(**rest)

    # What other people's tools ask a configuration for, as attributes and in config.json.

    @property
    def num_hidden_layers(self) -> int:
        return len(self.pattern)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        self._refuse_other("num_hidden_layers", value, "pattern has one symbol a layer; change that")

    @property
    def num_attention_heads(self) -> int:
        """Of the attention layers; without any, of the first mixer's."""
        return getattr(self, self._heads_in)["heads"]

    @num_attention_heads.setter
    def num_attention_heads(self, value: int) -> None:
        self._refuse_other("num_attention_heads", value, f"change {self._heads_in}['heads']")

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @num_key_value_heads.setter
    def num_key_value_heads(self, value: int) -> None:
        self._refuse_other("num_key_value_heads", value, "every head has keys of its own")

    @property
    def head_dim(self) -> int:
        """As num_attention_heads."""
        return getattr(self, self._heads_in)["head_dim"]

    @head_dim.setter
    def head_dim(self, value: int) -> None:
        self._refuse_other("head_dim", value, f"change {self._heads_in}['head_dim']")

    def _refuse_other(self, name: str, value: int, remedy: str) -> None:
        if value != getattr(self, name):
            raise FollowsError(f"{name}={value} cannot be set, it is {getattr(self, name)} of this model: {remedy}")

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of the longest input. No layer has embeddings of positions; full attention and exponential kernels
        hold all that was read, and answer the length of training."""
        return max(self.seq_length, 0 if self.grows else ENDLESS)

    @max_position_embeddings.setter
    def max_position_embeddings(self, value: int) -> None:
        self.seq_length = value

    @property
    def grows(self) -> bool:
        """Whether the state grows with what was read."""
        return any(mixer.grows(self) for mixer in self._mixers)

    @property
    def _heads_in(self) -> str:
        found = [mixer.section for mixer in self._mixers if mixer.section]
        return "attention" if "attention" in found or not found else found[0]

    @property
    def _mixers(self) -> list[type[Mixer]]:
        """The classes of the layers, in their order."""
        # Here: the layers' files import this one.
        from .registry_atlas import MIXERS

        return [MIXERS[symbol] for symbol in self.pattern if symbol in MIXERS]

    def section(self, name: str) -> Any:
        """A section with its keys as attributes: `MemorySection` of layer_start.py, and more."""
        return SimpleNamespace(**getattr(self, name))

    def sections(self) -> dict[str, dict[str, Any]]:
        """The description of the model as Megatron's configuration has it, [model] included."""
        return {"model": {key: getattr(self, key) for key in MODEL}} | {
            name: dict(getattr(self, name)) for name in SECTIONS
        }

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {name: getattr(self, name) for name in FOLLOWING}

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: the whole description, whatever the keys' starts will be one day."""
        described = {key: getattr(self, key) for key in (*MODEL, *SECTIONS, *FOLLOWING)}
        return super().to_diff_dict() | copy.deepcopy(described)


def differences(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> list[str]:
    """The keys, as ``section.key: ours, theirs``, in which two of `AtlasConfig.sections` are different models."""
    found = []
    for section in ours:
        keys = dict.fromkeys((*ours[section], *theirs.get(section, {})))
        for key in (key for key in keys if key not in RUN):
            mine, other = ours[section].get(key), theirs.get(section, {}).get(key)
            if _as_json(mine) != _as_json(other):
                found.append(f"{section}.{key}: {mine!r}, not {other!r}")
    return found


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _complete(section: str, given: dict[str, Any] | None) -> dict[str, Any]:
    given = {RENAMED.get((section, key), key): value for key, value in (given or {}).items()}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}  # as JSON has it
    unknown = sorted(set(given) - set(SECTIONS[section]))
    if unknown:
        raise ValueError(
            f"{section} holds unknown keys {', '.join(unknown)}; keys of {section}: {', '.join(SECTIONS[section])}"
        )
    return SECTIONS[section] | given
