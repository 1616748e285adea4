"""Reading a sequence piece by piece: the states that layers carry over the cuts, and generation with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from atlas_megatron.mixers.stream import StreamContext

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

# Below it logits over the temperature may be infinite; the likeliest token is drawn long before.
COLDEST = 1e-6


def read(model: HybridModel, tokens: Tensor, context: StreamContext, keep: int | None = None) -> Tensor:
    """Logits [B, T, vocabulary] of the next T tokens [B, T] of the sequences in `context`, whole on every rank.

    keep: of the last so many tokens alone, [B, keep, vocabulary]; the output layer is not asked for the others.
    Raises ValueError for a model whose tokens or layers are spread over ranks.
    """
    config = model.config
    if config.sequence_parallel or config.pipeline_model_parallel_size > 1 or config.context_parallel_size > 1:
        raise ValueError(
            f"a stream was given to a model with parallel.sequence={str(config.sequence_parallel).lower()}, "
            f"pipeline={config.pipeline_model_parallel_size}, context={config.context_parallel_size}; load its "
            "checkpoint with parallel.sequence=false, pipeline=1 and context=1"
        )
    with _kept(model.output_layer, keep):
        # Layers count positions themselves; core's embedding takes none.
        return model(tokens, None, None, inference_context=context, runtime_gather_output=True)


@contextmanager
def _kept(output_layer: nn.Module, keep: int | None) -> Iterator[None]:
    """Within: the output layer sees the last `keep` tokens of [T, B, hidden] only."""

    def last(module: nn.Module, words: tuple[Tensor, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        hidden, *rest = words
        return (hidden[-keep:] if keep else hidden, *rest), named

    hook = output_layer.register_forward_pre_hook(last, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def generate(
    model: HybridModel,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    top_k: int = 0,
) -> Tensor:
    """Continue the prompts [B, T] by `max_new_tokens` sampled tokens: [B, T + max_new_tokens].

    temperature 0 takes the likeliest token. top_p: sample from the fewest tokens that hold this much
    probability. top_k: from so many likeliest ones; 0: from all. The same seed gives the same text. Raises
    ValueError for arguments out of range.
    """
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected [B, T] with at least one token")
    check_sampling(temperature, top_p, top_k)
    generator = torch.Generator(tokens.device).manual_seed(seed)
    context, step = StreamContext(), tokens
    for _ in range(max_new_tokens):
        logits = read(model, step, context, keep=1)[:, -1].float()
        step = sample(logits, temperature, top_p, generator, top_k)
        tokens = torch.cat([tokens, step], 1)
    return tokens


def check_sampling(temperature: float, top_p: float, top_k: int = 0) -> None:
    """Raise ValueError for arguments of `sample` that are out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be 0 (all tokens) or more")


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator, top_k: int = 0
) -> Tensor:
    """One token a row [B, 1] of logits [B, vocabulary]; arguments as in `generate`."""
    if temperature < COLDEST:
        return logits.argmax(-1, keepdim=True)
    probabilities, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    if top_k:
        probabilities, order = probabilities[:, :top_k], order[:, :top_k]
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    # A token stays if what comes before it does not yet hold top_p: the first always does.
    kept = probabilities.cumsum(-1) - probabilities < top_p
    # Also where top_p is no number of the probabilities' type any more.
    kept[:, 0] = True
    probabilities = probabilities.where(kept, 0.0)
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator))
