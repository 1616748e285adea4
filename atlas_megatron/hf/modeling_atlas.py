"""ATLAS as a transformers model: layers by the symbols of the pattern, and a cache that is the memory.

Dims: B batch, T tokens.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from .cache_atlas import AtlasCache
from .configuration_atlas import AtlasConfig
from .place_atlas import TokenPositions, Unpacked, check_packing, exporting, of_any_length, padding_of, place_of
from .registry_atlas import MIXERS

# As in configuration_atlas.py: transformers asks each file that it begins with.
TRAVELS = """
import .attention
import .attention_atlas
import .autocast
import .baselines_atlas
import .cache_atlas
import .cells
import .chunked
import .configuration_atlas
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
logger = logging.get_logger(__name__)

PRINTED = 64  # numbers of each parameter in `weights_print`
# Linears back to the hidden width: they start the smaller the deeper the model is, as Megatron's do.
BACK_TO_HIDDEN = ("linear_out", "linear_read", "linear_down")


class AtlasLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x))."""

    def __init__(self, config: AtlasConfig, symbol: str) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mixer = MIXERS[symbol](config)

    def forward(self, x: Tensor, state: Any, place: TokenPositions) -> tuple[Tensor, Any]:
        y, after = self.mixer(self.norm(x), state, place)
        return x + y, after


def print_of(parameters: dict[str, tuple[tuple[int, ...], Tensor]]) -> str:
    """See `AtlasPreTrainedModel.weights_print`. parameters: shape and first PRINTED numbers, by name."""
    found = hashlib.sha256()
    for name, (shape, first) in sorted(parameters.items()):
        found.update(f"{name} {shape}\n".encode())
        found.update(first.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


class AtlasPreTrainedModel(PreTrainedModel):
    config_class = AtlasConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
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

        Raises ValueError where the file is none, damaged, or of another model.
        """
        return AtlasCache.load_memory(path, self.config, self.device, self.weights_print())

    def weights_print(self) -> str:
        """SHA-256 of the first numbers of every parameter, in bfloat16: equal weights have one print in any precision.

        Only the base model's parameters count. Another training gives another print; a change of few numbers may not.
        """
        named = self.base_model.named_parameters()
        return print_of({name: (tuple(p.shape), p.detach().flatten()[:PRINTED]) for name, p in named})


