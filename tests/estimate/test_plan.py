"""What `atlas-train --plan` ranks, and why layouts fall out of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from atlas_megatron.config import Config, MemoryConfig, ModelConfig, ParallelConfig, TrainConfig, load
from atlas_megatron.config.checks import validate
from atlas_megatron.estimate.machine import LINK_SHARE, LINKS, Machine, in_nodes
from atlas_megatron.estimate.memory import footprint, fullest
from atlas_megatron.estimate.plan import Estimate, Plan, Planner, layouts
from atlas_megatron.estimate.plan_report import words
from atlas_megatron.estimate.traffic import Kind, RankPlace, bytes_sent, pipeline_bubble
from atlas_megatron.model.build import flops_per_token
from atlas_megatron.train import main
from tests.estimate.test_dry_run_report import LARGE, no_launcher  # noqa: F401

MACHINE = Machine(None, 2**40, "H100", 0.4)
SMALL = Config(
    model=ModelConfig(pattern="M-M-M-M-", hidden_size=64, ffn_hidden_size=96, vocab_size=128, seq_length=64),
    memory=MemoryConfig(heads=4, head_dim=16, expansion=2, chunk=8, window=4, ns_period=8),
    train=TrainConfig(global_batch=16, micro_batch=4, precision="bfloat16"),
    parallel=ParallelConfig(devices_per_node=8),
)


def planned(config: Config, world_size: int, memory: float = 2**40, *held: str) -> Plan:
    return Planner(config, world_size, replace(MACHINE, memory=memory), frozenset(held), bf16=True).plan()


def of(plan: Plan, *sizes: int) -> Estimate:
    return next(one for one in plan.fitting if one.sizes == sizes)


def test_every_layout_is_ranked_or_falls_out() -> None:
    plan = planned(SMALL, 8)
    assert len(list(layouts(8))) == 20  # ways to share three factors of two among four axes
    found = [one.sizes for one in plan.fitting] + [other.sizes for other in plan.others]
    assert sorted(found) == sorted(layouts(8))
    assert [one.seconds for one in plan.fitting] == pytest.approx(sorted(one.seconds for one in plan.fitting), rel=1e-2)
    for one in plan.fitting:
        validate(one.config, 8)
        assert one.memory == footprint(one.config, 8, fullest(one.config, 8, bf16=True), bf16=True).total
        assert 0 < one.mfu <= MACHINE.mfu
    why = {other.sizes: other.why for other in plan.others}
    assert why[8, 1, 1, 1].startswith("memory.heads=4 does not divide by parallel.tensor=8")
    assert why[1, 8, 1, 1] == "parallel.pipeline=8 is more stages than model.pattern has blocks"


def test_a_device_alone_waits_for_nobody() -> None:
    (one,) = planned(SMALL, 1).fitting
    assert one.mfu == pytest.approx(MACHINE.mfu)
    assert one.waiting == 0 and one.sent == 0 and one.config.train.micro_batch == 4


def test_what_does_not_fit_is_recomputed_or_falls_out() -> None:
    plain = of(planned(SMALL, 1, 2**40, "train.micro_batch"), 1, 1, 1, 1)
    held = ("train.micro_batch", "train.recompute_layers")
    tight = planned(SMALL, 1, 0.999 * plain.memory, *held).fitting[0]
    assert tight.config.train.recompute and not plain.config.train.recompute
    # Every product is computed again, but the logits', which are no layer's.
    logits = 2 * SMALL.model.hidden_size * SMALL.model.vocab_size / flops_per_token(SMALL).forward
    assert tight.spent["recomputation"] == pytest.approx(plain.spent["products"] / 3 * (1 - logits))
    # Of eight layers the first two are enough.
    some = planned(SMALL, 1, 0.999 * plain.memory, "train.micro_batch").fitting[0]
    assert some.config.train.recompute and some.config.train.recompute_layers == 2
    assert some.spent["recomputation"] == pytest.approx(tight.spent["recomputation"] / 4)
    assert tight.memory < some.memory < plain.memory
    # Where the micro-batch may be smaller, that costs nothing.
    smaller = planned(SMALL, 1, 0.999 * plain.memory).fitting[0]
    assert smaller.config.train.micro_batch == 2 and not smaller.config.train.recompute
    (other,) = planned(SMALL, 1, 1e5).others
    assert other.memory > 1e5 and other.why == "memory"


def test_a_pipeline_waits_as_its_bubble_says() -> None:
    one = of(planned(SMALL, 2, 2**40, "parallel.virtual"), 1, 2, 1, 1)
    assert one.waiting * one.seconds / (one.seconds - one.spent["messages"]) == pytest.approx(
        pipeline_bubble(one.config, 2)
    )
    # Of sixteen sequences, sixteen micro-batches make the bubble smallest; interleaved it is smaller still.
    assert one.config.train.micro_batch == 1
    interleaved = replace(SMALL, parallel=replace(SMALL.parallel, virtual=2))
    assert of(planned(interleaved, 2, 2**40, "parallel.virtual"), 1, 2, 1, 1).waiting < one.waiting
    # The last stage has the logits.
    assert one.spent["uneven stages"] > 0


def test_messages_take_the_link_that_their_group_needs() -> None:
    inside, between = (rate * LINK_SHARE for rate in LINKS["H100"])
    held = ("train.micro_batch", "parallel.sequence")
    near = of(planned(SMALL, 8, 2**40, *held), 2, 1, 1, 4)
    sent = bytes_sent(near.config, 8, RankPlace(), bf16=True)
    beside = sent.pop(Kind.GRADIENTS)
    assert near.spent["messages"] == pytest.approx(
        sum(sent.values()) / inside + max(0.0, beside / inside - near.spent["products"] * 2 / 3)
    )
    # A node of two holds the tensor-parallel group, but not the replicas.
    pairs = replace(SMALL, parallel=ParallelConfig(devices_per_node=2))
    far = of(planned(pairs, 8, 2**40, *held), 2, 1, 1, 4)
    tensor = sent[Kind.TENSOR_SUM] / inside + sent[Kind.PARAMETERS] / between
    assert far.spent["messages"] == pytest.approx(tensor + max(0.0, beside / between - far.spent["products"] * 2 / 3))


def test_what_is_given_stays() -> None:
    config = replace(SMALL, parallel=replace(SMALL.parallel, tensor=2))
    plan = planned(config, 8, 2**40, "parallel.tensor", "train.recompute")
    assert {one.sizes[0] for one in plan.fitting} == {2} and all(other.sizes[0] == 2 for other in plan.others)
    assert not any(one.config.train.recompute for one in plan.fitting)


def test_muons_states_and_products_count() -> None:
    muon = replace(SMALL, train=replace(SMALL.train, optimizer="muon"))
    by_layer = replace(muon, train=replace(muon.train, muon_layer_wise=True))
    whole, shared = (of(planned(config, 8), 1, 1, 1, 8) for config in (muon, by_layer))
    assert whole.spent["Muon's products"] == pytest.approx(8 * shared.spent["Muon's products"]) != 0
    # Of a matrix Muon keeps one number less than AdamW, but on every replica.
    assert whole.memory > of(planned(SMALL, 8), 1, 1, 1, 8).memory > shared.memory


def test_the_shipped_340m_on_sixty_four_devices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert main([str(LARGE), "--plan", "world=64", "memory=80GiB"]) == 0
    said = capsys.readouterr().out
    config, machine = in_nodes(load(LARGE)), Machine.of(["world=64", "memory=80GiB"])
    plan = Planner(config, 64, machine, frozenset(), bf16=True).plan()
    first = plan.fitting[0]
    # A model this small is copied to each device; what is left to send is gradients and parameters.
    assert first.sizes == (1, 1, 1, 64)
    assert f"the best of {len(plan.fitting)} layouts that fit, by estimates" in said
    assert said.count("estimate") >= 2 and "a guess" in said
    assert "memory.heads does not allow it" in said and "slower, most of it messages" in said
    for place, one in enumerate(plan.fitting[:5], 1):
        given = words(config, one.config)
        assert f"  {place}: {given}" in said
        again = load(LARGE, given.split())
        assert replace(again, parallel=replace(again.parallel, devices_per_node=8)) == one.config
        assert one.memory <= 80 * 2**30
    assert len(plan.fitting) + len(plan.others) == 84
    hours = 64 * first.hours
    assert first.hours == pytest.approx(28610 * first.seconds / 3600)
    assert f"the run with the first: {hours:,.3g} device hours (price=2.5 adds what they cost)" in said


def test_the_dry_run_says_the_planners_time_and_what_the_run_costs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layout that recomputes and sends, with Muon: none of it is free."""
    monkeypatch.setenv("COLUMNS", "250")
    words = ["parallel.tensor=2", "train.recompute=true", "train.optimizer=muon"]
    assert main([str(LARGE), *words, "--dry-run", "world=8", "device=H100", "price=2.5"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    machine = Machine.of(["device=H100"])
    planner = Planner(in_nodes(load(LARGE, words)), 8, machine, frozenset(), bf16=True)
    found = planner.estimate(planner.config, 0.0)
    assert f"seconds a step │ {found.seconds:,.3g}" in said
    for what in ("recomputation", "messages", "Muon's products"):
        assert f"of these, {what} │ {found.spent[what] / found.seconds:.1%}" in said and found.spent[what] > 0
    assert f"hours of the run │ {found.hours:,.3g}" in said
    assert f"device hours │ {8 * found.hours:,.3g}" in said
    assert f"cost, at 2.5 a device hour │ {20 * found.hours:,.3g}" in said


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ([], 2, "--plan wants the number of devices; write for example world=64"),
        (["world=4", "mfu=2"], 2, "'mfu=2' is no share"),
        (["world=2", "memory=1GiB"], 0, "no layout of 2 devices of 1.00 GiB fits: the nearest, "),
        (["world=3"], 0, "train.global_batch does not allow it"),
    ],
)
def test_what_cannot_be_planned(
    given: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert main([str(LARGE), "--plan", *given]) == status
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_a_pattern_with_cuts_of_its_own_is_said() -> None:
    cut = replace(SMALL, model=replace(SMALL.model, pattern="M-|M-M-M-"))
    two = of(planned(cut, 2), 1, 2, 1, 1)
    assert two.config.parallel.virtual == 1 or "model.pattern" in words(cut, two.config)
    one = of(planned(cut, 1), 1, 1, 1, 1)
    assert "model.pattern=\"M-M-M-M-\"" in words(cut, one.config)


def test_a_device_whose_rate_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="the rate of this machine's GPU is not known"):
        Planner(SMALL, 1, replace(MACHINE, device=""), frozenset(), bf16=True)
