"""What a memory recalls before any training, by how far back it lies.

A layer of configs/experiments/language_model.toml writes 512 pairs of random keys and values once. Gates, retention and
start weights are those that an untrained layer begins with. Then every key is read, and nothing more is written. A key
counts as recalled where the read is nearer to its own value than to all others, by the dot product over all heads.

A model whose memory recalls from the first step on need not learn to. It takes about a minute on a core.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean

import torch
import torch.nn.functional as F
from matplotlib import pyplot
from torch import Tensor

from atlas_kernels import omega_memory
from atlas_kernels.layer_start import (
    gate_starts,
    gates_of,
    initial_weights,
    lifted_for,
    second_gain,
    start_coefficients,
)
from atlas_kernels.op import read_memory
from atlas_megatron.config import MemoryConfig, load
from experiments.shared import record

BASE = record.ROOT / "configs" / "experiments" / "language_model.toml"
PAIRS, QUICK_PAIRS = 512, 64
SEEDS = (0, 1, 2, 3)
BINS = ((0, 16), (16, 32), (32, 64), (64, 128), (128, 256), (256, 512))  # how many pairs were written after it


@dataclass(frozen=True)
class Row:
    """A memory. words: changes of the base. second: the size of W2's columns; 0: as the memory starts."""

    words: tuple[str, ...] = ()
    asks: str = ""
    second: float = 0.0


ATLASPP = "memory.preset=atlas++"
OMEGANET, TITANS = ("memory.preset=omeganet", "memory.chunk=16"), ("memory.preset=titans", "memory.chunk=16")
FREE = "memory.residual=false"
ROWS: dict[str, Row] = {
    "atlas": Row(asks="as it starts"),
    "atlas, W2 of length 1": Row((), "hidden units that do not bend", second=1.0),
    "atlas, W2 twice as long": Row((), "hidden units that bend more", second=16.0),
    "atlas without residual": Row((FREE,), "the residual, and the start of W1 that follows"),
    "atlas++": Row((ATLASPP,), "hidden units that are products"),
    "atlas++ with residual": Row((ATLASPP, "memory.residual=true"), "the residual, and the start of W1 that follows"),
    "atlas, a write a token": Row(("memory.ns_period=1",), "the period"),
    "atlas, a write a chunk": Row(("memory.ns_period=64",), "the period, and the retention that follows"),
    "atlas, a write a chunk, smaller": Row(("memory.ns_period=64", "memory.eta_start=0.08"), "a quarter of the step"),
    "atlas, twice the step": Row(("memory.eta_per_token=0.01",), "the step"),
    "atlas, c = 1": Row(("memory.window=1",), "the window"),
    "atlas, three steps of Newton-Schulz": Row(("memory.ns_steps=3",), "exactness"),
    "OmegaNet": Row(OMEGANET, "raw gradients"),
    "OmegaNet, W2 of length 1": Row(OMEGANET, "hidden units that do not bend", second=1.0),
    "OmegaNet without residual": Row((*OMEGANET, FREE), "the residual"),
    "Titans": Row(TITANS, "raw gradients, momentum"),
    "Titans, W2 of length 1": Row(TITANS, "hidden units that do not bend", second=1.0),
    "DeltaNet": Row(("memory.preset=delta",), "a matrix, and errors at every token"),
}
OBSERVED = (
    "The residual costs recall. With it a memory M(x) = x + W1 act(W2 x) has to learn the value less the key. A gated "
    "memory recalls nothing then. The likeliest reason: its hidden units are products of two views of the key, and "
    "sums of those are far from the key itself.",
    "With columns of length one in W2 a key moves each hidden unit by a tenth, where the activation is nearly a line. "
    "ATLAS then recalls next to nothing. Longer columns and larger steps recall more.",
    "OmegaNet and Titans recall less with longer columns. The likeliest reason: hidden units that bend have a mean "
    "that all keys share. W1's start answers it, the output norm is set by that answer, and writes are small beside "
    "it.",
    "atlas++ recalls far more than all others beyond 64 pairs. Of the last 16 pairs DeltaNet recalls most: it writes "
    "at every token, without momentum.",
    "With one write a chunk ATLAS recalls next to nothing at the start. It forgets four times as fast then.",
    "More recall at the start is not a better model at the end. OmegaNet [ends better](language_model.md) with the "
    "longer columns, from one seed.",
    "The keys are random. Those of a trained model are correlated, and not all of them are asked for.",
)
QUICK = ("atlas", "atlas++", "OmegaNet", "DeltaNet")
DRAWN = ("atlas", "atlas without residual", "atlas++", "OmegaNet", "Titans", "DeltaNet")


