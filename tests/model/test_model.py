"""The whole model: closed forms match what is built and run."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from atlas_megatron.config import Config, MemoryConfig
from atlas_megatron.config.presets import PRESETS
from tests.support.small_model import SMALL

MEMORIES = {
    "once a chunk": replace(SMALL.memory, ns_period=8),
    "every token": replace(SMALL.memory, ns_period=1, window=16),
    "wide": replace(SMALL.memory, expansion=4, ns_steps=2),
    "source gates": replace(SMALL.memory, norm="none", omega_gates="source"),
    "no newton-schulz": replace(SMALL.memory, ns_steps=0, ns_period=1),
    "no momentum": replace(SMALL.memory, ns_steps=0, ns_period=1, momentum=False),
    "linear": replace(SMALL.memory, network="linear", norm="none", feature_map="identity"),
    **{name: replace(SMALL.memory, **PRESETS[name]) for name in PRESETS},
    "taylor": replace(SMALL.memory, feature_map="taylor", head_dim=4),
    "sketch": replace(SMALL.memory, network="linear", norm="none", feature_map="sketch", sketch_width=9, degree=3),
    "softmax": replace(SMALL.memory, **PRESETS["dot"] | {"kernel": "softmax"}),
    "linear, no newton-schulz": replace(SMALL.memory, network="linear", norm="none", ns_steps=0, ns_period=1),
    "shards": replace(SMALL.memory, shard=16, ns_steps=0, ns_period=1, norm="layer"),
    "locals": replace(SMALL.memory, locals=("4/8", "2/16", "4/8")),
    "locals, projected, stale reads": replace(
        SMALL.memory, **PRESETS["omeganet"], locals=("4/8", "2/16", "4/8"), projection=True, read="chunk"
    ),
    "write gates of locals": replace(SMALL.memory, locals=("4/16",), write_gate=True, ns_step="sum"),
}

# Products that torch's counter does not know.
UNCOUNTED = {
    torch.ops.aten.baddbmm_: lambda c, a, b, **rest: 2 * a[0] * a[1] * a[2] * b[2],
    torch.ops.aten.linalg_solve_triangular: lambda a, b, **rest: math.prod(a) * b[-1],
}


def build(config: Config) -> torch.nn.Module:
    from atlas_megatron.model.build import build_model

    return build_model(config)


RECOMPUTED: list[tuple[dict[str, Any], dict[str, int]]] = [
    ({"recompute": True}, {"M": 4, "*": 2, "-": 6}),
    ({"recompute": True, "recompute_layers": 3}, {"M": 3, "*": 2, "-": 4}),
    ({"recompute_modules": ("mlp",)}, {"M": 2, "*": 1, "-": 6}),
]


@pytest.mark.parametrize(("keys", "times"), RECOMPUTED, ids=lambda given: ", ".join(map(str, given)))
@pytest.mark.usefixtures("single_process_megatron")
def test_recomputing_activations_changes_no_gradient(keys: dict[str, Any], times: dict[str, int]) -> None:
    """And each layer's products are made once or twice."""
    model = build(SMALL)
    again = build(replace(SMALL, train=replace(SMALL.train, **keys)))
    again.load_state_dict(model.state_dict())
    made = Counter[str]()
    for symbol, layer in zip(SMALL.model.pattern, again.decoder.layers, strict=True):
        part = layer.mlp if symbol == "-" else layer.mixer
        part.register_forward_hook(lambda *_, symbol=symbol: made.update(symbol))
    tokens = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(2))
    for m in (model, again):
        m(tokens, None, None, labels=tokens.roll(-1, 1)).mean().backward()
    theirs = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, theirs[name].grad), name
    assert made == times


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.usefixtures("single_process_megatron")
def test_closed_forms_match_the_built_model(memory: MemoryConfig) -> None:
    from atlas_megatron.model.build import flops_per_token, num_params

    for tied in (True, False):
        config = replace(SMALL, model=replace(SMALL.model, tied_embeddings=tied), memory=memory)
        assert num_params(config) == sum(p.numel() for p in build(config).parameters())

    # The counter knows no attention kernel of the CPU, and attention computes keys that it masks: without `*` here.
    config = replace(SMALL, model=replace(SMALL.model, pattern="MM-"), memory=memory)
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    model = build(config)
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter, torch.no_grad():
        model(tokens, None, None)
    flops = flops_per_token(config)
    assert flops.forward == pytest.approx(counter.get_total_flops() / 32, rel=0.02)
    assert 0 < flops.inner < flops.training <= 3 * flops.forward


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.usefixtures("single_process_megatron")
def test_a_first_order_backward_is_counted_by_what_it_leaves_out(memory: MemoryConfig) -> None:
    from atlas_megatron.model.build import flops_per_token

    counted, said = [], []
    for share in (1.0, 0.3, 0.0):
        config = replace(SMALL, memory=replace(memory, anchor_gradient=share))
        config = replace(config, model=replace(SMALL.model, pattern="MM-"))
        model = build(config)
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            model(torch.zeros(1, 32, dtype=torch.int64), None, None).sum().backward()
        counted.append(counter.get_total_flops() / 32)
        said.append(flops_per_token(config).training)
        assert said[-1] == 3 * flops_per_token(config).forward or not config.memory.rule().anchor_gradient
    # The first chunk's anchor is the start weights, whose sum over sequences is not a product.
    assert said[0] - said[2] == pytest.approx(counted[0] - counted[2], rel=0.1)
    assert (said[0], counted[0]) == (said[1], counted[1])


@pytest.mark.usefixtures("single_process_megatron")
def test_attention_is_counted_by_the_keys_that_a_query_sees() -> None:
    from atlas_megatron.model.build import flops_per_token

    config = replace(SMALL, model=replace(SMALL.model, pattern="*-"))
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    model = build(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, None, None)
    window, width = config.attention.window, config.attention.heads * config.attention.head_dim
    seen = sum(min(t + 1, window) for t in range(32))
    linears = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert flops_per_token(config).forward * 32 == pytest.approx(linears + 4 * width * seen)


def test_transformer_engine_without_a_gpu_is_refused() -> None:
    from atlas_megatron.model.layer_specs import stack_spec

    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(ValueError, match="model.transformer_engine=true but"):
        stack_spec(replace(SMALL, model=replace(SMALL.model, transformer_engine=True)))
