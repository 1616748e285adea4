"""FP8: which products it may touch, and what is refused. That they run in it takes a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from atlas_megatron.config import Config
from atlas_megatron.config.checks import validate
from atlas_megatron.model import layer_specs
from atlas_megatron.model.build import build_model, transformer_config
from tests.support.small_model import SMALL

BIG = replace(
    SMALL,
    model=replace(SMALL.model, transformer_engine=True),
    memory=replace(SMALL.memory, head_dim=16),
    attention=replace(SMALL.attention, head_dim=16),
    train=replace(SMALL.train, fp8="hybrid", precision="bfloat16"),
)


class Column(ColumnParallelLinear):
    """Stands for Transformer Engine's, which cannot be built without a GPU."""


class Row(RowParallelLinear):
    """Stands for Transformer Engine's."""


class Backend(LocalSpecProvider):
    def column_parallel_linear(self) -> type:
        return Column

    def row_parallel_linear(self) -> type:
        return Row


def test_core_is_told() -> None:
    core = transformer_config(replace(BIG, train=replace(BIG.train, fp8_recipe="blockwise")))
    assert (core.fp8, core.fp8_recipe, core.fp8_param) == ("hybrid", "blockwise", False)
    assert transformer_config(SMALL).fp8 is None


def test_gates_and_memory_stay_out(single_process_megatron: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's modules alone multiply in FP8: they are the wide linears, and nothing near the memory."""
    monkeypatch.setattr(layer_specs, "_backend", lambda config: (Backend(), layer_specs.RMSNorm))
    # One layer of each kind; C wants whole segments.
    model = replace(SMALL.model, pattern="M-*-F-A-C-D-G-R-L-")
    attention = replace(SMALL.attention, segment=16)
    built = build_model(replace(SMALL, model=model, attention=attention))
    kinds = {"inside": (Column, Row), "outside": (ColumnParallelLinear, RowParallelLinear)}
    names = {
        kind: {n.rpartition(".")[2] for n, m in built.named_modules() if type(m) in types}
        for kind, types in kinds.items()
    }
    wide = {"linear_qkvg", "linear_qkv", "linear_in", "linear_query", "linear_read", "linear_out"}
    assert names["inside"] == wide | {"linear_fc1", "linear_fc2"}
    # Tied embeddings: the output layer has no weight of its own, and core leaves it in the model's precision.
    assert names["outside"] == {"linear_gates", "output_layer"}


def test_the_inner_loop_is_float32_below_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    from atlas_kernels import Gates, MemoryRule, op

    seen = []

    def spy(rule, state, inputs, kernels):
        seen.extend([inputs.q, inputs.k, inputs.v, *vars(inputs.gates).values(), *state.tensors()])
        return inputs.v, state

    monkeypatch.setattr(op, "omega_memory_chunked", spy)
    x, one = torch.randn(1, 4, 2, 8).bfloat16(), torch.ones(1, 4, 2).bfloat16()
    weights = (torch.randn(2, 8, 16).bfloat16(), torch.randn(2, 16, 8).bfloat16())
    gates = Gates(one, one, one, one)
    y, _ = op.omega_memory(x, x, x, gates, weights, MemoryRule(chunk=4, window=2), impl="chunked")
    assert y.dtype == torch.bfloat16 and {t.dtype for t in seen} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (replace(BIG, model=replace(BIG.model, transformer_engine=False)), "model.transformer_engine=false"),
        (replace(BIG, train=replace(BIG.train, precision="float32")), "set precision='bfloat16'"),
        (replace(BIG, train=replace(BIG.train, fp8="fp8")), "choose one of '', hybrid, e4m3"),
        (replace(BIG, train=replace(BIG.train, fp8_recipe="row")), "choose one of delayed, tensorwise, blockwise"),
        (replace(BIG, model=replace(BIG.model, hidden_size=40)), "model.hidden_size = 40 is no multiple of 16"),
        (
            replace(BIG, memory=replace(BIG.memory, heads=2, head_dim=12)),
            "memory.heads x head_dim / tensor=1 = 24 is no multiple of 16, which train.fp8 needs; nearest: 32",
        ),
    ],
)
def test_what_is_refused(config: Config, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        validate(config, 1)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_every_recipe_is_taken() -> None:
    for recipe in layer_specs.FP8_RECIPES:
        config = replace(BIG, train=replace(BIG.train, fp8_recipe=recipe))
        validate(config, 1)
        assert transformer_config(config).fp8_recipe == recipe


def test_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    layer_specs._check_fp8(BIG)
    with pytest.raises(ValueError, match="needs a GPU of compute capability 9.0, this one has 8.9"):
        layer_specs._check_fp8(replace(BIG, train=replace(BIG.train, fp8_recipe="blockwise")))
