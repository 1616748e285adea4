"""A batch that grows with the tokens: what a step reads, over a resume and over replicas, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.config import Config, TrainConfig
from atlas_megatron.config.batch_ramp import schedule_of, stages, tokens_of
from atlas_megatron.config.checks import validate
from atlas_megatron.train import main
from atlas_megatron.training import metrics
from tests.support import tiny_run

RAMP = "0:2 256:4 700:8"
WORDS = ["train.global_batch=8", f"train.batch_ramp={RAMP}", "train.steps=8", "train.validate_every=0"]


def ramped(ramp: str, batch: int, length: int = 32, **train: int) -> Config:
    usual = Config()
    return replace(
        usual,
        model=replace(usual.model, seq_length=length),
        memory=replace(usual.memory, chunk=8, window=8),
        train=TrainConfig(global_batch=batch, batch_ramp=ramp, **train),
    )


@pytest.mark.parametrize(
    "config", [ramped(RAMP, 8), ramped("0:8", 8), ramped("", 4), ramped("0:4 1K:6 2K:2", 2), ramped("0:1 64:7", 7)]
)
def test_tokens_are_those_of_cores_calculator(config: Config) -> None:
    length, trained, read = config.model.seq_length, 0, []
    core = StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 0, schedule_of(config), length)
    for _ in range(40):
        core.update(trained // length, consistency_check=True)
        read.append(core.get() * length)
        trained += read[-1]
    for steps in range(41):
        assert tokens_of(config, steps) == sum(read[:steps])
    for done in (1, 7, 20):
        assert tokens_of(config, 15, sum(read[:done])) == sum(read[done : done + 15])


def test_a_long_run_is_not_counted_step_by_step() -> None:
    config = ramped("0:64 1B:128 4T:256", 256)
    assert [batch for _, batch in stages(config)] == [64, 128, 256]
    assert tokens_of(config, 10**15) > 256 * 32 * (10**15 - 10**9)


@pytest.mark.parametrize(
    ("ramp", "batch", "said"),
    [
        ("4 8", 8, "'4' is no TOKENS:SEQUENCES; write the ramp as '0:64 1B:128 4B:256'"),
        ("0:0", 8, "'0:0' is no TOKENS:SEQUENCES"),
        ("0:4 1e3:8", 8, "'1e3:8' is no TOKENS:SEQUENCES"),
        ("64:4 1K:8", 8, "does not begin at token 0"),
        (" ", 8, "does not begin at token 0"),
        ("0:4 1K:6 1K:8", 8, "stages begin at sequences 0, 31, 31 of model.seq_length=32 tokens"),
        ("0:4 1:8", 8, "stages begin at sequences 0, 0"),
        ("0:4 1K:8", 16, "ends at 8 sequences, and train.global_batch is 16; set train.global_batch=8"),
        ("0:3 1K:8", 8, "train.batch_ramp='0:3 1K:8': 3 is not a multiple of train.micro_batch=2 x 1"),
    ],
)
def test_a_ramp_that_does_not_fit_is_refused(ramp: str, batch: int, said: str) -> None:
    with pytest.raises(ValueError, match=r"^train\.batch_ramp=") as refused:
        validate(ramped(ramp, batch, micro_batch=2), 1)
    assert said in str(refused.value)


def test_a_cuda_graph_is_refused() -> None:
    config = ramped(RAMP, 8, micro_batch=2)
    with pytest.raises(ValueError, match="train.cuda_graph=true with train.batch_ramp='0:2 256:4 700:8'"):
        validate(replace(config, train=replace(config.train, cuda_graph=True)), 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny_run.write(folder)
    assert main([str(config), *WORDS, f"run.directory={folder}/whole"]) == 0
    return folder


def test_a_step_reads_what_the_ramp_says(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = metrics.read(root / "whole")
    # 256 tokens are 8 sequences, four steps of two; 700 tokens are 21, reached by four steps of four.
    assert [record["sequences"] for record in records] == [2, 2, 2, 2, 4, 4, 4, 4]
    assert [record["tokens"] for record in records] == [64, 128, 192, 256, 384, 512, 640, 768]
    assert main([str(root / "tiny.toml"), *WORDS, f"run.directory={root}/none", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 from 0, 4 from 8, 8 from 21" in said and "768 in 8 steps" in said


def test_a_resume_within_a_stage_reads_the_same(root: Path) -> None:
    shutil.copytree(root / "whole", root / "again")
    for step in (6, 8):
        shutil.rmtree(checkpoint.folder_of(root / "again") / f"step_{step:08d}")
    longer = "train.steps=10"
    for name in ("whole", "again"):
        assert main([str(root / "tiny.toml"), *WORDS, longer, f"run.directory={root}/{name}"]) == 0
    whole, again = (metrics.read(root / name) for name in ("whole", "again"))
    assert [record["sequences"] for record in again] == [2, 2, 2, 2, 4, 4, 4, 4, 8, 8]
    # The cosine of the longer run differs from step 4 on; what is read does not.
    assert [record["tokens"] for record in again] == [record["tokens"] for record in whole]
    assert [record["loss"] for record in again[:4]] == [record["loss"] for record in whole[:4]]


@pytest.mark.parallel
def test_replicas_share_each_batch(root: Path) -> None:
    words = [*WORDS, "memory.preset=omeganet", "train.micro_batch=1"]
    assert main([str(root / "tiny.toml"), *words, f"run.directory={root}/one"]) == 0
    tiny_run.train_in(2, root / "tiny.toml", [[*words, f"run.directory={root}/two"]])
    one, two = metrics.read(root / "one"), metrics.read(root / "two")
    assert [record["sequences"] for record in two] == [record["sequences"] for record in one]
    assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], rel=1e-5)
