"""A run whose sequences grow: the same weights, gradients that keep their size, and a line on what follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.config import Config, MemoryConfig, load, load_saved
from atlas_megatron.config.checks import validate
from atlas_megatron.mixers.reach import stretches
from atlas_megatron.parallel import world
from atlas_megatron.train import main
from atlas_megatron.training import metrics
from atlas_megatron.training.resuming import changed_keys, going_on, longer_sequences, samples_as_long
from tests.support import tiny_run

TIMES = 16
# Without Newton-Schulz retention follows from the length, and gradients over many times that length explode.
PLAIN = ["memory.preset=omeganet", "memory.window=4", "memory.chunk=8", "train.validate_every=0", "data.validation=[]"]


def sized(length: int, **memory: object) -> Config:
    config = Config(memory=MemoryConfig(**{"chunk": 8, **memory}))  # type: ignore[arg-type]
    return replace(config, model=replace(config.model, pattern="M-", seq_length=length))


def test_a_run_that_grows_ends_gradients_by_the_length_that_it_began_with() -> None:
    before = sized(64)
    grown = going_on(sized(256), before)
    assert grown.train.gradient_reach == 16
    assert going_on(sized(64), before) == sized(64)
    # Started again with the same words, and grown once more.
    assert going_on(sized(256), grown) == grown
    assert going_on(sized(1024), grown).train.gradient_reach == 16
    given = replace(sized(256), train=replace(before.train, gradient_reach=256))
    assert going_on(given, before) == given
    # Of no memory, and of one that keeps its sources, none ends.
    attention = replace(sized(256), model=replace(sized(256).model, pattern="F-"))
    assert going_on(attention, before) == attention
    kernel = {"kernel": "exponential", "feature_map": "identity"}
    assert going_on(sized(256, **kernel), sized(64, **kernel)) == sized(256, **kernel)
    assert samples_as_long(sized(256), before, 10) == 3 and samples_as_long(before, before, 10) == 10


def test_what_follows_is_said() -> None:
    before = sized(64)
    grown = going_on(sized(256), before)
    said = longer_sequences(grown, before, 5)
    assert said.startswith("sequences grow from 64 to 256 tokens, and a step reads 2,048; retention is in the weights")
    assert "gradients of memories end every 16 tokens (train.gradient_reach=256 for none)" in said
    assert "read again" in said and "read again" not in longer_sequences(grown, before, 0)
    assert longer_sequences(grown, grown, 5) == longer_sequences(grown, before, 1000) == ""
    assert "model.seq_length=256 (was 64), train.gradient_reach=16 (was 0)" in changed_keys(grown, before, 5)


def test_gradients_end_at_the_same_tokens_on_every_rank() -> None:
    def ends(tokens: int, first: int, reach: int) -> list[tuple[int, int, bool]]:
        return [(first + part.start, first + part.stop, cut) for part, cut in stretches(tokens, first, reach)]

    assert ends(20, 0, 0) == [(0, 20, False)]
    assert ends(20, 0, 8) == [(0, 8, False), (8, 16, True), (16, 20, True)]
    assert ends(8, 4, 8) + ends(8, 12, 8) == [(4, 8, False), (8, 12, True), (12, 16, False), (16, 20, True)]
    assert ends(8, 8, 8) == [(8, 16, True)]


def test_a_reach_is_in_whole_chunks() -> None:
    with pytest.raises(ValueError, match="train.gradient_reach=12 is not a multiple of memory.chunk=8; nearest: 16"):
        validate(replace(sized(64), train=replace(Config().train, gradient_reach=12)), 1)
    kept = sized(64, kernel="exponential", feature_map="identity", ns_steps=0, momentum=False)
    with pytest.raises(ValueError, match="gradient_reach=64 with memory.kernel='exponential', which keeps its sources"):
        validate(replace(kept, train=replace(kept.train, gradient_reach=64)), 1)
    with pytest.raises(ValueError, match="train.gradient_reach=-8 must be 0 or more"):
        validate(replace(sized(64), train=replace(Config().train, gradient_reach=-8)), 1)


def loss_of(folder: Path, read: torch.Tensor) -> float:
    """Of a checkpoint on a text that is no longer than its first sequences were."""
    try:
        model, _ = checkpoint.load_checkpoint(folder)
        places = torch.arange(read.shape[1]).unsqueeze(0)
        with torch.no_grad():
            return float(model(read, places, None, labels=read.roll(-1, 1)).mean())
    finally:
        world.leave()


def test_a_run_goes_on_with_sequences_sixteen_times_as_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run.write(tmp_path, "M-*-C-")
    assert main([str(config), *PLAIN, "train.steps=3"]) == 0
    checkpoints = checkpoint.folder_of(tmp_path / "run")
    read = torch.randint(0, 64, (1, 32), generator=torch.Generator().manual_seed(0))
    before = loss_of(checkpoints / "step_00000003", read)
    # A step of next to nothing: what is read is the same, with what the first three steps learned.
    still = ["train.lr=1e-12", "train.min_lr=0", "train.weight_decay=0", f"model.seq_length={32 * TIMES}"]
    longer = [str(config), *PLAIN, *still, "train.steps=4"]
    capsys.readouterr()
    assert main(longer) == 0
    said = capsys.readouterr().out
    assert f"sequences grow from 32 to {32 * TIMES} tokens" in said and "train.gradient_reach=8 (was 0)" in said
    assert loss_of(checkpoints / "step_00000004", read) == pytest.approx(before, rel=1e-6)
    norms = [record["grad_norm"] for record in metrics.read(tmp_path / "run")]
    assert norms[-1] < 100 * max(norms[:3])
    # Again with the same words: no other keys. And back it does not go.
    assert main(longer) == 0
    said = capsys.readouterr().out
    assert "is done: step 4 of 4" in said and "grow" not in said and "differ" not in said
    assert load_saved(checkpoints / "step_00000004/config.toml").train.gradient_reach == 8
    assert main([str(config), *PLAIN, "train.steps=5"]) == 2
    assert f"model.seq_length: 32, the checkpoint has {32 * TIMES} (it may grow, not shrink)" in capsys.readouterr().err
    assert load(config).model.seq_length == 32
