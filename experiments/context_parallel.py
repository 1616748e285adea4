"""Context parallelism measured: a memory layer's time, work and bytes in each mode, and how exact it stays.

A layer with the quickstart's rule runs forward and backward on 1, 2 and 4 processes of one thread each. The total work
is the same. Processes may share cores, so the processes' own work and the bytes that they send are compared. The time
on cores of their own is modelled from these, and held against the wall clock where each process has a core.

Then the model of a trained run: its gradients and likeliest tokens over ranks, beside those of one process. The scale
for that is one process whose embeddings are moved by one unit in the last place.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from matplotlib import pyplot

from atlas_megatron.config import Config, MemoryConfig, ModelConfig, ParallelConfig
from experiments.shared import context_worker, record
from experiments.shared.context_worker import Compared, Timed


@dataclass(frozen=True)
class Layout:
    """Context-parallel ranks, the mode in which they exchange, and the ranks of a node (0: not given)."""

    ranks: int
    mode: str = "auto"
    node: int = 0

    @property
    def name(self) -> str:
        return f"{self.ranks} ranks, {self.mode}" if self.ranks > 1 else "1 rank"

    @property
    def chain(self) -> int:
        """How many ranks pass a state on, one after the other."""
        return {"handoff": self.ranks, "heads+handoff": self.ranks // max(1, self.node)}.get(self.mode, 1)

    def parallel(self) -> ParallelConfig:
        return ParallelConfig(context=self.ranks, context_mode=self.mode, devices_per_node=self.node)


LAYOUTS = (
    Layout(1),
    Layout(2, "heads"),
    Layout(2, "handoff"),
    Layout(4, "heads"),
    Layout(4, "handoff"),
    Layout(4, "heads+handoff", 2),
)


@dataclass(frozen=True)
class Grid:
    """What is timed and compared."""

    tokens: int
    batch: int
    hidden: int
    heads: int
    head_dim: int
    rounds: int
    run: str  # folder of a trained run; empty: nothing is compared
    sequences: int  # of the comparison
    together: int  # sequences in one forward

    def config(self, layout: Layout) -> Config:
        """A single memory layer."""
        return Config(
            model=ModelConfig(
                pattern="M", hidden_size=self.hidden, ffn_hidden_size=64, vocab_size=64, seq_length=self.tokens
            ),
            memory=MemoryConfig(heads=self.heads, head_dim=self.head_dim, norm="layer", ns_period=64),
            parallel=layout.parallel(),
        )


FULL = Grid(
    tokens=4096, batch=1, hidden=256, heads=8, head_dim=32, rounds=7, run="runs/quickstart", sequences=176, together=4
)
QUICK = Grid(tokens=256, batch=1, hidden=32, heads=4, head_dim=8, rounds=1, run="", sequences=0, together=0)


def in_processes(ranks: int, work: Callable[[Any], Any], given: Any) -> list[Any]:
    """What work(given) returns in each of `ranks` processes."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        # Forked from a server that has imported everything once.
        multiprocessing.set_forkserver_preload([context_worker.__name__])
        given_all = (ranks, port, folder, work, given)
        torch.multiprocessing.start_processes(_process, given_all, nprocs=ranks, start_method="forkserver")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]


def _process(rank: int, ranks: int, port: int, folder: str, work: Callable[[Any], Any], given: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(work(given)))


def time_layout(grid: Grid, layout: Layout) -> record.Cell:
    """Seconds of the slowest rank, each rank's work, and the bytes that each sent."""
    found = in_processes(
        layout.ranks, context_worker.time_layer, Timed(grid.config(layout), grid.batch, grid.rounds)
    )
    sent = [part["sent"] for part in found]
    return {
        "wall_seconds": round(max(part["wall"] for part in found), 4),
        "work_seconds": [round(part["work"], 4) for part in found],
        "sent_bytes": {kind: [part.get(kind, 0) for part in sent] for kind in ("point to point", "all-to-all")},
        "bytes_per_second": found[0].get("bytes_per_second"),
    }


def compare_layout(grid: Grid, layout: Layout, *, disturbed: bool = False) -> record.Cell:
    """How far a layout's gradients and likeliest tokens are from those of one process."""
    compared = Compared(str(record.ROOT / grid.run), layout.parallel(), grid.sequences, grid.together, disturbed)
    alone = replace(compared, parallel=ParallelConfig(), disturbed=False)
    (whole,) = in_processes(1, context_worker.outputs_and_gradients, alone)
    found = in_processes(layout.ranks, context_worker.outputs_and_gradients, compared)[0]
    agreeing = (whole.pop("likeliest") == found.pop("likeliest")).double().mean().item()
    apart = {name: ((found[name] - whole[name]).norm() / whole[name].norm()).item() for name in whole}
    joined = [torch.cat([gradients[name].flatten() for name in whole]) for gradients in (found, whole)]
    return {
        "agreeing_tokens": agreeing,
        "gradient_rms": ((joined[0] - joined[1]).norm() / joined[1].norm()).item(),
        "worst_gradient_rms": max(apart.values()),
        "worst_gradient": max(apart, key=lambda name: apart[name]),
    }


def modelled(results: record.Record, layout: Layout) -> float:
    """Seconds if each process had a core: its work, the wait for the first state, and its bytes on the link.

    A chain of c ranks works on s = 2 c slices. The last rank begins its scan when c - 1 slices have passed the others.
    In the backward the first rank waits as long. So (c - 1) / s of a rank's work is added, as if all work were scan.
    """
    cell = results.cells[layout.name]
    work = sum(cell["work_seconds"]) / layout.ranks
    waiting = (layout.chain - 1) / (2 * layout.chain)
    sent = max(map(sum, zip(*cell["sent_bytes"].values(), strict=True)))
    return work * (1 + waiting) + (sent / cell["bytes_per_second"] if sent else 0.0)


