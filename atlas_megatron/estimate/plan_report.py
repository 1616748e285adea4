"""What a plan says on the screen: the best layouts, why the others fall out, and what all of it was estimated from."""

from __future__ import annotations

import re

from rich.console import Group, RenderableType
from rich.table import Table

from atlas_megatron.config import Config
from atlas_megatron.config.values import toml_value
from atlas_megatron.estimate.machine import DEVICES_PER_NODE, LINK_SHARE, LINKS
from atlas_megatron.estimate.plan import CHOSEN, Estimate, FallenOut, Plan, Planner, Sizes, value_of

BEST = 5


def report(planner: Planner, plan: Plan) -> Group:
    """The best layouts with their words, the reasons of the others by how many fall out for each, the assumptions."""
    parts: list[RenderableType] = []
    if plan.fitting:
        best = plan.fitting[:BEST]
        parts += [_best(planner, plan), _cost(planner, best[0]), "words of each, for the command line:"]
        parts += [f"  {place}: {words(planner.config, one.config)}" for place, one in enumerate(best, 1)]
    else:
        parts.append(_none(planner, plan))
    parts += [_others(plan), *_assumptions(planner)]
    return Group(*parts)


def words(before: Config, planned: Config) -> str:
    """What makes one configuration the other, as words of a command line."""
    said = [
        f"{name}={toml_value(value_of(planned, name))}"
        for name in CHOSEN
        if value_of(planned, name) != value_of(before, name)
    ]
    # A pattern without cuts of its own is cut alike where it is read.
    if "|" in before.model.pattern and planned.model.pattern != before.model.pattern:
        said.append(f"'model.pattern=\"{planned.model.pattern}\"'")
    return " ".join(said) or "none: as the configuration is"


def _best(planner: Planner, plan: Plan) -> Table:
    layouts = f"layout{'s' if len(plan.fitting) > 1 else ''}"
    table = Table(
        *("", "tensor", "pipeline", "context", "data", "micro-batch", "besides", "memory", "waiting", "sent a step"),
        *("s a step", "MFU", "hours"),
        title=f"{planner.world_size:,} devices of {_gib(planner.machine.memory)}: the best of {len(plan.fitting)} "
        f"{layouts} that fit, by estimates",
        pad_edge=False,
    )
    for place, one in enumerate(plan.fitting[:BEST], 1):
        parallel, train = one.config.parallel, one.config.train
        tensor, pipeline, context, data = map(str, one.sizes)
        stages = f"{pipeline} of {parallel.virtual} stages" if parallel.virtual > 1 else pipeline
        some = f" {train.recompute_layers} layers" if train.recompute_layers else ""
        marks = {"sequence": parallel.sequence, f"experts on {parallel.expert}": parallel.expert > 1}
        besides = [name for name, on in (marks | {f"recompute{some}": train.recompute}).items() if on]
        table.add_row(
            *(str(place), tensor, stages, context, data, str(train.micro_batch), ", ".join(besides)),
            *(_gib(one.memory), f"{one.waiting:.1%}", _gib(one.sent), f"{one.seconds:.3g}", f"{one.mfu:.1%}"),
            f"{one.hours:,.3g}",
        )
    for column in table.columns[7:]:
        column.justify = "right"
    return table


def _cost(planner: Planner, best: Estimate) -> str:
    """Hours of all devices, and what they cost where somebody said the price of one."""
    hours, price = best.hours * planner.world_size, planner.machine.price
    cost = f", which cost {hours * price:,.3g} at {price:g} each" if price else " (price=2.5 adds what they cost)"
    return f"the run with the first: {hours:,.3g} device hours{cost}"


def _none(planner: Planner, plan: Plan) -> str:
    """That nothing fits, and what comes nearest."""
    said = f"no layout of {planner.world_size:,} devices of {_gib(planner.machine.memory)} fits"
    small = [one for one in plan.others if one.memory]
    if not small:
        return f"{said}; what keeps each from training stands below"
    nearest = min(small, key=lambda one: one.memory)
    return (
        f"{said}: the nearest, {_sizes(nearest.sizes)}, needs about {_gib(nearest.memory)}; take more or larger "
        "devices, or a smaller model"
    )


def _others(plan: Plan) -> Table:
    """How many layouts fall out for each reason, and one of them."""
    names = ("why the others fall out", "layouts", "for example (tensor x pipeline x context x data)")
    table = Table(*names, pad_edge=False)
    table.columns[1].justify = "right"
    large = [one for one in plan.others if one.memory]
    if large:
        nearest = min(large, key=lambda one: one.memory)
        said = f"{_sizes(nearest.sizes)}, the smallest: about {_gib(nearest.memory)}"
        table.add_row("more memory than a device has", str(len(large)), said)
    refused: dict[str, list[FallenOut]] = {}
    for other in plan.others:
        if not other.memory:
            # Named by the key that stands first in what is wrong.
            found = re.match(r"[\w.]+", other.why)
            refused.setdefault(found[0] if found else "", []).append(other)
    for key, alike in refused.items():
        table.add_row(f"{key} does not allow it", str(len(alike)), f"{_sizes(alike[0].sizes)}: {alike[0].why}")
    slower: dict[str, list[Estimate]] = {}
    for one in plan.fitting[BEST:]:
        slower.setdefault(_loss(one, plan.fitting[0]), []).append(one)
    for why, those in slower.items():
        more = those[0].seconds / plan.fitting[0].seconds - 1
        said = f"{_sizes(those[0].sizes)}, the fastest: {those[0].seconds:.3g} s a step, {more:.0%} more than the best"
        table.add_row(f"slower, most of it {why}", str(len(those)), said)
    return table


def _loss(one: Estimate, best: Estimate) -> str:
    """What a slower layout spends most more on than the best."""
    return max(one.spent, key=lambda what: one.spent[what] - best.spent[what])


def _assumptions(planner: Planner) -> list[str]:
    machine = planner.machine
    inside, between = (f"{rate / 1e9:,.0f} GB/s" for rate in LINKS[machine.device])
    node = planner.config.parallel.devices_per_node or DEVICES_PER_NODE
    kind = "bfloat16" if planner.bf16 else "float32"
    assumed = "" if machine.said else " (assumed: device= says another)"
    return [
        f"every figure is an estimate: kernels reach {machine.mfu:.0%} of an {machine.device}'s {kind} peak{assumed} "
        f"(mfu=, a guess), messages {LINK_SHARE:.0%} (a guess) of {inside} in a node of {node} and of {between} beyond",
    ]


def _sizes(sizes: Sizes) -> str:
    return " x ".join(map(str, sizes))


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"
