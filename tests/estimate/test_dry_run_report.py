"""What `atlas-train --dry-run` says of layouts far larger than this machine, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from atlas_megatron.config import Config, MemoryConfig, ModelConfig, ParallelConfig, TrainConfig, layers_of, load
from atlas_megatron.config.context_levels import context_levels
from atlas_megatron.estimate.dry_run import DryRun
from atlas_megatron.estimate.machine import Machine
from atlas_megatron.estimate.memory import footprint, parameters_at
from atlas_megatron.estimate.traffic import hand_off_bubble, pipeline_bubble
from atlas_megatron.mixers import MIXERS
from atlas_megatron.model.build import flops_per_token, num_params
from atlas_megatron.parallel.scan import slicing
from atlas_megatron.train import main
from tests.support import tiny_run

LARGE = Path(__file__).parents[2] / "configs" / "atlas-340m.toml"
CUTS = "model.pattern=" + "|".join(["M-" * 6] * 4)
SCALE = ["parallel.tensor=8", "parallel.pipeline=4", "parallel.context=8"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_a_thousand_devices_on_one_processor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(LARGE), "--dry-run", *SCALE, "world=1024"]) == 0
    said = capsys.readouterr().out
    # The eight devices of a node are a tensor-parallel group: heads are not exchanged between nodes.
    assert "devices_per_node = 8" in said
    for line in (
        "8 x 4 x 8 x 4",
        "context: state hand-off",
        "data: gradient reduce-scatter",
        "tied embeddings: gradient all-reduce",
        "every pipeline rank",
        "fits: about",
    ):
        assert line in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*SCALE, "model.pattern=M-|M-M-", "world=1024"], "put 3 cuts '|' between its layers: 2 are missing"),
        ([*SCALE, CUTS, "world=1000"], "a world of 1000 does not divide into"),
        ([CUTS], "put 0 cuts '|' between its layers: 3 are too many"),
        (["wrld=8"], "'wrld=8' is neither an override nor a word of a dry run"),
        (["world"], "'world' is neither an override"),
        (["world=0"], "'world=0' is no number of devices"),
        (["world=many"], "'world=many' is no number of devices"),
        (["memory=80"], "'memory=80' is no size; write a number and one of MiB, GiB"),
        (["memory=0GiB"], "'memory=0GiB' is no size"),
        (["price=-1"], "'price=-1' is no price of a device for an hour; write a number: price=2.5"),
        (["price=nan"], "'price=nan' is no price"),
        (["parallel.tensr=2"], "unknown config key"),
        (["device=H1"], "'device=H1' is unknown; choose one of A100, H100, H200, B200"),
        (["mfu=2"], "'mfu=2' is no share of a device's peak"),
        (["mfu=half"], "'mfu=half' is no share"),
    ],
)
def test_bad_words_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(LARGE), "--dry-run", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_words_of_a_machine_are_a_dry_runs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(LARGE), "world=8"]) == 2
    assert "'world=8' is not an override" in capsys.readouterr().err


def test_the_device_is_said_and_the_time_follows_from_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([str(LARGE), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "device, assumed: none is seen here" in said and "(assumed: H100; memory= or device= says otherwise)" in said
    assert main([str(LARGE), "--dry-run", "device=A100", "mfu=0.5", "world=1"]) == 0
    said = capsys.readouterr().out
    assert "assumed" not in said
    config = load(LARGE)
    tokens = config.train.steps * config.train.global_batch * config.model.seq_length
    rate = 312e12 * 0.5 / flops_per_token(config).training
    for line in (f"{rate:,.0f}", f"{tokens / rate / 3600:,.3g}", "50%"):
        assert line in said


def test_what_would_keep_it_from_training_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run.write(tmp_path)
    assert main([str(config), "--dry-run"]) == 0
    assert "cannot train yet" not in capsys.readouterr().out
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["memory.impl=triton", "model.transformer_engine=true", f"data.validation=[{str(tmp_path / 'no')!r}]"]
    assert main([str(config), "--dry-run", *words, "model.vocab_size=200"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if ": " in line and "fits" not in line]
    named = [line.partition(": ")[2].split(";")[0] for line in said if line.startswith(("cannot", "not on"))]
    assert f"tokenizer {tmp_path}/tokenizer has 272 tokens but model.vocab_size is 200" in named
    assert any(line.startswith(f"{tmp_path}/no.idx does not exist") for line in named)
    assert any(line.startswith("memory.impl='triton' wants a GPU") for line in named)
    assert any(line.startswith("model.transformer_engine=true wants a GPU") for line in named)
    assert main([str(config), "--dry-run", "data.train=[]"]) == 0
    assert "cannot train yet: data.train is empty" in capsys.readouterr().out
    blocked = tmp_path / "train.bin"
    for directory in (blocked, blocked / "run", "/dev/null"):
        assert main([str(config), "--dry-run", f"run.directory={directory}"]) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cannot")]
        assert len(said) == 1 and said[0].endswith("is no folder; choose another run.directory")
    assert main([str(config), f"run.directory={blocked}"]) == 2
    assert capsys.readouterr().err == f"atlas-train: run.directory={blocked}: {blocked} is no folder; choose another " \
        "run.directory\n"
    assert main([str(config), "run.directory=\udcff"]) == 2
    assert "holds bytes that are no UTF-8; choose another run.directory" in capsys.readouterr().err
    assert main([str(config), "--dry-run", "data.train=nan x"]) == 0
    assert capsys.readouterr().out.count("cannot train yet: the weight of x is nan") == 1
    monkeypatch.setattr("os.access", lambda *_: False)
    assert main([str(config), "--dry-run"]) == 0
    assert f"nothing can be written to {tmp_path}; choose another" in capsys.readouterr().out


def test_sizes_and_devices() -> None:
    with pytest.raises(ValueError, match="is no size"):
        Machine.of([f"memory={'9' * 400}GiB"])
    found = Machine.of(["memory=1.5GiB", "world=16"])
    assert (found.devices, found.memory) == (16, 1.5 * 2**30)
    assert Machine.of(["device=H200"]).memory == 139 * 2**30
    assert Machine.of(["memory=80GB"]).memory == 80e9
    layout = replace(Config(), parallel=ParallelConfig(tensor=2, context=3))
    assert Machine.of([]).world_size(layout) == 6
    assert Machine.of(["world=12"]).world_size(layout) == 12


def test_what_does_not_fit_says_what_would() -> None:
    config = load(LARGE)
    run = DryRun(config, 16, 24 * 2**30, bf16=True)
    first, *rest = run.verdict()
    excess = footprint(config, 16, 0, bf16=True).total / 2**30 - 24
    assert first.startswith("does not fit: pipeline rank 0 needs about ")
    assert f"{excess:.2f} GiB more than the 24.00 GiB" in first
    remedy = next(line for line in rest if "train.recompute=true" in line)
    recomputed = replace(config, train=replace(config.train, recompute=True))
    assert f"about {footprint(recomputed, 16, 0, bf16=True).total / 2**30:.2f} GiB, fits" in remedy
    assert DryRun(config, 16, 80 * 2**30, bf16=True).verdict()[0].startswith("fits: ")


def test_ranks_together_hold_the_model() -> None:
    config = load(LARGE, [CUTS, *SCALE])
    over_stages = sum(parameters_at(config, rank) for rank in range(4))
    model, memory = config.model, config.memory
    # Every tensor-parallel rank has the norms and the gates' way down; the first and the last stage the embedding.
    replicated = 24 * (2 + memory.gate_rank) * model.hidden_size + model.hidden_size
    twice = model.vocab_size * model.hidden_size
    assert 8 * over_stages - 7 * replicated - twice == num_params(config)


def test_optimizer_state_is_shared_out_over_data_and_context() -> None:
    config = load(LARGE)
    spread = replace(config, parallel=ParallelConfig(context=4))
    assert footprint(spread, 16, 0, bf16=True).optimizer == footprint(config, 16, 0, bf16=True).optimizer
    assert footprint(spread, 16, 0, bf16=True).optimizer == pytest.approx(12 * num_params(config) / 16)


def test_the_pipeline_waits_less_when_interleaved() -> None:
    train = TrainConfig(global_batch=8, micro_batch=1)
    plain = replace(Config(), parallel=ParallelConfig(pipeline=4), train=train)
    twice = replace(plain, parallel=ParallelConfig(pipeline=4, virtual=2))
    assert pipeline_bubble(plain, 4) == pytest.approx(3 / 11)
    assert pipeline_bubble(twice, 4) == pytest.approx(3 / 19)


def chained(pattern: str, ranks: int, mode: str, **keys: int) -> Config:
    return Config(
        model=ModelConfig(pattern=pattern),
        memory=MemoryConfig(heads=8),
        train=TrainConfig(micro_batch=2),
        parallel=ParallelConfig(context=ranks, context_mode=mode, **keys),
    )


def waited(config: Config) -> float:
    """The share of a forward that the last rank to finish has waited, each rank acting as soon as it may."""
    ranks, (near, far) = config.parallel.context, context_levels(config)
    batch, heads = config.train.micro_batch, config.memory.heads // near
    rows, columns = slicing(batch, heads, config.parallel.context_slices or 2 * far)
    slices = batch // rows * (heads // columns)
    clock, work = [0.0] * ranks, 0.0
    for symbol in layers_of(config):
        mlp = (6.0 * config.model.hidden_size * config.model.ffn_hidden_size, 0.0)
        whole, scan = MIXERS[symbol].flops_per_token(config) if symbol in MIXERS else mlp
        if symbol == "R":
            scan = 2.0 * 3 * config.recurrent.heads * config.recurrent.head_dim**2
        work += whole
        clock = [time + whole - scan for time in clock]
        if symbol == "M":
            clock = [max(clock[rank - rank % near :][:near]) for rank in range(ranks)]
            ends = [[0.0] * slices for _ in range(ranks)]
            for rank in range(ranks):
                for number in range(slices):
                    left = ends[rank - near][number] if rank >= near else 0.0
                    clock[rank] = ends[rank][number] = max(clock[rank], left) + scan / slices
        elif symbol == "R":
            for rank in range(ranks):
                clock[rank] = max(clock[rank], clock[rank - 1] if rank else 0.0) + scan
    return 1 - work / max(clock)


@pytest.mark.parametrize("slices", [0, 1, 16])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_state_handed_on_is_waited_for_once_a_pass(ranks: int, slices: int) -> None:
    config = chained("M-" * 6, ranks, "handoff", context_slices=slices)
    assert hand_off_bubble(config) == pytest.approx(waited(config))


def test_recurrences_that_are_not_sliced_are_waited_for_longer() -> None:
    nodes = {"devices_per_node": 2}
    for config in (
        chained("R-R-", 4, "handoff"),
        chained("R-M-R-M-", 4, "handoff"),
        # Exchanging heads between them, the near ranks wait at each of the recurrences.
        chained("R-M-R-M-", 4, "heads+handoff", **nodes),
    ):
        assert hand_off_bubble(config) == pytest.approx(waited(config))
