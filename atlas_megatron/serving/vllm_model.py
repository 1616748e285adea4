"""An exported model in vLLM: its layers as they are, and the state of every text in a block of vLLM's memory.

vLLM holds states as tensors of fixed shape, one block a text and layer (`MambaSpec`). All layers here share one block:
to vLLM the model is one layer without attention. Its cache modes for prefixes want states at the ends of blocks, and
are refused. Texts that read their prompt are computed one after the other, texts that are continued as one batch.

Bytes: one block a text (`Rows.bytes`), flat in its length; full attention takes `max_model_len` keys and values of it.
FLOPs: those of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree

from atlas_megatron.hf.modeling_atlas import AtlasModel
from atlas_megatron.parallel.device import flush_denormals
from atlas_megatron.serving.memory_files import MemoryFiles
from atlas_megatron.serving.rows import Rows
from atlas_megatron.serving.vllm_batch import Step, backend
from atlas_megatron.serving.vllm_config import MEMORIES
from atlas_megatron.serving.vllm_memories import in_batch

logger = logging.getLogger(__name__)
# vLLM takes the number of a layer from its name; to it there is one.
BLOCKS = "layers.0.state"
# Of a text that goes on from a memory which could not be read.
LOST = -1


class Blocks(nn.Module, MambaBase):  # type: ignore[misc]
    """The blocks with the states of all texts: `kv_cache` is a tensor [blocks, ...] for each one of a row.

    The first is int64: how many tokens the memory had read that a text goes on from.
    """

    def __init__(self, vllm_config: Any, rows: Rows, prefix: str) -> None:
        super().__init__()
        self._rows = rows
        kept = [n for n, shape in enumerate(rows.shapes) if prod(shape)]  # a window of one token has no halo
        # Wide numbers first: a view of a block's bytes has to begin at a multiple of its numbers' size.
        self._order = sorted(kept, key=lambda n: -rows.dtypes[n].itemsize)
        self._shapes = [(1,), *(rows.shapes[n] for n in self._order)]
        self._dtypes = [torch.int64, *(rows.dtypes[n] for n in self._order)]
        if rows.bytes % torch.int64.itemsize:
            self._shapes.append((torch.int64.itemsize - rows.bytes % torch.int64.itemsize,))
            self._dtypes.append(torch.uint8)
        self.kv_cache: tuple[Tensor, ...] = ()
        self.prefix = prefix
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def get_state_shape(self) -> list[tuple[int, ...]]:
        return self._shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return tuple(self._dtypes)

    @property
    def mamba_type(self) -> Any:
        return backend()

    def take(self, blocks: Tensor) -> tuple[list[int], list[Tensor]]:
        """Of these blocks [B]: tokens of the memories before, and the leaves."""
        before, *kept = (tensor.index_select(0, blocks) for tensor in self.kv_cache[: len(self._order) + 1])
        leaves = dict(zip(self._order, kept, strict=True))
        for n, shape in enumerate(self._rows.shapes):
            if n not in leaves:
                leaves[n] = torch.empty(len(blocks), *shape, dtype=self._rows.dtypes[n], device=blocks.device)
        return before[:, 0].tolist(), [leaves[n] for n in range(len(leaves))]

    def put(self, blocks: Tensor, leaves: list[Tensor]) -> None:
        for place, n in enumerate(self._order, 1):
            self.kv_cache[place].index_copy_(0, blocks, leaves[n])

    def begin(self, block: Tensor, before: int) -> None:
        """Note how many tokens a text's memory had read."""
        self.kv_cache[0].index_fill_(0, block, before)


def _rows_of(model: AtlasModel, room: int) -> Rows:
    """The rows as they are when requests come: torch's default type is then float32, and the model's while it loads."""
    loading = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return Rows(model, room)
    finally:
        torch.set_default_dtype(loading)


class AtlasForVLLM(nn.Module, HasInnerState, IsAttentionFree):  # type: ignore[misc]
    """AtlasModel and its output layer under vLLM's names."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        flush_denormals()  # as the other readers; vLLM calls the model from this thread
        described = vllm_config.model_config
        self.config = config = described.hf_config
        self.model = AtlasModel(config).eval()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rows = _rows_of(self.model, described.max_model_len)
        self.blocks = Blocks(vllm_config, self.rows, f"{prefix}.{BLOCKS}" if prefix else BLOCKS)
        folder = vllm_config.additional_config.get(MEMORIES)
        self.files = MemoryFiles(Path(folder), Path(described.model), config) if folder else None

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [N, hidden] of the tokens [N] of all texts of a step, one text after the other."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            # vLLM measures what a step takes; nothing is kept of it.
            return self.model(input_ids=input_ids[None], use_cache=False).last_hidden_state[0]
        step: Step = metadata[self.blocks.prefix]
        hidden = self.lm_head.weight.new_zeros(len(input_ids), self.config.hidden_size)
        continued = []
        for row, (start, stop) in enumerate(zip(step.starts, step.starts[1:], strict=False)):
            if stop - start == 1 and step.read[row]:
                continued.append(row)
            elif stop > start:
                hidden[start:stop] = self._read(input_ids[start:stop], row, step)
        if continued:
            rows, places = (
                torch.tensor(numbers, device=input_ids.device)
                for numbers in (continued, [step.starts[row] for row in continued])
            )
            hidden[places] = self._advance(input_ids[places, None], continued, step.blocks[rows], step)[:, 0]
        return hidden

    def _read(self, tokens: Tensor, row: int, step: Step) -> Tensor:
        """Hidden states [T, hidden] of one text's tokens [T]."""
        block = step.blocks[row : row + 1]
        if step.read[row]:
            return self._advance(tokens[None], [row], block, step)[0]
        before, leaves = self._memory_of(row)
        hidden, after = self.rows.read(tokens[None], leaves, [max(before, 0)])
        self.blocks.begin(block, before)
        self.blocks.put(block, after)
        return hidden[0]

    def _advance(self, tokens: Tensor, rows: list[int], blocks: Tensor, step: Step) -> Tensor:
        """Hidden states [B, T, hidden] of tokens [B, T] of texts that have begun."""
        before, leaves = self.blocks.take(blocks)
        for row, count in zip(rows, before, strict=True):
            if count == LOST and row in in_batch:
                in_batch[row].lost = True
        read = [step.read[row] + max(count, 0) for row, count in zip(rows, before, strict=True)]
        hidden, after = self.rows.read(tokens, leaves, read)
        self.blocks.put(blocks, after)
        return hidden

    def _memory_of(self, row: int) -> tuple[int, list[Tensor] | None]:
        """What the memory that a text names has read, and its leaves; 0 and None: it names none."""
        named = in_batch.get(row)
        if named is None or self.files is None:
            return 0, None
        try:
            cache = self.files.load(named.name, str(self.lm_head.weight.device))
        except (OSError, ValueError) as error:
            # It was whole when the request was taken. Raising here would end all other conversations.
            logger.error("%s; the conversation that named it ends here", error)
            named.lost = True
            return LOST, None
        return int(cache.position), self.rows.leaves_of(cache)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.lm_head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take the weights of an exported folder. Raises ValueError for one that is missing, or of no layer."""
        own, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            if name not in own or own[name].shape != tensor.shape:
                raise ValueError(f"{name} {list(tensor.shape)} is of no layer of this model; export it again")
            own[name].data.copy_(tensor)
            loaded.add(name)
        if missing := own.keys() - loaded:
            raise ValueError(f"the folder lacks {', '.join(sorted(missing))}; export it again")
        return loaded
