"""What is checked and timed, in its order: the sections, their time limits and their parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks import goals
from benchmarks.gpu import newton_schulz, numerics, ops, peers, start, training
from benchmarks.gpu.bench import Bench


@dataclass(frozen=True)
class Part:
    """One piece of a section; where it fails, the next one goes on. needs: kernels that must not be red."""

    run: Callable[[Bench], None]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """title: of its figures. cap: seconds, of a process for all its parts. chosen: whether it runs unasked."""

    title: str
    cap: int
    parts: dict[str, Part]
    chosen: bool = True


NUMERICS, LOSSES = "numerics", "loss of the first steps"
KERNELS = ("newton_schulz", "omeganet", "titans", "exact", "once")
WATCHED = ("write_kernel", "write_backward_kernel")
SIZES = {"64 x 64": (64, 64), "64 x 256": (64, 256)}


def _of_members(run: Callable[[Bench, str], None], *names: str) -> dict[str, Part]:
    return {name: Part(partial(run, name=name), (name,)) for name in names}


def _of_sizes(run: Callable[[Bench, int, int], None]) -> dict[str, Part]:
    return {name: Part(partial(run, m=m, n=n), ("newton_schulz",)) for name, (m, n) in SIZES.items()}


def _of_runs(*names: str) -> dict[str, Part]:
    needs = {name: "exact" if name.startswith("exact") else "once" for name in names}
    return {name: Part(partial(training.steps, name=name), (needs[name],)) for name in names}


_REST = tuple(name for name in training.RUNS if name not in training.FIRST)
SECTIONS: dict[str, Section] = {
    "start": Section(
        "machine", 70,
        {
            "machine": Part(start.machine), "rates": Part(start.rates), "first kernel": Part(start.first_kernel),
            "compile": Part(start.compile_the_rest),
        },
    ),
    NUMERICS: Section(
        NUMERICS, 50,
        {"newton_schulz": Part(numerics.of_newton_schulz)}
        | {name: Part(partial(numerics.of_memory, name=name)) for name in KERNELS[1:]},
    ),
    "profile": Section("profile", 45, _of_members(ops.profile, "omeganet", "exact", "once")),
    "newton-schulz": Section(goals.NEWTON_SCHULZ, 30, _of_sizes(newton_schulz.size)),
    "op": Section(
        goals.MEMORY_OP, 50, _of_members(ops.op, "omeganet", "once", "exact", "titans") | {"torch": Part(ops.in_torch)}
    ),
    "training": Section(goals.TRAINING, 145, _of_runs(*training.FIRST)),
    "peers": Section(
        goals.PEERS, 45, {name: Part(partial(peers.peer, name=name), ("omeganet",)) for name in peers.NEEDS}
    ),
    "rest": Section(
        goals.REST, 45,
        _of_sizes(newton_schulz.compiled)
        | {"edges": Part(ops.edges)}
        | {name: Part(partial(ops.ncu, kernel=name), ("omeganet",)) for name in WATCHED},
    ),
    # By name alone: `--sections more`, in another call.
    "more": Section(goals.TRAINING, 400, _of_runs(*_REST), chosen=False),
    "losses": Section(LOSSES, 150, {"losses": Part(training.losses, ("once",))}, chosen=False),
}  # fmt: skip
