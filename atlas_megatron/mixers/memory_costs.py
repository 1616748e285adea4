"""What a memory costs and needs: the closed forms of an ATLAS layer."""

from __future__ import annotations

import math

from atlas_kernels.layer_start import coefficient_count, gate_count, lifted, own_residual, weight_shapes
from atlas_kernels.local_memories import groups_of, locals_of
from atlas_megatron.config import Config
from atlas_megatron.config.memory_flops import anchor_flops, lift_flops, memory_flops, projection_flops
from atlas_megatron.mixers.costs import FLOAT, Costs, Halo, Matrix, fused

START_WEIGHTS = ("start_first", "start_second", "start_gate")  # of a layer, in the order of `weight_shapes`


class MemoryCosts(Costs):
    """The costs of an ATLAS layer; of layers that join a memory to something else, the memory's part."""

    @classmethod
    def num_params(cls, settings: Config) -> int:
        memory, hidden = settings.memory, settings.model.hidden_size
        width, heads, all_of_them = memory.heads * memory.head_dim, memory.heads, 1 + len(memory.locals)
        gates = all_of_them * gate_count(memory)
        return (
            5 * hidden * width  # q, k, v, output gate; output projection
            + 3 * width * memory.conv_size
            + memory.gate_rank * (hidden + heads * gates)
            + heads * gates  # gate biases
            + heads * coefficient_count(memory)
            + (2 * width * all_of_them if memory.write_gate else 0)  # their view of key and value
            + width * (2 if memory.open_gate else 1)  # norm after; the output gate's bias
            + heads * all_of_them * _matrix_numbers(settings)
        )

    @classmethod
    def matrices(cls, settings: Config) -> tuple[Matrix, ...]:
        """q, k, v and output gate; output projection; the start weights where they are asked for. Gates are none."""
        memory = settings.memory
        linears = fused("linear_qkvg", 4, memory, settings.model.hidden_size)
        if not settings.train.muon_memories:
            return linears
        shapes = zip(START_WEIGHTS, weight_shapes(memory), strict=False)
        return (*linears, *(Matrix(name, *shape, 0, heads=memory.heads) for name, shape in shapes))

    @classmethod
    def replicated_params(cls, settings: Config) -> int:
        """The gates' way down."""
        return settings.memory.gate_rank * settings.model.hidden_size

    @classmethod
    def flops_per_token(cls, settings: Config) -> tuple[float, float]:
        """q, k, v, output gate, output projection, both halves of the gates, the convolutions' taps, the memories."""
        memory, model, width = settings.memory, settings.model, settings.memory.heads * settings.memory.head_dim
        own = gate_count(memory) * (1 + len(memory.locals))
        gates = memory.gate_rank * (model.hidden_size + memory.heads * own)
        inner = _own_flops(settings)
        inner += sum(memory_flops(local, local.shard) / local.shard for local in locals_of(memory))
        inner += projection_flops(memory, model.seq_length) / model.seq_length
        inner += lift_flops(memory) * len(groups_of(memory))
        return 2 * (5 * model.hidden_size * width + gates + 3 * width * memory.conv_size) + inner, inner

    @classmethod
    def scan_flops(cls, settings: Config) -> float:
        """Of the layer's memory, where it goes on over shards; local ones and shards wait for no other rank."""
        return 0.0 if settings.memory.shard else _own_flops(settings)

    @classmethod
    def constant_flops(cls, settings: Config) -> float:
        """With memory.anchor_gradient = 0 the weights at which the memories take their gradients are constants."""
        memory, tokens = settings.memory, settings.model.seq_length
        if memory.rule().anchor_gradient:
            return 0.0
        return anchor_flops(memory, tokens) + sum(anchor_flops(local, tokens) for local in locals_of(memory))

    @classmethod
    def linears(cls, settings: Config) -> tuple[int, int]:
        """q, k, v and output gate read the hidden state, the gates what is left of it on their way down."""
        return settings.model.hidden_size + settings.memory.gate_rank, 1

    @classmethod
    def halos(cls, settings: Config) -> tuple[Halo, ...]:
        memory = settings.memory
        return (Halo("convolution", memory.conv_size - 1, 3 * memory.heads * memory.head_dim),)

    @classmethod
    def exchanged_numbers(cls, settings: Config) -> int:
        """q, k, v and the answer; alpha, eta, theta and gamma, learned or not. Shards stay where they are."""
        memory = settings.memory
        if memory.shard:
            return 0
        gates = 3 + (memory.window if memory.omega_gates == "pair" else 1)
        return 4 * memory.head_dim + gates

    @classmethod
    def state_numbers(cls, settings: Config, position: int) -> int:
        """Matrices, momenta and, inside a chunk, the anchor; the sources that a window still reaches. Of shards 0."""
        memory = settings.memory
        if memory.shard:
            return 0
        # The anchor goes along where a chunk is not at its end; of packed documents nobody knows.
        begun = settings.data.packed or position % memory.chunk > 0
        matrices = _matrix_numbers(settings) * (1 + memory.momentum + begun)
        width, features = memory.head_dim, lifted(memory)
        source = features + width * (2 if own_residual(memory) else 1) + (memory.omega_gates != "pair")
        return memory.heads * (matrices + (memory.window - 1) * source)

    @classmethod
    def state_size(cls, settings: Config) -> int:
        """Of all memories the matrices and momenta, and the keys' span of each shard."""
        memory = settings.memory
        spans = len(groups_of(memory)) * memory.head_dim**2 if memory.projection else 0
        matrices = _matrix_numbers(settings) * (2 if memory.momentum else 1) * (1 + len(memory.locals))
        return memory.heads * (matrices + spans)

    @classmethod
    def growth(cls, settings: Config) -> float:
        """Of the exponential kernels: a key, its weight, and a value for each matrix over phi*.

        The sources of each chunk are kept, and once more those of its halo.
        """
        memory = settings.memory
        if memory.kernel == "lifted":
            return 0.0
        inner = {"linear": 1, "mlp": memory.expansion, "gated_mlp": 2 * memory.expansion}[memory.network]
        source = memory.heads * (memory.head_dim * (1 + inner) + 1)
        return source * ((memory.chunk + memory.window - 1) / memory.chunk)

    @classmethod
    def activation_bytes(cls, settings: Config, size: int) -> float:
        """q, k, v before and after the convolution, lifted in float32, gates and the read; of local memories copies."""
        memory = settings.memory
        width, beside = memory.heads * memory.head_dim, len(memory.locals)
        wide = (5 + 6 * beside) * width + 2 * memory.heads * gate_count(memory) * (1 + beside)
        return (8 * width * size + wide * FLOAT) / settings.parallel.tensor

    @classmethod
    def kept_numbers(cls, settings: Config, tokens: int) -> float:
        """Weights, momentum and anchor at about sqrt(N) of N chunks; exponential kernels: the factors of each write."""
        memory = settings.memory
        if memory.kernel == "lifted":
            borders = 0.0
            for chunk, shard in [(memory.chunk, memory.shard), *((own.chunk, own.shard) for own in locals_of(memory))]:
                stretch = min(shard or tokens, tokens)
                borders += tokens / stretch * (math.isqrt(max(1, stretch // chunk)) + 1)
            numbers = borders * 3.0 * _matrix_numbers(settings)
        else:
            numbers = tokens * (1 + (memory.window - 1) / memory.chunk) * _factor_numbers(settings)
        return numbers * memory.heads

    @classmethod
    def bytes_at_cuts(cls, settings: Config, cuts: int, read: float, size: int) -> float:
        """Weights, momentum and anchor at every cut; exponential kernels: all that was read."""
        memory = settings.memory
        if memory.kernel == "lifted":
            numbers = cuts * 3.0 * _matrix_numbers(settings) * (1 + len(memory.locals))
        else:
            numbers = read * _factor_numbers(settings)
        return numbers * memory.heads * FLOAT


def _own_flops(settings: Config) -> float:
    """Of a token: the inner loop of the layer's memory, and the feature map."""
    memory, tokens = settings.memory, settings.model.seq_length
    return memory_flops(memory, tokens) / tokens + lift_flops(memory)


def _matrix_numbers(settings: Config) -> int:
    """Of one head's matrices."""
    return sum(rows * cols for rows, cols in weight_shapes(settings.memory))


def _factor_numbers(settings: Config) -> int:
    """Of one write's two factors, for each of a head's matrices."""
    return sum(rows + cols for rows, cols in weight_shapes(settings.memory))
