"""What a run does at NaN or inf: where they were first seen, and whether the batch is skipped or the run ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atlas_megatron.cli.ending import NonFiniteError
from atlas_megatron.config import LAYERS, Config, layers_of
from atlas_megatron.config.sections import ResilienceConfig


@dataclass(frozen=True)
class Trouble:
    """What is not finite, and the layer in which it was first seen, in words."""

    what: str
    where: str


class Action(Enum):
    """What follows a step's forward and backward passes."""

    CONTINUE = "continue"  # update the weights
    SKIP = "skip"  # leave the batch out
    RETURN = "return"  # leave it out, and load the newest whole checkpoint
    STOP = "stop"  # end the run; nothing is saved from here on


@dataclass(frozen=True)
class Decision:
    """An action, and for `STOP` the limit that was reached, if any."""

    action: Action
    why: str = ""


class Policy:
    """Decides by `resilience.*` what follows NaN or inf; the same in every process that is told the same.

    skipped, returns: batches skipped and returns to a checkpoint in the whole run, as its checkpoint counts them.
    """

    def __init__(
        self, limits: ResilienceConfig, say: Callable[[str], None], *, skipped: int = 0, returns: int = 0
    ) -> None:
        self.skipped, self.returns = skipped, returns
        self._limits, self._say = limits, say
        self._in_a_row = 0

    def decide(self, step: int, trouble: Trouble | None) -> Decision:
        """What follows a step, before its update. trouble: None where all is finite. A skip is counted and logged."""
        limits = self._limits
        if trouble is None:
            self._in_a_row = 0
            return Decision(Action.CONTINUE)
        if limits.non_finite == "stop":
            return Decision(Action.STOP)
        if self.skipped >= limits.most_skipped:
            return Decision(Action.STOP, f"resilience.most_skipped={limits.most_skipped} batches were skipped")
        self._in_a_row += 1
        self.skipped += 1
        counts = f"{self._in_a_row} in a row, {self.skipped} in all"
        self._say(f"step {step}: {trouble.what}, first seen in {trouble.where}: batch skipped ({counts})")
        if self._in_a_row < limits.skips_in_a_row:
            return Decision(Action.SKIP)
        if self.returns >= limits.most_returns:
            return Decision(Action.STOP, f"resilience.most_returns={limits.most_returns} brought no more steps")
        self._in_a_row = 0
        self.returns += 1
        return Decision(Action.RETURN)


def before_update(
    chunks: list[torch.nn.Module],
    config: Config,
    loss: float,
    layers: dict[str, dict[str, Any]],
    forward: Callable[[], Any],
    norm: Callable[[], float],
) -> Trouble | None:
    """What is not finite in a step before its update; the same in every process, and every process calls this.

    layers: the measurements of memories, by layer number. forward: as in `in_forward`. norm: computes the norm of the
    gradients; called only where batches may be skipped, for elsewhere the optimizer reports it after the update.
    """
    if not math.isfinite(loss):
        return Trouble(f"loss is {loss}", in_forward(chunks, config, forward))
    if bad := in_measurements(layers):
        return Trouble(f"{bad[0]} is not finite", describe(bad[1], config))
    return in_norm(chunks, config, norm()) if config.resilience.non_finite == "skip" else None


def in_norm(chunks: list[torch.nn.Module], config: Config, norm: float) -> Trouble | None:
    """The trouble of gradients with this norm, None where it is finite."""
    return None if math.isfinite(norm) else Trouble(f"gradient norm is {norm}", in_gradients(chunks, config))


def error(step: int, trouble: Trouble, why: str, last: Path | None) -> NonFiniteError:
    """What ends the run. why: as in `Decision`; last: the newest whole checkpoint."""
    kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    return NonFiniteError(
        f"step {step}: {trouble.what}, first seen in {trouble.where}{f'; {why}' if why else ''}; {kept}: "
        "lower train.lr or memory.eta_start, or take memory.norm=layer, and start again"
    )


def in_forward(chunks: list[torch.nn.Module], config: Config, forward: Callable[[], Any]) -> str:
    """The first layer of the whole model whose parameters or outputs are not finite, in words.

    `forward` runs the step's batches again through `chunks`, this process's stages; every process calls this.
    """
    found: list[tuple[int, str]] = []
    hooks = []
    for number, module in _layers(chunks):
        bad = [name for name, parameter in module.named_parameters() if not _finite(parameter)]
        if bad:
            found.append((number, f"parameter {bad[0]} of {describe(number, config)}"))
        hooks.append(module.register_forward_hook(_watch(number, config, found)))
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    # The first in depth; in a layer with a bad parameter and so a bad output, the parameter, found before.
    everywhere = sorted(_gathered(found), key=lambda item: item[0])
    return everywhere[0][1] if everywhere else "no layer: its outputs are finite when the step is repeated"


def in_gradients(chunks: list[torch.nn.Module], config: Config) -> str:
    """The layer nearest to the loss whose gradients are not finite: backward, trouble spreads away from there."""
    found = []
    for number, module in _layers(chunks):
        # main_grad: the parameter's part of the data-parallel gradient buffer.
        grads = {name: getattr(p, "main_grad", None) for name, p in module.named_parameters()}
        bad = [name for name, grad in grads.items() if grad is not None and not _finite(grad)]
        if bad:
            found.append((number, f"gradient of {bad[0]} in {describe(number, config)}"))
    everywhere = _gathered(found)
    return max(everywhere)[1] if everywhere else "no single gradient: their norm overflows"


def in_measurements(layers: dict[str, dict[str, Any]]) -> tuple[str, int] | None:
    """The first measurement of a memory that is not finite, and its layer's number."""
    for number, layer in layers.items():
        for name, value in layer.items():
            if not all(map(math.isfinite, value if isinstance(value, list) else [value])):
                return name, int(number)
    return None


def describe(number: int, config: Config) -> str:
    """A layer's name for people; 0 is the embedding."""
    return f"layer {number} ({LAYERS[layers_of(config)[number - 1]].kind})" if number else "the embedding"


def _layers(chunks: list[torch.nn.Module]) -> list[tuple[int, torch.nn.Module]]:
    """The layers of these stages by their number in the whole model."""
    found: list[tuple[int, torch.nn.Module]] = []
    for chunk in chunks:
        named = dict(chunk.named_modules())
        stack = next(module for name, module in named.items() if name.endswith("decoder"))
        found += [(0, module) for name, module in named.items() if name.endswith("embedding")]
        found += [(layer.layer_number, layer) for layer in stack.layers]
    return found


def _watch(number: int, config: Config, found: list[tuple[int, str]]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if not all(_finite(t) for t in tensors if isinstance(t, Tensor)):
            found.append((number, f"output of {describe(number, config)}"))

    return hook


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _gathered(found: list[tuple[int, str]]) -> list[tuple[int, str]]:
    lists: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(lists, found)
    return [item for items in lists for item in items]
