"""What a layer costs and needs, asked of its class: closed forms, before any process, model or tensor is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from atlas_megatron.config import AttentionConfig, Config, DeltaConfig, MemoryConfig

FLOAT = 4  # bytes of float32


@dataclass(frozen=True)
class Halo:
    """The last positions of the ranks to the left, which a layer sees besides its own tokens."""

    of: Literal["convolution", "attention"]  # what sees them
    reach: int | None  # positions; None: all of them
    numbers: int  # of one position, of all heads


@dataclass(frozen=True)
class Matrix:
    """A parameter of a layer that is a matrix, whole: what Muon moves."""

    name: str  # in the layer's module
    rows: int
    columns: int
    split: int  # what tensor-parallel ranks share: 0 rows (of one matrix a head: the heads), 1 columns
    parts: tuple[int, ...] = ()  # rows of one head's query, key, value, ..., which are matrices of their own
    heads: int = 0  # matrices, one a head, of a parameter of three dimensions; 0: a single one

    @property
    def numbers(self) -> int:
        return max(1, self.heads) * self.rows * self.columns


def fused(
    name: str, parts: int, section: AttentionConfig | DeltaConfig | MemoryConfig, hidden: int
) -> tuple[Matrix, Matrix]:
    """A mixer's fused linear, whose rows lie by head and in a head by part, and its output projection."""
    width = section.heads * section.head_dim
    rows = Matrix(f"{name}.weight", parts * width, hidden, 0, (section.head_dim,) * parts)
    return rows, Matrix("linear_out.weight", hidden, width, 1)


class Costs:
    """The closed forms that the estimates of a run sum over its layers.

    Counts are those of one layer over all tensor-parallel ranks. The defaults are those of a layer between one
    column-parallel and one row-parallel linear, which carries nothing over a cut of the sequence.
    """

    @classmethod
    def num_params(cls, settings: Config) -> int:
        """Parameters of one layer, over all ranks, without the norm before it."""
        raise NotImplementedError

    @classmethod
    def replicated_params(cls, settings: Config) -> int:
        """Those of `num_params` that every tensor-parallel rank holds whole."""
        return 0

    @classmethod
    def expert_params(cls, settings: Config) -> int:
        """Those of `num_params` that `parallel.expert` ranks share out, whole experts each."""
        return 0

    @classmethod
    def idle_params(cls, settings: Config) -> int:
        """Those of `num_params` that a token does not meet."""
        return 0

    @classmethod
    def dispatched_numbers(cls, settings: Config) -> tuple[int, int]:
        """Of a token, numbers in the model's dtype and float32 ones that go to the ranks of its experts."""
        return 0, 0

    @classmethod
    def matrices(cls, settings: Config) -> tuple[Matrix, ...]:
        """Weights of linears, and with `train.muon_memories` start weights: what Muon moves. The rest is not its."""
        return ()

    @classmethod
    def flops_per_token(cls, settings: Config) -> tuple[float, float]:
        """Forward FLOPs of one token of a sequence of `model.seq_length`, two a multiply-add: (all, inner loop)."""
        raise NotImplementedError

    @classmethod
    def constant_flops(cls, settings: Config) -> float:
        """Forward FLOPs of a whole sequence that meet weights which the backward takes for constants."""
        return 0.0

    @classmethod
    def scan_flops(cls, settings: Config) -> float:
        """The part of `flops_per_token` that waits for the state of the rank to the left."""
        return cls.flops_per_token(settings)[1]

    @classmethod
    def linears(cls, settings: Config) -> tuple[int, int]:
        """(Numbers of a token that column-parallel linears read, row-parallel linears whose outputs are summed)."""
        return settings.model.hidden_size, 1

    @classmethod
    def halos(cls, settings: Config) -> tuple[Halo, ...]:
        """What a context-parallel rank is sent of the tokens before its own."""
        return ()

    @classmethod
    def exchanged_numbers(cls, settings: Config) -> int:
        """Numbers of one token and head in the all-to-all of a layer that exchanges heads, the answer included."""
        return 0

    @classmethod
    def state_numbers(cls, settings: Config, position: int) -> int:
        """Numbers of one sequence's state that a rank hands on, where the next one begins at this position."""
        return 0

    @classmethod
    def state_size(cls, settings: Config) -> int:
        """Numbers carried past the last token of a sequence; convolutions' tails and halos of a window left out."""
        return 0

    @classmethod
    def growth(cls, settings: Config) -> float:
        """Numbers that each further token adds to what is carried; 0: its size is constant."""
        return 0.0

    @classmethod
    def activation_bytes(cls, settings: Config, size: int) -> float:
        """Bytes of a token that one tensor-parallel rank keeps for the backward, besides the layer's input and norm.

        size: bytes of a number in the model's dtype.
        """
        raise NotImplementedError

    @classmethod
    def kept_numbers(cls, settings: Config, tokens: int) -> float:
        """float32 numbers of the state that the backward of so many tokens of one sequence keeps."""
        return 0.0

    @classmethod
    def bytes_at_cuts(cls, settings: Config, cuts: int, read: float, size: int) -> float:
        """Bytes of one sequence's states at so many cuts, from which the backward begins each segment again.

        read: tokens before all cuts together. size: as for `activation_bytes`.
        """
        return 0.0


class MLP(Costs):
    """SwiGLU, which core builds: three linears, the first two of them read as one."""

    @classmethod
    def num_params(cls, settings: Config) -> int:
        return 3 * settings.model.hidden_size * settings.model.ffn_hidden_size

    @classmethod
    def matrices(cls, settings: Config) -> tuple[Matrix, ...]:
        hidden, inner = settings.model.hidden_size, settings.model.ffn_hidden_size
        return Matrix("linear_fc1.weight", 2 * inner, hidden, 0), Matrix("linear_fc2.weight", hidden, inner, 1)

    @classmethod
    def flops_per_token(cls, settings: Config) -> tuple[float, float]:
        return 6.0 * settings.model.hidden_size * settings.model.ffn_hidden_size, 0.0

    @classmethod
    def activation_bytes(cls, settings: Config, size: int) -> float:
        """Both halves and their product."""
        return 3 * settings.model.ffn_hidden_size * size / settings.parallel.tensor
