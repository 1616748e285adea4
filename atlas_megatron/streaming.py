"""Reading a sequence piece by piece: the states that layers carry over the cuts, and generation with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel


class StreamContext:
    """One state for each layer that has one, by layer number; passed to the model as `inference_context`.

    forward(a, context), then forward(b, context), gives what forward(a + b) gives, at any cut. A fresh context
    begins a sequence. Nothing is detached: without no_grad, gradients flow back over the cuts. Under context
    parallelism a and b are this rank's shards of them, and the states stay in that layout.
    """

    def __init__(self) -> None:
        self.states: dict[int, Any] = {}

    def is_static_batching(self) -> bool:
        """Core asks, to prepare its own caches; ours need none of it."""
        return False

    def is_dynamic_batching(self) -> bool:
        """As above: a stream is a whole batch that advances together."""
        return False


def read(model: HybridModel, tokens: Tensor, context: StreamContext) -> Tensor:
    """Logits [B, T, vocabulary] of the next T tokens [B, T] of the sequences in `context`, whole on every rank.

    Raises ValueError for a model whose tokens or layers are spread over ranks.
    """
    config = model.config
    if config.sequence_parallel or config.pipeline_model_parallel_size > 1 or config.context_parallel_size > 1:
        raise ValueError(
            f"a stream was given to a model with parallel.sequence={str(config.sequence_parallel).lower()}, "
            f"pipeline={config.pipeline_model_parallel_size}, context={config.context_parallel_size}; load its "
            "checkpoint with parallel.sequence=false, pipeline=1 and context=1"
        )
    # Layers count positions themselves; core's embedding takes none.
    return model(tokens, None, None, inference_context=context, runtime_gather_output=True)


@torch.no_grad()
def generate(
    model: HybridModel,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Continue the prompts [B, T] by `max_new_tokens` sampled tokens: [B, T + max_new_tokens].

    temperature 0 takes the likeliest token. top_p: sample from the fewest tokens that hold this much
    probability. The same seed gives the same text. Raises ValueError for arguments out of range.
    """
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected [B, T] with at least one token")
    check_sampling(temperature, top_p)
    generator = torch.Generator(tokens.device).manual_seed(seed)
    context, step = StreamContext(), tokens
    for _ in range(max_new_tokens):
        logits = read(model, step, context)[:, -1].float()
        step = sample(logits, temperature, top_p, generator)
        tokens = torch.cat([tokens, step], 1)
    return tokens


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise ValueError for arguments of `sample` that are out of range."""
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]")


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token a row [B, 1] of logits [B, vocabulary]; arguments as in `generate`."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    # A token stays if what comes before it does not yet hold top_p: the first always does.
    probabilities = probabilities.where(probabilities.cumsum(-1) - probabilities < top_p, 0.0)
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator))
