"""How often a run reads each set of its training data, said before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atlas_megatron.config import Config
from atlas_megatron.config.batch_ramp import tokens_of
from atlas_megatron.data.prefixes import asked_tokens, blend

NEAR = 0.01  # as a share: token counts that add up to about the run's are met


@dataclass(frozen=True)
class Drawn:
    """One set of a blend, as a run reads it."""

    prefix: str
    weight: float
    held: int  # tokens that one pass over it reads
    read: float  # tokens that the run reads of it

    @property
    def epochs(self) -> float:
        return self.read / self.held


def drawn(config: Config, weights: Sequence[float], held: Sequence[int]) -> list[Drawn]:
    """What a run reads of each set of data.train. held: the tokens of one pass over each, whole sequences."""
    prefixes = [prefix for _, prefix in blend(config.data.train)]
    whole, tokens = sum(weights), tokens_of(config, config.train.steps)
    return [
        Drawn(prefix, weight / whole, size, tokens * weight / whole)
        for prefix, weight, size in zip(prefixes, weights, held, strict=True)
    ]


def tokens_of_a_pass(tokens: int, seq_length: int) -> int:
    """How many of a set's tokens one pass reads: whole sequences, and one token more for the last label."""
    return (tokens - 1) // seq_length * seq_length


def lines(config: Config, sets: Sequence[Drawn]) -> list[str]:
    """A line for each set; on those that are read more than once; on token counts that the run does not meet."""
    tokens = tokens_of(config, config.train.steps)
    said = [
        f"data: {one.weight:.1%} of the run's {tokens:,} tokens are of {one.prefix}: {one.epochs:.3g} epochs of its "
        f"{one.held:,}"
        for one in sets
    ]
    again = [one for one in sets if one.epochs > 1]
    if again:
        said.append(
            f"more than one epoch, the same text again: {', '.join(one.prefix for one in again)}; give more of it, a "
            "smaller weight, or fewer train.steps"
        )
    counts = asked_tokens(config.data.train)
    if counts and abs(sum(counts) - tokens) > NEAR * tokens:
        said.append(
            f"data.train asks for {sum(counts):,} tokens in all, and the run reads {tokens:,}: each set is read in "
            "proportion; change the counts or train.steps"
        )
    return said
