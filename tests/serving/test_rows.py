"""Rows of texts at positions of their own read as each text does alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atlas_megatron.config import Config
from atlas_megatron.hf.modeling_atlas import AtlasModel
from atlas_megatron.serving.rows import Rows
from tests.support.hf_and_megatron import CALM, moved, settings, tokens

ROOM = 64
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
CONFIGS: dict[str, Config] = {
    "every layer": settings("M-*-F-A-R-L-D-G-", **CALM),
    "persistent tokens": settings("*-A-", **CALM),
    "a write a period": settings("M-", preset="atlas"),
    "no momentum": settings("M-A-", preset="omeganet"),
    "titans": settings("M-", preset="titans"),
    "gates by source": settings("M-", omega_gates="source", **CALM),
}


class Table:
    """Rows of a server: one for each text, taken up and put back at every step."""

    def __init__(self, rows: Rows, count: int) -> None:
        self.rows, self.read = rows, [0] * count
        pairs = zip(rows.shapes, rows.dtypes, strict=True)
        # Whatever lay there before must not matter.
        self.leaves = [torch.full((count, *shape), 7, dtype=dtype) for shape, dtype in pairs]

    def step(self, texts: list[int], given: Tensor) -> Tensor:
        index, positions = torch.tensor(texts), [self.read[text] for text in texts]
        before = [leaf.index_select(0, index) for leaf in self.leaves] if any(positions) else None
        hidden, after = self.rows.read(given, before, positions)
        for leaf, new in zip(self.leaves, after, strict=True):
            leaf.index_copy_(0, index, new)
        for text in texts:
            self.read[text] += given.shape[1]
        return hidden


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_rows_come_and_go_and_each_reads_as_alone(config: Config) -> None:
    model: AtlasModel = moved(config).model
    whole = tokens(3, 40)
    alone = model(input_ids=whole, use_cache=False).last_hidden_state
    table, found = Table(Rows(model, ROOM), 3), [[], [], []]

    def read(texts: list[int], count: int) -> None:
        given = torch.stack([whole[text, table.read[text] : table.read[text] + count] for text in texts])
        for text, hidden in zip(texts, table.step(texts, given), strict=True):
            found[text].append(hidden)

    # Prompts of several lengths, one of them in pieces, while others are continued; a row waits and is taken up again.
    read([0], 3), read([1], 11), read([0, 1], 1), read([2], 7), read([2], 9)
    for _ in range(4):
        read([1, 0, 2], 1)
    read([2], 1)
    for _ in range(9):
        read([2, 1, 0], 1)
    for text, pieces in enumerate(found):
        torch.testing.assert_close(torch.cat(pieces), alone[text, : table.read[text]], **TOLERANCE)
    assert len(set(table.read)) == 3


@torch.no_grad()
def test_a_row_has_one_size_whatever_it_has_read() -> None:
    model = moved(settings("M-*-G-", **CALM)).model
    rows = Rows(model, ROOM)
    for length in (1, 5, 40):
        leaves = rows.leaves_of(model(input_ids=tokens(1, length), use_cache=True).past_key_values)
        assert [tuple(leaf.shape[1:]) for leaf in leaves] == rows.shapes
        assert sum(leaf.nbytes for leaf in leaves) == rows.bytes


@torch.no_grad()
def test_a_row_keeps_no_more_than_the_rule_needs() -> None:
    """Of a Gated DeltaNet one matrix a head; of a memory without momentum its weights and its anchor."""
    config = settings("G-", **CALM)
    heads, size, taps = config.delta.heads, config.delta.head_dim, config.delta.conv_size
    numbers = heads * size * size + 3 * heads * size * (taps - 1)
    assert Rows(moved(config, torch.float32).model, ROOM).bytes == 4 * numbers
    with_momentum, without = (
        Rows(moved(settings("M-", momentum=momentum, **CALM), torch.float32).model, ROOM) for momentum in (True, False)
    )
    matrices = sum(t.numel() for t in with_momentum.model.layers[0].mixer.start_weights())
    assert with_momentum.bytes - without.bytes == 4 * matrices


def test_what_cannot_be_served_is_refused_by_name() -> None:
    for config, why in (
        (settings("M-C-"), "C layers, whose segments are those of every row"),
        (settings("M-", preset="dot", window=5), "memory.kernel='exponential'"),
    ):
        with pytest.raises(ValueError, match=f"cannot be served in batches: .*{why}.*atlas-generate"):
            Rows(moved(config).model, ROOM)


@torch.no_grad()
def test_attention_holds_no_more_than_its_room() -> None:
    model = moved(settings("F-")).model
    with pytest.raises(ValueError, match="9 tokens were read, and attention holds 8"):
        Rows(model, 8).read(tokens(1, 9), None, [0])
