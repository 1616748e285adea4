"""Layers of experts: every layout starts and trains as one process does and goes on from others; what is refused."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.config import Config, ExpertsConfig, ParallelConfig
from atlas_megatron.config.checks import validate
from atlas_megatron.estimate.memory import parameters_at
from atlas_megatron.mixers import costs_of
from atlas_megatron.model.build import active_params, flops_per_token, num_params
from atlas_megatron.train import main
from atlas_megatron.training.metrics import read
from tests.checkpoint.test_whole_model import wholes
from tests.support import tiny_run
from tests.support.layouts import MEMORY, Layout, other_starts, save_start
from tests.support.processes import run

PATTERN = "ME*E"
EXPERTS = ExpertsConfig(count=4, top_k=2, ffn_hidden_size=24, shared_ffn_hidden_size=16)
LAYOUTS = {
    "one": Layout(1, ParallelConfig()),
    "data": Layout(2, ParallelConfig()),
    "expert": Layout(2, ParallelConfig(expert=2)),
    "sequence": Layout(2, ParallelConfig(tensor=2, sequence=True)),
    "sequence, expert": Layout(2, ParallelConfig(tensor=2, sequence=True, expert=2)),
    "pipeline": Layout(2, ParallelConfig(pipeline=2), (2,)),
    "context, expert": Layout(2, ParallelConfig(context=2, context_mode="handoff", expert=2)),
    "interleaved": Layout(2, ParallelConfig(pipeline=2, virtual=2), (1, 2, 3)),
    "expert of four": Layout(4, ParallelConfig(expert=2)),
    "pipeline, expert": Layout(4, ParallelConfig(pipeline=2, expert=2), (2,)),
    "tensor x data, expert": Layout(4, ParallelConfig(tensor=2, sequence=True, expert=4)),
}
# Of this one pipeline rank 0 has no layer of experts.
REFUSED = ("interleaved",)
TOLERANCE = 1e-5
STEPS, SAVED = 4, 2
BASE = replace(
    MEMORY,
    model=replace(MEMORY.model, pattern=PATTERN),
    experts=EXPERTS,
    train=replace(MEMORY.train, write_budget=0.0),
)


def words(folder: Path, name: str, *more: str) -> list[str]:
    given = ["memory.preset=omeganet", "memory.heads=4", "attention.heads=4", "train.micro_batch=1"]
    given += ["train.schedule=constant", "train.warmup_steps=1", f"train.steps={STEPS}", f"checkpoint.every={SAVED}"]
    given += [f"experts.{key}={value}" for key, value in vars(EXPERTS).items()]
    # Uneven experts cost enough to see that their load is counted alike.
    given += ["train.validate_every=0", "data.validation=[]", "train.aux_loss=0.5", f"run.directory={folder}"]
    return [*given, *LAYOUTS[name].words(PATTERN), *more]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write(tmp_path_factory.mktemp("experts"), PATTERN)


def trained(config: Path, name: str, *more: str) -> Path:
    """The run of four steps in a layout; made once."""
    folder = config.parent / "-".join([name, *more])
    if not folder.is_dir():
        tiny_run.train_in(LAYOUTS[name].processes, config, [words(folder, name, *more)])
    return folder


def steps(folder: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in read(folder)]


SHORT = ("expert", "sequence, expert")
TRAINED = [name for name in LAYOUTS if name not in ("one", *REFUSED)]
MARKED = [name if name in SHORT else pytest.param(name, marks=pytest.mark.parallel) for name in TRAINED]


@pytest.mark.parametrize("name", MARKED)
def test_every_layout_trains_as_one_process_does(config: Path, name: str) -> None:
    ours, theirs = steps(trained(config, name)), steps(trained(config, "one"))
    assert len(ours) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=TOLERANCE)
    balance = [[record.get(BALANCE) for record in read(trained(config, own))] for own in (name, "one")]
    assert balance[0] == pytest.approx(balance[1], rel=TOLERANCE) and balance[0][1] >= 1


@pytest.mark.parametrize("name", SHORT)
def test_every_layout_starts_from_the_same_weights(tmp_path: Path, name: str) -> None:
    run(1, save_start, {"one": BASE}, tmp_path)
    layouts = [own for own in TRAINED if own == name or name == SHORT[-1]]
    for size, alike in groupby(layouts, key=lambda own: LAYOUTS[own].processes):
        tried = list(alike)
        cases = [(LAYOUTS[own].of(BASE), tmp_path / "one start") for own in tried]
        for rank, others in enumerate(run(size, other_starts, cases)):
            assert dict(zip(tried, others, strict=True)) == {own: [] for own in tried}, f"rank {rank} of {size}"


PAIRS = [("expert", "expert"), ("expert", "one"), ("one", "expert"), ("sequence, expert", "data")]
PAIRS += [("pipeline", "expert"), ("pipeline, expert", "one"), ("one", "pipeline, expert")]
SHORT_PAIRS = PAIRS[:3]


@pytest.mark.parametrize(
    ("first", "second"),
    [pair if pair in SHORT_PAIRS else pytest.param(*pair, marks=pytest.mark.parallel) for pair in PAIRS],
)
def test_another_layout_takes_the_next_steps(config: Path, first: str, second: str) -> None:
    folder = config.parent / f"{first} to {second}"
    shutil.copytree(trained(config, first), folder)
    shutil.rmtree(checkpoint.folder_of(folder) / f"step_{STEPS:08d}")
    tiny_run.train_in(LAYOUTS[second].processes, config, [words(folder, second)])
    ours, theirs = steps(folder), steps(trained(config, first))
    if first == second:
        assert ours == theirs
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=TOLERANCE)


BALANCE = "expert_balance"
RECOMPUTED = ('train.recompute_modules=["moe"]', 'train.recompute_modules=["shared_experts"]', "train.recompute=true")


@pytest.mark.parametrize("word", RECOMPUTED)
def test_recomputed_experts_change_no_bit(config: Path, word: str) -> None:
    again, once = trained(config, "expert", word), trained(config, "expert")
    assert steps(again) == steps(once)
    assert [record[BALANCE] for record in read(again)] == [record[BALANCE] for record in read(once)]


@pytest.mark.parallel
def test_an_interleaved_pipeline_with_experts_on_each_rank_trains_as_one_process(config: Path) -> None:
    found = []
    for pattern, cuts in (("MEE*ME", ()), ("ME|E*|M|E", ["parallel.pipeline=2", "parallel.virtual=2"])):
        folder = config.parent / f"interleaved {len(cuts)}"
        given = [*words(folder, "one"), f"model.pattern={pattern}", *cuts]
        tiny_run.train_in(2 if cuts else 1, config, [given])
        found.append([(record["loss"], record["grad_norm"], record[BALANCE]) for record in read(folder)])
    assert len(found[0]) == STEPS
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE)


def test_an_uneven_load_costs_what_its_weight_says(config: Path) -> None:
    free, costly = trained(config, "one", "train.aux_loss=0"), trained(config, "one")
    assert all(BALANCE not in record for record in read(free))
    # The loss that is shown is the text's alone; the gradients of the first step have the load's besides.
    assert steps(free)[0][0] == steps(costly)[0][0]
    assert steps(free)[0][1] != pytest.approx(steps(costly)[0][1], rel=1e-3)


def test_bfloat16_goes_on_to_the_bit(config: Path) -> None:
    half = "train.precision=bfloat16"
    whole, folder = trained(config, "expert", half), config.parent / "half, resumed"
    shutil.copytree(whole, folder)
    shutil.rmtree(checkpoint.folder_of(folder) / f"step_{STEPS:08d}")
    tiny_run.train_in(LAYOUTS["expert"].processes, config, [words(folder, "expert", half)])
    assert len(steps(folder)) == STEPS and steps(folder) == steps(whole)
    assert steps(whole) != steps(trained(config, "expert"))


def test_another_layout_begins_with_a_runs_weights(config: Path) -> None:
    """Loss and gradient norm of the first step are those of the same weights in the layout that trained them."""
    begun: list[Path] = []
    for name in ("one", "expert"):
        begun.append(config.parent / f"begun in {name}")
        start = [f"train.start_from={trained(config, 'expert')}", "train.steps=1", "train.warmup_steps=0"]
        tiny_run.train_in(LAYOUTS[name].processes, config, [[*words(begun[-1], name), *start]])
    ours, theirs = map(steps, begun)
    assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE)
    assert ours[0][0] < steps(trained(config, "one"))[0][0]


GATHERED = ("expert", "sequence, expert", "context, expert")


def test_every_layout_gathers_the_whole_model() -> None:
    """What evaluations and samples on the way read: the same weights, and the same logits, as one process has."""
    ((wanted, logits),) = run(1, wholes, [BASE])[0]
    for found in run(2, wholes, [LAYOUTS[name].of(BASE) for name in GATHERED]):
        for name, (parameters, told) in zip(GATHERED, found, strict=True):
            assert parameters.keys() == wanted.keys(), name
            assert all(torch.equal(p, wanted[key]) for key, p in parameters.items()), name
            assert torch.equal(told, logits), name


def test_samples_on_the_way_are_those_of_one_process(config: Path) -> None:
    more = ("train.sample_every=4", "train.sample_tokens=6")
    ours, theirs = (read(trained(config, name, *more))[-1]["sample"] for name in ("expert", "one"))
    assert ours == theirs
    assert steps(trained(config, "expert", *more)) == steps(trained(config, "expert"))


@pytest.mark.usefixtures("single_process_megatron")
def test_closed_forms_match_the_built_layer() -> None:
    from atlas_megatron.model.build import build_model

    for shared in (0, 16):
        config = replace(BASE, experts=replace(EXPERTS, shared_ffn_hidden_size=shared))
        model = build_model(config)
        assert num_params(config) == sum(p.numel() for p in model.parameters())
        layer = model.decoder.layers[1]
        x = torch.randn(8, 1, 32)
        with FlopCounterMode(display=False) as counter:
            layer(hidden_states=x, attention_mask=None)
        assert counter.get_total_flops() == 8 * costs_of("E").flops_per_token(config)[0]
        two = 2 * 2 * 3 * 32 * 24  # of each layer, two experts of three matrices are idle
        assert active_params(config) == num_params(config) - two
        dense = replace(config, experts=replace(config.experts, count=8, top_k=2))
        assert active_params(dense) == active_params(config) + 2 * 4 * 32  # the router's rows alone
        assert flops_per_token(dense).forward - flops_per_token(config).forward == 2 * 2 * 4 * 32


def test_ranks_share_the_experts_out() -> None:
    config = replace(BASE, experts=replace(EXPERTS, count=8))
    spread = replace(config, parallel=ParallelConfig(expert=4))
    assert parameters_at(config, 0) - parameters_at(spread, 0) == 2 * 6 * 3 * 32 * 24


def changed(**sections: dict[str, object]) -> Config:
    parts = {name: replace(getattr(BASE, name), **keys) for name, keys in sections.items()}
    return replace(BASE, **parts)


BAD: list[tuple[dict[str, dict[str, object]], int, str]] = [
    ({"parallel": {"expert": 8}}, 8, "parallel.expert=8 ranks are more than experts.count=4"),
    ({"parallel": {"expert": 3}}, 3, "experts.count=4 does not divide by parallel.expert=3; nearest: 3"),
    ({"parallel": {"expert": 4}}, 2, "parallel.expert=4 does not divide the 2 ranks of a pipeline stage"),
    ({"experts": {"top_k": 5}}, 1, "experts.top_k=5 is more than experts.count=4; a token takes 4 at most"),
    ({"experts": {"count": 0}}, 1, "experts.count=0 must be greater than 0"),
    ({"train": {"aux_loss": -1.0}}, 1, "train.aux_loss=-1.0 must be 0 or more"),
    ({"parallel": {"tensor": 2}}, 2, "set parallel.sequence=true"),
    ({"experts": {"shared_ffn_hidden_size": 15}, "parallel": {"tensor": 2, "sequence": True}}, 2, "does not divide by"),
    ({"model": {"pattern": "M*-"}, "parallel": {"expert": 2}}, 2, "has no E layer; set parallel.expert=1"),
    ({"model": {"pattern": "M*|ME"}, "parallel": {"pipeline": 2}}, 2, "leaves pipeline rank 0 without an E layer"),
    ({"model": {"pattern": "ME/M"}}, 1, "asks by '/' for multi-token prediction, which is not built here"),
    ({"train": {"fp8": "hybrid"}, "model": {"transformer_engine": True}}, 1, "train.fp8='hybrid' with E layers"),
    ({"train": {"optimizer": "muon"}}, 1, "train.optimizer='muon' with E layers"),
    ({"train": {"cuda_graph": True}}, 1, "train.cuda_graph=true with E layers"),
    ({"train": {"recompute_modules": ("shared_experts", "moe")}}, 1, "beside 'moe', which holds them; leave it out"),
    (
        {"train": {"recompute_modules": ("shared_experts",)}, "experts": {"shared_ffn_hidden_size": 0}}, 1,
        "with experts.shared_ffn_hidden_size=0, which has none; leave it out",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "size", "said"), BAD)
def test_what_cannot_be_is_refused(sections: dict[str, dict[str, object]], size: int, said: str) -> None:
    config = changed(**sections)
    config = replace(config, train=replace(config.train, global_batch=24, micro_batch=1))
    with pytest.raises(ValueError) as raised:
        validate(config, size)
    assert said in str(raised.value)


def test_an_interleaved_pipeline_needs_experts_on_each_rank() -> None:
    with pytest.raises(ValueError, match="leaves pipeline rank 0 without an E layer"):
        validate(LAYOUTS["interleaved"].of(BASE), 2)


def test_a_dry_run_and_a_plan_count_experts(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    given = words(config.parent / "dry", "expert")
    assert main([str(config), "--dry-run", *given, "world=4"]) == 0
    said = capsys.readouterr().out
    for line in ("parameters that a token meets", "experts: all-to-all", "data: expert gradient reduce-scatter"):
        assert line in said
    assert re.search("experts a device, of each layer +│ +2 ", said) and "2 experts" in said
    free = [word for word in words(config.parent / "dry", "one") if not word.startswith("parallel.")]
    # Eight experts of a wide inner size fill a device that holds a few of them.
    wide = ["experts.count=8", "experts.ffn_hidden_size=4096", "memory=64MiB"]
    assert main([str(config), "--plan", *free, *wide, "world=4"]) == 0
    assert "parallel.expert=" in capsys.readouterr().out


def test_an_export_is_refused_by_name(config: Path, tmp_path: Path) -> None:
    from atlas_megatron.hf.export import export

    with pytest.raises(ValueError, match="has E layers, which exported models do not have"):
        export(trained(config, "one"), tmp_path / "exported")


def test_a_trained_run_is_read_and_continued(config: Path) -> None:
    with tiny_run.a_world_that_is_left():
        model, _ = checkpoint.load_model(trained(config, "expert"))
        tokens = torch.arange(8)[None]
        with torch.no_grad():
            assert torch.isfinite(model(tokens, None, None)).all()
