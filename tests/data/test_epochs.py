"""How often a run reads each set, counted as Megatron counts and said before the first step; and in one order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from atlas_megatron.config import Config, load
from atlas_megatron.data import epochs
from atlas_megatron.data.batches import Batches, build_datasets, sources
from atlas_megatron.data.prefixes import asked_tokens, blend
from atlas_megatron.parallel import world
from atlas_megatron.train import main
from atlas_megatron.training.readiness import epochs_read
from tests.data.test_data import write_set
from tests.support import processes, tiny_run

SEQUENCES = 48  # of 32 tokens, 1,536 in all: more than one pass over the set of 48 documents of 24

NAMES = ("train", "other")


@pytest.fixture
def two_sets(tmp_path: Path) -> list[str]:
    """Overrides for a blend of two sets, the second a quarter of the first, each with documents of its own."""
    tiny_run.write(tmp_path, "M-")
    tokens = np.fromfile(tmp_path / "train.bin", np.uint16).reshape(-1, tiny_run.LENGTH)
    write_set(tmp_path / "other", [row[::-1] for row in tokens[: len(tokens) // 4]])
    return [f'data.train=["3 {tmp_path}/train", "1 {tmp_path}/other"]', "train.steps=12"]


def test_a_pass_holds_what_megatron_reads_in_one(tmp_path: Path, two_sets: list[str]) -> None:
    for length in (32, 33, 31, 23, 24):
        config = load(tmp_path / "tiny.toml", [*two_sets, f"model.seq_length={length}"])
        order, _ = build_datasets(config, 4, 0)
        for samples, source in zip(order.passes, sources(config, config.data.train), strict=True):
            assert samples * length == epochs.tokens_of_a_pass(source.tokens, length)


def test_epochs_are_counted_by_what_is_drawn(tmp_path: Path, two_sets: list[str]) -> None:
    config = load(tmp_path / "tiny.toml", two_sets)
    order, _ = build_datasets(config, 12 * 4, 0)
    found = epochs.drawn(config, order.weights, [samples * 32 for samples in order.passes])
    drawn = [order._blended(number)[0] for number in range(SEQUENCES)]
    for place, one in enumerate(found):
        assert one.read == drawn.count(place) * 32
        assert one.epochs == drawn.count(place) / order.passes[place]
    assert [round(one.epochs, 3) for one in found] == [round(36 / 35, 3), round(12 / 8, 3)]


def test_they_are_said_before_the_first_step_and_in_a_dry_run(
    tmp_path: Path, two_sets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.toml"
    expected = [
        f"data: 75.0% of the run's 1,536 tokens are of {tmp_path}/train: 1.03 epochs of its 1,120",
        f"data: 25.0% of the run's 1,536 tokens are of {tmp_path}/other: 1.5 epochs of its 256",
        f"more than one epoch, the same text again: {tmp_path}/train, {tmp_path}/other; give more of it, a smaller "
        "weight, or fewer train.steps",
    ]
    assert epochs_read(load(config, two_sets)) == expected
    assert main([str(config), *two_sets, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in expected)
    assert not any("epoch, the same" in line for line in epochs_read(load(config, [*two_sets, "train.steps=6"])))
    with tiny_run.a_world_that_is_left():
        assert main([str(config), *two_sets, "train.steps=12", "train.validate_every=0", "checkpoint.every=12"]) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert all(line in log for line in expected)


def test_counts_of_tokens_are_weights_that_the_run_is_held_against(tmp_path: Path, two_sets: list[str]) -> None:
    assert blend(["1.5B a/train", "500M b/train"]) == [(1.5e9, "a/train"), (5e8, "b/train")]
    assert asked_tokens(["1.5B a/train", "500M b/train"]) == [1_500_000_000, 500_000_000]
    assert asked_tokens(["0.7 a", "0.3 b"]) == asked_tokens(["a", "b"]) == []
    assert blend(["2T c"]) == [(2e12, "c")] and blend(["5b c"]) == [(None, "5b c")]
    with pytest.raises(ValueError, match="some sets of the blend .* a count of tokens and some a weight; write one"):
        blend(["2B a", "0.5 b"])
    with pytest.raises(ValueError, match="carry a weight and some none"):
        blend(["2B a", "b"])
    with pytest.raises(ValueError, match="the weight of a is 0.0; give a number greater than 0"):
        blend(["0B a"])
    # What lies there by its whole name is a set.
    for suffix in (".bin", ".idx"):
        (tmp_path / f"2B words{suffix}").touch()
    assert blend([f"{tmp_path}/2B words"]) == [(None, f"{tmp_path}/2B words")]

    def said(*counts: str) -> list[str]:
        first, second = (f'"{count} {tmp_path}/{name}"' for count, name in zip(counts, NAMES, strict=True))
        return epochs_read(load(tmp_path / "tiny.toml", [f"data.train=[{first}, {second}]", "train.steps=12"]))

    assert said("1.152K", "0.384K") == epochs_read(load(tmp_path / "tiny.toml", two_sets))
    assert said("3M", "1M")[-1] == (
        "data.train asks for 4,000,000 tokens in all, and the run reads 1,536: each set is read in proportion; change "
        "the counts or train.steps"
    )


def _read(rank: int, config: Config, spans: list[tuple[int, int]]) -> list[torch.Tensor]:
    """The sequences of each span of samples, as all data ranks read them together: `[samples, tokens]`, in order."""
    world.join(config)
    try:
        return [_span(config, begin, end, torch.distributed.get_world_size()) for begin, end in spans]
    finally:
        world.leave()


def _span(config: Config, begin: int, end: int, ranks: int) -> torch.Tensor:
    train, _ = build_datasets(config, SEQUENCES, 0)
    batches, rows = Batches(train, config, begin, endless=True), []
    while batches.consumed_samples < end:
        own = next(batches)["tokens"]
        every = [torch.empty_like(own) for _ in range(ranks)]
        if ranks > 1:
            torch.distributed.all_gather(every, own)
        rows += every if ranks > 1 else [own]
    return torch.cat(rows)


@pytest.mark.parallel
def test_the_order_is_one_in_any_world_cut_and_resumed(tmp_path: Path, two_sets: list[str]) -> None:
    """A blend read more than once, by one process and by two, cut where no pass ends; to the bit."""
    config = load(tmp_path / "tiny.toml", two_sets)
    whole = _span(config, 0, SEQUENCES, 1)
    assert len(whole) == SEQUENCES and len({tuple(row) for row in whole.tolist()}) < SEQUENCES
    alone = torch.cat([_span(config, begin, end, 1) for begin, end in ((0, 20), (20, SEQUENCES))])
    assert torch.equal(alone, whole)
    for spans in ([(0, SEQUENCES)], [(0, 20), (20, SEQUENCES)]):
        for rank in processes.run(2, _read, config, spans):
            assert torch.equal(torch.cat(rank), whole)
    # Begun by one, gone on with by two, and the other way round.
    first, second = processes.run(2, _read, config, [(0, 20), (20, SEQUENCES)])[0]
    assert torch.equal(torch.cat([whole[:20], second]), whole)
    assert torch.equal(torch.cat([first, _span(config, 20, SEQUENCES, 1)]), whole)
