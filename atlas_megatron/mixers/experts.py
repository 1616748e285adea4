"""What an `E` layer costs: a router, experts of which each token passes some, and an MLP that every token passes.

E experts of F numbers inside, k a token, H hidden size, S inside the shared one. A token takes 2 H E + 6 H (k F + S)
FLOPs. Of p ranks that share the experts out, each sends (p - 1) / p of k (H numbers and a weight) a token, and gets
back as much, in the mean over ranks: who sends how much to whom is the router's choice.
"""

from __future__ import annotations

from atlas_megatron.config import Config
from atlas_megatron.mixers.costs import FLOAT, Costs


class Experts(Costs):
    """Core's mixture of experts: each expert is whole on a rank, the shared one is split as an MLP."""

    @classmethod
    def num_params(cls, settings: Config) -> int:
        hidden, experts = settings.model.hidden_size, settings.experts
        shared = 3 * hidden * experts.shared_ffn_hidden_size
        return hidden * experts.count + cls.expert_params(settings) + shared

    @classmethod
    def replicated_params(cls, settings: Config) -> int:
        """The router."""
        return settings.model.hidden_size * settings.experts.count

    @classmethod
    def expert_params(cls, settings: Config) -> int:
        return settings.experts.count * cls._one(settings)

    @classmethod
    def idle_params(cls, settings: Config) -> int:
        return (settings.experts.count - settings.experts.top_k) * cls._one(settings)

    @classmethod
    def _one(cls, settings: Config) -> int:
        return 3 * settings.model.hidden_size * settings.experts.ffn_hidden_size

    @classmethod
    def flops_per_token(cls, settings: Config) -> tuple[float, float]:
        hidden, experts = settings.model.hidden_size, settings.experts
        inside = experts.top_k * experts.ffn_hidden_size + experts.shared_ffn_hidden_size
        return 2.0 * hidden * experts.count + 6.0 * hidden * inside, 0.0

    @classmethod
    def linears(cls, settings: Config) -> tuple[int, int]:
        """The shared expert's."""
        return super().linears(settings) if settings.experts.shared_ffn_hidden_size else (0, 0)

    @classmethod
    def dispatched_numbers(cls, settings: Config) -> tuple[int, int]:
        top_k = settings.experts.top_k
        return top_k * settings.model.hidden_size, top_k

    @classmethod
    def activation_bytes(cls, settings: Config, size: int) -> float:
        """The router's weights and choices; of each expert a token goes to, its input as it is sent and as it is
        sorted, both halves, their product and the output; the shared expert's halves and product."""
        experts, tensor = settings.experts, settings.parallel.tensor
        routed = experts.top_k * (3 * settings.model.hidden_size + 3 * experts.ffn_hidden_size) * size
        return (routed + 2 * experts.count * FLOAT + 3 * experts.shared_ffn_hidden_size * size) / tensor
