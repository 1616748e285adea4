"""The Hugging Face model computes what Megatron's does."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest
import torch
import torch.nn.functional as F

import atlas_megatron.config as megatron
from atlas_kernels import op
from atlas_kernels.chunked import TORCH
from atlas_megatron.config import Config
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.hf.configuration_atlas import MODEL, SECTIONS, AtlasConfig, differences
from atlas_megatron.hf.export import described
from atlas_megatron.hf.modeling_atlas import AtlasModel
from tests.support.hf_and_megatron import CALM, settings, tokens, twins

# Each as a relative root mean square error.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
PATTERNS = {
    "M-": settings("M-"),
    "*-F-": settings("*-F-"),
    "A-": settings("A-"),
    "C-": settings("C-"),
    "R-L-D-G-": settings("R-L-D-G-"),
    "all, untied": settings("M-*-F-A-C-R-L-D-G-", tied=False, **CALM),
    "taylor": settings("M-", feature_map="taylor"),
    "sketch": settings("M-", feature_map="sketch", sketch_width=24, degree=3),
    "source gates": settings("M-A-", omega_gates="source", **CALM),
    "write gate": settings("M-A-", write_gate=True, ns_step="sum"),
    "write gate, titans": settings("M-", preset="titans", write_gate=True),
    "softmax": settings("M-C-", preset="dot", window=5, kernel="softmax"),
    "shards": settings("M-A-", shard=16),
    "locals": settings("M-A-", locals=("4/8", "2/16", "4/8"), projection=True, read="chunk", **CALM),
    "locals, write gates": settings("M-", locals=("2/4",), shard=8, write_gate=True, ns_step="sum"),
}
PATTERNS |= {preset: settings("M-", preset=preset) for preset in PRESETS}
PATTERNS |= {f"{preset} in A and C": settings("A-C-", preset=preset) for preset in ("titans", "delta", "swdt")}


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.usefixtures("single_process_megatron")
def test_logits_are_megatrons(config: Config) -> None:
    theirs, ours = twins(config)
    read = tokens()
    with torch.no_grad():
        expected, found = theirs(read, None, None), ours(read).logits
    assert found.dtype == expected.dtype == torch.float64
    assert error(found, expected) < TOLERANCE[torch.float64]
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("config", [PATTERNS["all, untied"], PATTERNS["M-"]], ids=["all, untied", "M-"])
@pytest.mark.usefixtures("single_process_megatron")
def test_so_in_float32(config: Config) -> None:
    theirs, ours = twins(config, torch.float32)
    read = tokens()
    with torch.no_grad():
        expected, found = theirs(read, None, None), ours(read).logits
    assert found.dtype == torch.float32
    assert error(found, expected) < TOLERANCE[torch.float32]
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.usefixtures("single_process_megatron")
def test_in_bfloat16_both_ask_for_products_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the GPU's kernels, which see q, k and v in float32: they were normalised there."""
    asked = []
    monkeypatch.setattr(op, "_gpu_kernels", lambda rule, weights, products: asked.append(products) or TORCH)
    theirs, ours = twins(settings("M-", impl="triton"), torch.bfloat16)
    ours.model.layers[0].mixer.memory.impl = "triton"  # an exported model leaves the choice to where it runs
    with torch.no_grad():
        theirs(tokens(), None, None), ours(tokens())
    assert asked == [torch.bfloat16] * 2


@pytest.mark.usefixtures("single_process_megatron")
def test_gradients_are_megatrons() -> None:
    theirs, ours = twins(settings("M-*-A-G-"))
    read = tokens(length=20)
    losses = torch.nn.functional.cross_entropy(theirs(read, None, None)[:, :-1].flatten(0, 1), read[:, 1:].flatten())
    losses.backward()
    found = ours(read, labels=read, use_cache=False)
    # transformers takes the loss in float32.
    torch.testing.assert_close(found.loss.double(), losses, rtol=1e-6, atol=0)
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    found.loss.backward()
    qkvg = ours.model.layers[0].mixer.linear_qkvg.weight.grad
    assert error(qkvg, expected["decoder.layers.0.mixer.linear_qkvg.weight"]) < TOLERANCE[torch.float32]