def draw(results: record.Record) -> None:
    with pyplot.style.context(record.STYLE):
        figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
        names = [layout.name.replace(", ", "\n") for layout in LAYOUTS]
        base = sum(results.cells[LAYOUTS[0].name]["work_seconds"])
        work = [sum(results.cells[layout.name]["work_seconds"]) / base for layout in LAYOUTS]
        speed = [base / modelled(results, layout) for layout in LAYOUTS]
        places = range(len(LAYOUTS))
        panels[0].bar([p - 0.2 for p in places], work, 0.4, label="work of all ranks / one rank's")
        panels[0].bar([p + 0.2 for p in places], speed, 0.4, label="modelled speed, a core each")
        panels[0].legend()
        bottom = [0.0] * len(LAYOUTS)
        for kind in ("point to point", "all-to-all"):
            sent = [max(results.cells[layout.name]["sent_bytes"][kind]) / 2**20 for layout in LAYOUTS]
            panels[1].bar(places, sent, 0.6, bottom=bottom, label=kind)
            bottom = [a + b for a, b in zip(bottom, sent, strict=True)]
        panels[1].set_ylabel("MiB a rank sends, forward and backward")
        panels[1].legend()
        for axes in panels:
            axes.set_xticks(places, names, fontsize="small")
        results.save_figure(figure)


def describe(results: record.Record, grid: Grid) -> None:
    """The page: what each layout costs, and, of a trained model, how far it is from one process."""
    cores, rows = cores_of(results), []
    base = sum(results.cells[LAYOUTS[0].name]["work_seconds"])
    for layout in LAYOUTS:
        cell = results.cells[layout.name]
        work, seconds = sum(cell["work_seconds"]), modelled(results, layout)
        sent = max(map(sum, zip(*cell["sent_bytes"].values(), strict=True))) / 2**20
        wall, faster = cell["wall_seconds"], results.cells[LAYOUTS[0].name]["wall_seconds"] / cell["wall_seconds"]
        measured = (f"{1e3 * wall:.0f}", f"{faster:.2f}") if layout.ranks <= cores else ("", "")
        row = (layout.name, f"{1e3 * work:.0f}", f"{work / base:.2f}", f"{sent:.2f}", f"{1e3 * seconds:.0f}")
        rows.append((*row, f"{base / seconds:.2f}", *measured))
    head = ("layout", "work, ms", "work / one rank's", "sent by a rank, MiB", "modelled, ms", "modelled speed-up")
    observed = ["What a hand-off sends does not grow with the tokens; an all-to-all's bytes do."]
    if any(layout.ranks > cores for layout in LAYOUTS):
        observed[0] += """ Where processes share a core, they also share its caches. Their work counts what that costs.
            So the modelled speed of those layouts is too low."""
    results.write_text(
        "Context parallelism",
        f"One memory layer over {grid.batch} x {grid.tokens:,} tokens, forward and backward, one thread a process, on "
        f"{cores} cores. It has {grid.heads} heads of {grid.head_dim}. Chunks have 64 tokens, windows 16, and each "
        f"chunk takes five Newton-Schulz steps. Times are medians of {grid.rounds} rounds after one to warm up. "
        "*Work*: the processes' own time, added up. *Sent by a rank*: by the one that sends most. *Modelled*: the time "
        "with a core for each process. *Measured*: the wall clock, where each process had a core.",
        [
            record.Table((*head, "measured, ms", "measured speed-up"), rows),
            *(compared_blocks(results, grid) if grid.run else ()),
        ],
        observed,
    )


def compared_blocks(results: record.Record, grid: Grid) -> tuple[str, record.Table]:
    """How far gradients and likeliest tokens are from one process's."""
    names = {layout.name: f"{layout.name}: compared" for layout in LAYOUTS[1:]}
    names["1 rank, embeddings moved"] = "noise"
    rows = []
    for shown, name in names.items():
        cell = results.cells[name]
        rows.append((shown, f"{cell['gradient_rms']:.1e}", f"{100 * cell['agreeing_tokens']:.3f}"))
    said = (
        f"The trained quickstart model in float32 over ranks, beside one process, on {grid.sequences} validation "
        "sequences. The last row is one process beside itself, with embeddings moved by one unit in the last place."
    )
    head = ("layout", "relative RMS of all gradients", "tokens with the same likeliest successor, %")
    return said, record.Table(head, rows)


def cores_of(results: record.Record) -> int:
    """Cores of the machine that the times were measured on."""
    return int(results.content["machine"].rpartition(", ")[2].split()[0])


def main(words: Sequence[str] | None = None) -> int:
    asked = record.options("context_parallel", __doc__, words)
    grid = QUICK if asked.quick else FULL

    def experiment() -> None:
        results = record.Record("context_parallel", asked, json.loads(json.dumps(asdict(grid))))
        if grid.run and not (record.ROOT / grid.run / "checkpoints").is_dir():
            raise ValueError(f"{grid.run} holds no checkpoints of a trained model; run make quickstart first")
        for layout in LAYOUTS:
            results.cell(layout.name, partial(time_layout, grid, layout))
        if grid.run:
            results.cell("noise", partial(compare_layout, grid, LAYOUTS[0], disturbed=True))
            for layout in LAYOUTS[1:]:
                results.cell(f"{layout.name}: compared", partial(compare_layout, grid, layout))
        draw(results)
        describe(results, grid)

    return record.run("context_parallel", experiment)


if __name__ == "__main__":
    sys.exit(main())