def recalled(row: Row, seeds: Sequence[int], pairs: int) -> record.Cell:
    """The share recalled of each bin, over the seeds."""
    shares = [_of_seed(load(BASE, row.words).memory, row.second, seed, pairs) for seed in seeds]
    bins = [(low, high) for low, high in BINS if high <= pairs]
    return {"recalled": [round(mean(float(s[low:high].mean()) for s in shares), 4) for low, high in bins]}


@torch.no_grad()
def _of_seed(memory: MemoryConfig, second: float, seed: int, pairs: int) -> Tensor:
    """Whether each pair is recalled, as a share over sequences, float32: at place n the one that n pairs followed."""
    torch.manual_seed(seed)
    batch, shape = 4, (4, pairs, memory.heads, memory.head_dim)
    k, v = (F.normalize(torch.randn(shape), dim=-1) for _ in range(2))
    weights = list(initial_weights(memory))
    if second:
        weights[1] *= second / second_gain(memory)
    learned = start_coefficients(memory)
    coefficients = None if learned is None else learned.repeat(memory.heads, 1)
    lifted = lifted_for(memory, k, coefficients, key=True)
    rule = memory.rule()
    bias = torch.tensor(gate_starts(memory, load(BASE).model.seq_length)).repeat(memory.heads, 1)
    gates = gates_of(memory, torch.zeros(batch, pairs, bias.numel()), bias, k, v)
    _, state = omega_memory(lifted, lifted, v, gates, tuple(weights), rule)
    y = read_memory(lifted_for(memory, k, coefficients), tuple(weights), rule, state)
    scores = y.flatten(2) @ v.flatten(2).mT
    return (scores.argmax(-1) == torch.arange(pairs)).float().mean(0).flip(0)


def draw(results: record.Record, names: Sequence[str]) -> None:
    """Recall against how far back a pair lies."""
    figure, axes = pyplot.subplots(figsize=(6.5, 3.6), layout="constrained")
    for name in names:
        shares = results.cells[name]["recalled"]
        axes.plot([low + (high - low) / 2 for low, high in BINS[: len(shares)]], shares, "o-", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("pairs written since")
    axes.set_ylabel("share recalled")
    figure.legend(fontsize="small", loc="outside right upper")
    results.save_figure(figure)


def describe(results: record.Record, names: Sequence[str], pairs: int) -> None:
    """The page, from the numbers."""
    memory = load(BASE).memory
    bins = [f"{low} to {high}" for low, high in BINS if high <= pairs]
    rows = [(n, ROWS[n].asks, *(f"{100 * share:.0f}" for share in results.cells[n]["recalled"])) for n in names]
    results.write_text(
        "Recall at the start",
        f"Percent of {pairs} random pairs that an untrained layer recalls, by how many were written after them. "
        f"A layer has {memory.heads} heads of {memory.head_dim}. All was written once, at the values that gates and "
        f"weights start from. Mean of {len(SEEDS)} seeds and four sequences each.",
        [record.Table(("memory", "asks", *bins), rows)],
        OBSERVED if set(names) == set(ROWS) else (),
    )


def main(words: Sequence[str] | None = None) -> int:
    """Compute what is missing, then draw and describe."""

    def experiment() -> None:
        asked = record.options("start_recall", __doc__ or "", words)
        names, seeds, pairs = (QUICK, SEEDS[:1], QUICK_PAIRS) if asked.quick else (tuple(ROWS), SEEDS, PAIRS)
        results = record.Record("start_recall", asked, {"base": BASE.read_text(encoding="utf-8"), "pairs": pairs})
        for name in names:
            results.cell(name, partial(recalled, ROWS[name], seeds, pairs))
        draw(results, [name for name in DRAWN if name in names])
        describe(results, names, pairs)

    return record.run("start_recall", experiment)


if __name__ == "__main__":
    sys.exit(main())