def test_the_configuration_is_megatrons() -> None:
    """Every key of the model's sections, with the start that Megatron's configuration gives it."""
    assert MODEL == tuple(f.name for f in fields(megatron.ModelConfig))
    whole = Config()
    sections = AtlasConfig().sections()
    assert sections == {name: asdict(getattr(whole, name)) for name in ("model", *SECTIONS)}


def test_a_new_models_keys_start_late_as_megatrons_do() -> None:
    model = AtlasModel(AtlasConfig(pattern="M-G-", vocab_size=64, hidden_size=32, delta={"heads": 2, "head_dim": 16}))
    for mixer, late in ((model.layers[0].mixer, True), (model.layers[2].mixer, False)):
        taps = mixer.convolution.weight
        q, k = mixer.linear_qkvg.weight.unflatten(0, (len(taps), 4, -1)).unbind(1)[:2]
        queries, keys = taps.unflatten(1, (3, -1)).unbind(1)[:2]
        assert torch.equal(q, k) is late
        assert torch.equal(queries[..., 1:], keys[..., :-1]) is late


def test_a_new_model_starts_to_copy_as_megatrons_do() -> None:
    model = AtlasModel(AtlasConfig(pattern="M-G-", vocab_size=64, hidden_size=32, delta={"heads": 2, "head_dim": 16}))
    for mixer, copies in ((model.layers[0].mixer, True), (model.layers[2].mixer, False)):
        values = mixer.linear_qkvg.weight.unflatten(0, (len(mixer.convolution.weight), 4, -1))[:, 2]
        assert torch.equal(mixer.linear_out.weight, values.flatten(0, 1).mT) is copies
        assert (mixer.branch_bias is not None) is copies
    torch.testing.assert_close(F.silu(model.layers[0].mixer.branch_bias), torch.ones(4, 64))


def test_an_exported_configuration_of_before_is_the_model_that_it_was() -> None:
    later = ("open_gate", "copy_start", "residual", "eta_per_token")
    memory = {key: value for key, value in AtlasConfig().memory.items() if key not in later}
    before = AtlasConfig.from_dict({"architectures": ["AtlasForCausalLM"], "memory": memory})
    assert [before.memory[key] for key in later] == [False, False, True, 0.01]
    assert AtlasConfig(memory=memory).memory["open_gate"] is True
    # The network's kind, which its step followed from, under the key's former name.
    gated = {"memory": "gated_mlp", **{key: value for key, value in memory.items() if key != "network"}}
    before = AtlasConfig.from_dict({"architectures": ["AtlasForCausalLM"], "memory": gated})
    assert before.memory["eta_per_token"] == 0.0015


def test_a_configuration_without_a_hierarchys_keys_is_a_memory_alone() -> None:
    """As folders of before have it; and one that has them comes back as it was."""
    new = ("shard", "read", "locals", "projection")
    own = described(settings("M-"))
    before = {**json.loads(own.to_json_string()), "memory": {k: v for k, v in own.memory.items() if k not in new}}
    again = AtlasConfig.from_dict(before)
    assert {key: again.memory[key] for key in new} == {"shard": 0, "read": "token", "locals": (), "projection": False}
    assert AtlasModel(again).layers[0].mixer.local_bias is None
    assert not differences(own.sections(), again.sections())
    hierarchy = described(PATTERNS["locals"])
    again = AtlasConfig.from_dict(json.loads(hierarchy.to_json_string()))
    assert again.memory["locals"] == ("4/8", "2/16", "4/8")
    assert not differences(hierarchy.sections(), again.sections())
    # JSON has lists where a configuration has tuples; another order is another model.
    other = again.sections() | {"memory": {**again.memory, "locals": ["4/8", "2/16", "4/8"]}}
    assert not differences(hierarchy.sections(), other)
    other["memory"]["locals"] = ["2/16", "4/8", "4/8"]
    assert len(found := differences(hierarchy.sections(), other)) == 1 and found[0].startswith("memory.locals: ")


def test_a_configuration_comes_back_from_json() -> None:
    ours = described(settings("M-", feature_map="sketch", sketch_width=24, impl="reference"))
    assert ours.memory["sketch_width"] == 24 and ours.memory["impl"] == "auto"
    again = AtlasConfig.from_dict(json.loads(ours.to_json_string()))
    assert again.sections() == ours.sections()
    with pytest.raises(ValueError, match="memory holds unknown keys windw"):
        AtlasConfig(memory={"windw": 3})
