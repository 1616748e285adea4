"""Where numbers stopped being numbers: the first layer with NaN or inf, found by asking every layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atlas_megatron.config import LAYERS, Config, layers_of


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
