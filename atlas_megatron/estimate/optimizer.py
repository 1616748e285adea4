"""What an optimizer moves, keeps, computes and sends, in closed forms.

Newton-Schulz of an m x n matrix, m <= n, takes k (4 m^2 n + 2 m^3) FLOPs in k steps. States are float32: two numbers a
parameter of AdamW, one of Lion and of Muon, and a master weight beside a bfloat16 parameter. With train.muon_layer_wise
a rank updates whole matrices; how evenly they divide is left out, but for the largest one.
"""

from __future__ import annotations

from dataclasses import dataclass

from atlas_megatron.config import Config
from atlas_megatron.config.checks import data_parallel_size
from atlas_megatron.mixers import costs_of
from atlas_megatron.mixers.costs import Matrix

STATE = 4  # bytes of one number
BF16 = 2


@dataclass(frozen=True)
class Update:
    """What Muon does in one step with one layer's matrices, on a rank that holds the states of all of them."""

    flops: float  # of the Newton-Schulz products
    gathered: float  # bytes of whole momenta that are gathered over tensor-parallel ranks
    summed: float  # bytes of the products that are summed over them


def moved_by_muon(config: Config, layers: str) -> int:
    """Parameters of these layers that Muon moves, over all tensor-parallel ranks; 0 for AdamW."""
    if config.train.optimizer != "muon":
        return 0
    return sum(matrix.numbers for symbol in layers for matrix in costs_of(symbol).matrices(config))


def state_bytes(config: Config, world_size: int, own: int, layers: str, *, bf16: bool) -> float:
    """Bytes of states and master weights on a device that holds `own` parameters, those of these layers among them."""
    train, master = config.train, STATE if bf16 else 0
    shards = data_parallel_size(config, world_size) * config.parallel.context
    if train.optimizer == "adamw":
        return own * (2 * STATE + master) / shards
    moved = moved_by_muon(config, layers) // config.parallel.tensor
    scalars = (own - moved) * ((2 if train.muon_scalar_optimizer == "adam" else 1) * STATE + master)
    if not train.muon_layer_wise:
        return moved * (STATE + master) + scalars
    matrices = [matrix for symbol in set(layers) for matrix in costs_of(symbol).matrices(config)]
    largest = max((matrix.numbers for matrix in matrices), default=0) / config.parallel.tensor
    return max(moved / shards, largest) * (STATE + master) + scalars / shards


def expert_state_bytes(own: int, replicas: int, *, bf16: bool) -> float:
    """Bytes of AdamW's states and master weights of so many parameters of experts, shared out over their replicas."""
    return own * (2 * STATE + (STATE if bf16 else 0)) / replicas


def update_of(config: Config, symbol: str, *, bf16: bool) -> Update:
    """One layer's; nothing for AdamW, whose element-wise work is not counted, and which sends nothing for it."""
    if config.train.optimizer != "muon":
        return Update(0.0, 0.0, 0.0)
    parts = [_update(config, matrix, bf16=bf16) for matrix in costs_of(symbol).matrices(config)]
    return Update(*(sum(getattr(part, name) for part in parts) for name in ("flops", "gathered", "summed")))


def share_of_update(config: Config, world_size: int) -> float:
    """The part of all matrices that one data- and context-parallel rank updates, in the mean."""
    if not config.train.muon_layer_wise:
        return 1.0
    return 1 / (data_parallel_size(config, world_size) * config.parallel.context)


def _update(config: Config, matrix: Matrix, *, bf16: bool) -> Update:
    train, tensor = config.train, config.parallel.tensor
    if matrix.heads:
        one = _newton_schulz(train.muon_num_ns_steps, matrix.rows, matrix.columns)
        return Update(matrix.heads // tensor * one, 0.0, 0.0)
    parts = len(matrix.parts) if train.muon_split_qkv and matrix.parts else 1
    rows, columns, steps = matrix.rows // parts, matrix.columns, train.muon_num_ns_steps
    if tensor == 1 or train.muon_tp_mode == "duplicated":
        sent = (tensor - 1) / tensor * matrix.numbers * STATE
        return Update(parts * _newton_schulz(steps, rows, columns), sent, 0.0)
    split = (rows // tensor, columns) if matrix.split == 0 else (rows, columns // tensor)
    if train.muon_tp_mode == "blockwise":
        return Update(parts * _newton_schulz(steps, *split), 0.0, 0.0)
    # The side that is not split is squared, whichever is the longer.
    side, other = (columns, split[0]) if matrix.split == 0 else (rows, split[1])
    flops = steps * (4.0 * side**2 * other + 2.0 * side**3)
    size = BF16 if _products_in_bf16(config, bf16=bf16) else STATE
    # And once the square of its norm.
    summed = 2 * (tensor - 1) / tensor * (steps * side**2 * size + STATE)
    return Update(parts * flops, 0.0, parts * summed)


def _products_in_bf16(config: Config, *, bf16: bool) -> bool:
    precision = config.train.muon_fp32_matmul_prec
    return precision == "medium" or (precision == "auto" and bf16)


def _newton_schulz(steps: int, rows: int, columns: int) -> float:
    short, long = sorted((rows, columns))
    return steps * (4.0 * short**2 * long + 2.0 * short**3)
