"""ATLAS as a transformers model: layers by the symbols of the pattern, and a cache that is the memory.

Dims: B batch, T tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from .attention_atlas import FullAttention, WindowAttention
from .baselines_atlas import GRU, LSTM, DeltaNet, GatedDeltaNet
from .cache_atlas import AtlasCache
from .configuration_atlas import AtlasConfig
from .hybrid_atlas import MemoryAsContext, MemoryAsGate
from .memory_atlas import AtlasMemory
from .place_atlas import Place, place_of

logger = logging.get_logger(__name__)

MIXERS: dict[str, type[nn.Module]] = {
    "M": AtlasMemory,
    "*": WindowAttention,
    "F": FullAttention,
    "A": MemoryAsGate,
    "C": MemoryAsContext,
    "R": GRU,
    "L": LSTM,
    "D": DeltaNet,
    "G": GatedDeltaNet,
}
# Linears back to the hidden width: they start the smaller the deeper the model is, as Megatron's do.
BACK_TO_HIDDEN = ("linear_out", "linear_read", "linear_down")


class SwiGLU(nn.Module):
    """silu(gate) * up, projected back; the rows of `linear_gate_up` are all of gate, then all of up."""

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        self.linear_gate_up = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.linear_down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, state: None, place: Place) -> tuple[Tensor, None]:
        gate, up = self.linear_gate_up(x).chunk(2, -1)
        return self.linear_down(F.silu(gate) * up), None


class AtlasLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x))."""

    def __init__(self, config: AtlasConfig, symbol: str) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mixer = SwiGLU(config) if symbol == "-" else MIXERS[symbol](config)

    def forward(self, x: Tensor, state: Any, place: Place) -> tuple[Tensor, Any]:
        y, after = self.mixer(self.norm(x), state, place)
        return x + y, after


class AtlasPreTrainedModel(PreTrainedModel):
    config_class = AtlasConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # What a memory has learned cannot be taken back.
    _is_stateful = True
    _no_split_modules = ["AtlasLayer"]
    _skip_keys_device_placement = ["past_key_values"]

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.init_std
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=std / math.sqrt(getattr(module, "depth", 1)))
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif hasattr(module, "start"):
            for name, value in module.start().items():  # type: ignore[operator]
                init.copy_(module.get_parameter(name), value)

    def load_memory(self, path: str | Path) -> AtlasCache:
        """A memory that `AtlasCache.save_memory` wrote, for this model's `past_key_values`.

        Raises ValueError where the file is none, or of another model.
        """
        return AtlasCache.load_memory(path, self.config, self.device)


class AtlasModel(AtlasPreTrainedModel):
    """Embedding, layers, final norm."""

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__(config)
        unknown = sorted(set(config.pattern) - {*MIXERS, "-"})
        if unknown or not config.pattern:
            raise ValueError(f"pattern={config.pattern!r} has unknown symbols {unknown}; use {' '.join(MIXERS)} -")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([AtlasLayer(config, symbol) for symbol in config.pattern])
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_epsilon)
        self.gradient_checkpointing = False
        for name, module in self.layers.named_modules():
            if name.rpartition(".")[2] in BACK_TO_HIDDEN:
                module.depth = 2 * len(config.pattern)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: AtlasCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **ignored: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T], or inputs_embeds [B, T, hidden], continue what `past_key_values` has read.

        attention_mask [B, T], or with columns for what was read before: 0 for padding, on the left; on the right where
        no cache is asked for. Raises ValueError for padding that a layer cannot keep apart, or inside a text.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if ignored.get("position_ids") is not None:
            raise ValueError("position_ids was given; the layers count positions themselves: leave it out")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.gradient_checkpointing and self.training and (use_cache or past_key_values is not None):
            logger.warning_once("use_cache=True does not go with gradient checkpointing; no cache is kept")
            use_cache, past_key_values = False, None
        asked = past_key_values is not None or bool(use_cache)
        keeps = asked or (use_cache is None and self.config.use_cache and not self.training)
        position = past_key_values.position if past_key_values is not None else 0
        place, cut_short = place_of(position, attention_mask, *x.shape[:2])
        if cut_short and asked:
            raise ValueError(
                "attention_mask ends with padding, which a memory would learn from; pad on the left "
                "(tokenizer.padding_side='left'), or call with use_cache=False"
            )
        self._check_apart(place)

        before = past_key_values.states if past_key_values is not None else [None] * len(self.layers)
        states, seen = [], [x]
        for layer, state in zip(self.layers, before, strict=True):
            x, after = layer(x, state, place)
            states.append(after)
            if output_hidden_states:
                seen.append(x)
        x = self.norm(x)
        if keeps and not cut_short:
            past_key_values = AtlasCache(self.config) if past_key_values is None else past_key_values
            past_key_values.advance(states, place.after, x.shape[1])
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*seen[:-1], x) if output_hidden_states else None,
        )

    def _check_apart(self, place: Place) -> None:
        """Raise ValueError for rows that do not stand alike where a layer wants them to."""
        if place.documents is None:
            return
        kernel, pattern = self.config.memory["kernel"], self.config.pattern
        lacking = ""
        if "C" in pattern:
            lacking = "C layers, whose segments are those of every row"
        elif kernel != "lifted" and set("MA") & set(pattern):
            lacking = f"memory.kernel={kernel!r}, whose sources are those of every row"
        if lacking:
            raise ValueError(
                f"attention_mask has padding on the left, which this model cannot keep apart: {lacking}; give prompts "
                "of one length, or one at a time"
            )


class AtlasForCausalLM(AtlasPreTrainedModel, GenerationMixin):
    """AtlasModel and its output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__(config)
        self.model = AtlasModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The model makes its own.
        return False

    # transformers reads the names here: `kwargs` stands for what `forward` takes.
    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: AtlasCache | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if past_key_values is not None and not is_first_iteration:
            # New tokens are never padding, and looking at the mask would make the host wait for the device.
            attention_mask = None
        return super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: AtlasCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **rest: Any,
    ) -> CausalLMOutputWithPast:
        """As AtlasModel. labels [B, T]: input_ids again; they are shifted here, and -100 is left out of the loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            position_ids=rest.pop("position_ids", None),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **rest)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
