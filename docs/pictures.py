"""The pictures of concepts.md: `python docs/pictures.py` draws them into docs/pictures/."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from atlas_kernels.newton_schulz import newton_schulz
from atlas_megatron.reports.style import STYLE

FOLDER = Path(__file__).parent / "pictures"
WRITE, READ, GRADIENT, WAIT = "#c44e52", "#4c72b0", "#55a868", "#b0b0b0"


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color, connectionstyle=style))


def one_chunk(name: str = "one_chunk", tokens: int = 4) -> None:
    """A chunk of four tokens: gradients at its start, writes in order, each read after its write."""
    figure, axes = pyplot.subplots(figsize=(8.6, 3.4), layout="constrained")
    axes.set_axis_off()
    axes.set(xlim=(-1.3, tokens + 1.3), ylim=(-0.35, 3.5))
    for at in range(tokens + 1):
        said = "A = $M_0$" if at == 0 else f"$M_{at}$"
        axes.add_patch(Rectangle((at - 0.3, 1.1), 0.6, 0.6, facecolor="#f2f2f2", edgecolor="black"))
        axes.text(at, 1.4, said, ha="center", va="center")
    for at in range(1, tokens + 1):
        arrow(axes, (at - 0.7, 1.4), (at - 0.3, 1.4), WRITE)
        axes.text(at, 2.95, f"$k_{at}, v_{at}$", ha="center")
        axes.text(at, 2.35, f"$g_{at}$", ha="center", color=GRADIENT)
        arrow(axes, (at, 2.9), (at, 2.58), "black")
        arrow(axes, (at, 2.28), (at - 0.48, 1.5), WRITE)
        arrow(axes, (at, 1.1), (at, 0.4), READ)
        axes.text(at, 0.12, f"$y_{at}$", ha="center", color=READ)
    for at in range(1, tokens + 1):
        arrow(axes, (0.1, 1.72), (at - 0.16, 2.4), GRADIENT, -0.12)
    axes.text(-1.2, 2.35, "gradients, all at A", color=GRADIENT)
    axes.text(-1.2, 1.05, "the chunk's start", va="top")
    axes.text(-1.2, 0.12, "reads", color=READ)
    axes.text(tokens + 0.45, 1.32, "starts the\nnext chunk", va="center")
    save(figure, name)


def window(name: str = "window", tokens: int = 16, chunk: int = 8, width: int = 4) -> None:
    """Which gradients a token's write sums: the window passes over chunk borders."""
    figure, axes = pyplot.subplots(figsize=(5.6, 4.6), layout="constrained")
    for reader in range(tokens):
        for source in range(tokens):
            inside = reader - width < source <= reader
            color = (GRADIENT if source // chunk == reader // chunk else WRITE) if inside else "#f7f7f7"
            axes.add_patch(Rectangle((source, reader), 1, 1, facecolor=color, edgecolor="white"))
    axes.axvline(chunk, color="black", linestyle=":")
    axes.axhline(chunk, color="black", linestyle=":")
    axes.set(xlim=(0, tokens), ylim=(tokens, 0), xlabel="token whose gradient is summed", ylabel="token that writes")
    axes.set_aspect("equal")
    axes.grid(False)
    axes.set_title(f"window {width}, chunks of {chunk}; red: gradients of the chunk before", fontsize="medium")
    save(figure, name)


def spectrum(name: str = "newton_schulz") -> None:
    """What Newton-Schulz does to the singular values of a momentum: five steps bring them near one."""
    values = torch.logspace(0, -2.3, 64, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    matrix = basis @ torch.diag(values) @ basis.T
    figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    axes.plot(values / values.norm(), color="black", linestyle="--", label="before, at Frobenius norm 1")
    for steps in (1, 3, 5):
        found = torch.linalg.svdvals(newton_schulz(matrix, steps))
        axes.plot(found, label=f"after {steps} step{'s' if steps > 1 else ''}")
    axes.set(xlabel="singular value, the largest first", ylabel="size", yscale="log")
    axes.legend()
    save(figure, name)


def hand_off(name: str = "hand_off", ranks: int = 4, layers: int = 3) -> None:
    """The forward pass of a sequence over four ranks: the state passes to the right, and nobody waits to the left."""
    figure, axes = pyplot.subplots(figsize=(8.2, 3.0), layout="constrained")
    for rank in range(ranks):
        axes.add_patch(Rectangle((0, rank + 0.1), rank, 0.8, facecolor=WAIT, alpha=0.4))
        for layer in range(layers):
            start = rank + layer
            axes.add_patch(Rectangle((start, rank + 0.1), 1, 0.8, facecolor=READ, alpha=0.65 + 0.15 * layer))
            axes.text(start + 0.5, rank + 0.5, f"layer {layer + 1}", ha="center", va="center", color="white")
            if rank + 1 < ranks:
                arrow(axes, (start + 1, rank + 0.75), (start + 1.06, rank + 1.3), WRITE)
    axes.set(xlim=(0, ranks + layers), ylim=(ranks, 0), xlabel="time, in scans of one rank's tokens")
    axes.set_yticks([rank + 0.5 for rank in range(ranks)], [f"rank {rank}" for rank in range(ranks)])
    axes.grid(False)
    save(figure, name)


def save(figure: pyplot.Figure, name: str) -> None:
    figure.savefig(FOLDER / f"{name}.png", metadata={"Software": None})
    pyplot.close(figure)


def main() -> int:
    with pyplot.style.context(STYLE):
        for draw in (one_chunk, window, spectrum, hand_off):
            draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