class AtlasModel(AtlasPreTrainedModel):
    """Embedding, layers, final norm."""

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__(config)
        unknown = sorted(set(config.pattern) - set(MIXERS))
        if unknown or not config.pattern:
            raise ValueError(f"pattern={config.pattern!r} has unknown symbols {unknown}; use {' '.join(MIXERS)}")
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
        position_ids: Tensor | None = None,
        **ignored: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T], or inputs_embeds [B, T, hidden], continue what `past_key_values` has read.

        attention_mask [B, T], or with columns for what was read before: 0 for padding, on the left; on the right where
        no cache is asked for. What is given at padding is without meaning. position_ids [B or 1, T]: 0 where a packed
        document begins; None: all of a row is one text. Raises ValueError for padding and documents that a layer
        cannot keep apart in a cache, padding inside a text, and a cache of another kind.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        check_packing(position_ids, ignored)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        self._check_shape(x)
        asked, keeps = self._caching(past_key_values, use_cache, x.shape[0])
        read, columns = (0, 0) if past_key_values is None else (past_key_values.position, past_key_values.columns)
        batch, tokens = x.shape[:2]
        padding = padding_of(attention_mask, read, batch, tokens)
        if padding is not None and padding.right and asked:
            raise ValueError(
                "attention_mask ends with padding, which a memory would learn from; pad on the left "
                "(tokenizer.padding_side='left'), or call with use_cache=False"
            )
        # Without a cache, every row's text is moved to the first column, as if it stood alone.
        aligned = padding is not None and not asked and (padding.right or not keeps or bool(self._alike()))
        place = place_of(read, columns, batch, tokens, position_ids, padding, aligned)
        alone = place.documents is not None and bool(self._alike())
        if alone and asked:
            raise ValueError(
                f"attention_mask has padding on the left, or position_ids packed documents, which this model cannot "
                f"keep apart in a cache: {self._alike()}; give texts of one length, one a row, or use_cache=False"
            )
        moved = padding if aligned and padding is not None and padding.left else None
        x = x if moved is None else moved.to_the_left(x)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x, states, seen = self._through(x, past_key_values, place, output_hidden_states)
        if moved is not None:
            x, seen = moved.back(x), [moved.back(hidden) for hidden in seen]
        if keeps and not aligned and not alone:
            past_key_values = AtlasCache(self.config) if past_key_values is None else past_key_values
            past_key_values.advance(states, place.after, tokens, padding is None or padding.begun)
            past_key_values.model = self.weights_print
        return BaseModelOutputWithPast(
            last_hidden_state=x, past_key_values=past_key_values, hidden_states=tuple(seen) if seen else None
        )

    def _through(
        self, x: Tensor, cache: AtlasCache | None, place: TokenPositions, remember: bool
    ) -> tuple[Tensor, list[Any], list[Tensor]]:
        """x [B, T, hidden] after every layer and the last norm; the layers' states; what went into each, and came out
        in the end, where it is to be remembered. Documents become rows where a layer wants rows that stand alike; the
        states are then of no use."""
        unpacked = Unpacked.of(place.documents) if place.documents is not None and self._alike() else None
        if unpacked is not None:
            x, place = unpacked.apart(x), TokenPositions(0, unpacked.length, None, unpacked.length)
        before = cache.states if cache is not None else [None] * len(self.layers)
        states, seen = [], []
        for layer, state in zip(self.layers, before, strict=True):
            if remember:
                seen.append(x)
            x, after = layer(x, state, place)
            states.append(after)
        x = self.norm(x)
        seen = [*seen, x] if remember else []
        return (x, states, seen) if unpacked is None else (unpacked.back(x), states, [unpacked.back(h) for h in seen])

    def _check_shape(self, x: Tensor) -> None:
        """Raise ValueError where x is not [B, T, hidden] of at least one token; and where a graph is exported for any
        T, if a layer is unrolled over it."""
        if x.dim() != 3:
            shape = (*x.shape[:-1],)
            raise ValueError(f"the input has shape {shape}; expected [B, T], one text a row: add a dimension")
        if x.shape[1] == 0:
            raise ValueError(
                f"the input has shape {tuple(x.shape[:2])}, no token; give at least one, such as the end-of-text token "
                "that every text begins after"
            )
        unrolled = sorted(symbol for symbol in set(self.config.pattern) if MIXERS[symbol].unrolled)
        if unrolled and of_any_length(x):
            raise ValueError(
                f"the length is dynamic, and an exported graph unrolls the memory of {', '.join(unrolled)} layers over "
                "its tokens; export it with a fixed length (the batch may be dynamic), and pad to that"
            )

    def _caching(self, cache: AtlasCache | None, use_cache: bool | None, rows: int) -> tuple[bool, bool]:
        """Whether a cache was asked for, and whether one is kept. Raises ValueError for one that cannot be read on."""
        if cache is not None and not callable(getattr(cache, "advance", None)):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}, and this model's state is a memory: leave it out, and "
                "pass on the AtlasCache that the call returns (or that load_memory reads)"
            )
        held = getattr(cache, "rows", None)
        if held is not None and held != rows:
            raise ValueError(
                f"past_key_values has read {held} rows, and the input has {rows}; give as many, or choose rows "
                "by cache.select(rows), or repeat them by cache.batch_repeat_interleave(times)"
            )
        # A checkpointed layer reads again in the backward; where nothing is differentiated, none is.
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None and cache.columns:
                raise ValueError(
                    "past_key_values was given under gradient checkpointing, which does not carry a memory over calls; "
                    "call gradient_checkpointing_disable(), or read the text in one call"
                )
            if cache is not None or use_cache:
                logger.warning_once("use_cache=True does not go with gradient checkpointing; no cache is kept")
            return False, False
        asked = cache is not None or bool(use_cache)
        # An exported graph returns tensors, and a cache only where it is asked for.
        kept = self.config.use_cache and not self.training and not exporting()
        return asked, asked or (use_cache is None and kept)

    def _alike(self) -> str:
        """Which layers want all rows to stand alike; empty: none."""
        reasons = (MIXERS[symbol].alike(self.config) for symbol in self.config.pattern)
        return next(filter(None, reasons), "")


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

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *rest: Any
    ) -> None:
        """The cache that `generate` begins with, where none is given: its prefill in chunks asks for one."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = AtlasCache(self.config)

    def init_continuous_batching(self, *_: Any, **__: Any) -> None:
        raise ValueError("continuous batching keeps pages of keys and values, and this model a memory; call generate")

    # transformers reads the names here: `kwargs` stands for what `forward` takes.
    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: AtlasCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if past_key_values is not None and not is_first_iteration:
            kwargs.pop("position_ids", None)
            if getattr(past_key_values, "columns", 0) and past_key_values.begun:
                # No more padding, and looking at the mask would make the host wait for the device.
                attention_mask = None
        return super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
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
        position_ids: Tensor | None = None,
        **rest: Any,
    ) -> CausalLMOutputWithPast:
        """As AtlasModel. labels [B, T]: input_ids again; they are shifted here, and -100 is left out of the loss."""
        check_packing(position_ids, rest)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            position_ids=position_ids,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **rest)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
