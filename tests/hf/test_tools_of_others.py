"""The model in other people's hands: what transformers' own suites hold a model to, and the libraries around it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn, overrides
from torch.export import Dim
from transformers import AutoModelForCausalLM, dynamic_module_utils
from transformers.dynamic_module_utils import get_relative_imports

from atlas_megatron.hf import configuration_atlas, modeling_atlas
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.hf.export import AUTO_MAP, code_files
from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM, AtlasModel
from tests.support.hf_and_megatron import CALM, moved, settings, tokens

ROOT = Path(__file__).parents[2]
PATTERNS = ("M-", "M-*-", "A-", "C-", "D-G-", "R-", "F-")


@pytest.fixture(params=PATTERNS)
def model(request: pytest.FixtureRequest) -> AtlasForCausalLM:
    return moved(settings(request.param, **CALM), torch.float32)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(ours(tokens()).logits, theirs(tokens()).logits)


def test_tied_and_untied_weights_are_saved_once_and_come_back(tmp_path: Path) -> None:
    for tied in (True, False):
        model = moved(settings("M-*-", tied=tied, **CALM), torch.float32)
        shared = model.lm_head.weight is model.model.embed_tokens.weight
        assert shared is tied
        folder = tmp_path / str(tied)
        model.save_pretrained(folder)
        again, loaded = AtlasForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(loaded[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied and same(model, again)


def test_the_vocabulary_grows_and_shrinks(tmp_path: Path) -> None:
    for tied in (True, False):
        model = moved(settings("M-*-", tied=tied, **CALM), torch.float32)
        with torch.no_grad():
            expected = model(tokens()).logits
        grown = model.resize_token_embeddings(70)
        assert grown is model.get_input_embeddings() and model.config.vocab_size == 70
        assert model.get_output_embeddings().weight.shape == (70, 32)
        with torch.no_grad():
            found = model(tokens()).logits
        assert found.shape[-1] == 70 and torch.equal(found[..., :64], expected)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        model(torch.tensor([[69, 68, 1]]), labels=torch.tensor([[69, 68, 1]])).loss.backward()
        model.save_pretrained(tmp_path / str(tied))
        assert same(model, AtlasForCausalLM.from_pretrained(tmp_path / str(tied)))
        model.resize_token_embeddings(64)
        assert torch.equal(model(tokens()).logits, expected)


def test_embeddings_may_be_given_and_changed(model: AtlasForCausalLM) -> None:
    with torch.no_grad():
        embedded = model.get_input_embeddings()(tokens())
        assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens()).logits)
    other = nn.Embedding(64, 32)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(tokens(), inputs_embeds=embedded)


def test_the_bare_model_takes_the_same_weights(model: AtlasForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    bare = AtlasModel.from_pretrained(tmp_path)
    with torch.no_grad():
        hidden = bare(tokens()).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(tokens()).logits)
        assert torch.equal(bare(tokens(), return_dict=False)[0], hidden)


def test_it_starts_without_memory(model: AtlasForCausalLM, tmp_path: Path) -> None:
    """Built on the meta device, as large models are, and filled from a folder or by its own start."""
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = AtlasForCausalLM(model.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    empty.tie_weights()
    assert same(model, empty.eval())
    for place in ({"": "cpu"}, "auto", "cpu"):
        assert same(model, AtlasForCausalLM.from_pretrained(tmp_path, device_map=place))


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="offloading needs accelerate")
def test_layers_on_the_disk_give_the_same(tmp_path: Path) -> None:
    model = moved(settings("M-*-A-", **CALM), torch.float32)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    names = ["model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.{n}" for n in range(6))]
    places = {name: "disk" if name.endswith((".0", ".3", ".4")) else "cpu" for name in names}
    again = AtlasForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off")
    assert same(model, again)
    found = again.generate(tokens(1, 9), max_new_tokens=4, do_sample=False)
    assert torch.equal(found, model.generate(tokens(1, 9), max_new_tokens=4, do_sample=False))


def test_attention_of_either_name_is_what_it_has(tmp_path: Path) -> None:
    model = moved(settings("M-*-F-", **CALM), torch.float32)
    model.save_pretrained(tmp_path)
    for name in ("sdpa", "eager"):
        assert same(model, AtlasForCausalLM.from_pretrained(tmp_path, attn_implementation=name))
    with pytest.raises((ValueError, ImportError), match="(?i)flash"):
        AtlasForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


def test_an_older_transformers_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said = (ROOT / "setup.py").read_text()
    assert said.count(f'"transformers>={configuration_atlas.MINIMUM}"') == said.count('"transformers')
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(ValueError, match=r"^transformers 4.57.6 is older than 5.0.0.*'transformers>=5.0.0'$"):
        importlib.reload(configuration_atlas)


def test_common_names_of_a_configuration() -> None:
    config = moved(settings("M-*-", **CALM)).config
    wanted = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    wanted |= {"num_key_value_heads": 4, "head_dim": 8, "vocab_size": 64, "tie_word_embeddings": True}
    wanted |= {"rms_norm_eps": 1e-5, "initializer_range": 0.1}
    assert {name: getattr(config, name) for name in wanted} == wanted
    # In config.json too, where it comes back.
    said = json.loads(config.to_json_string())
    assert said["num_hidden_layers"] == 4 and said["num_attention_heads"] == 4 and said["head_dim"] == 8
    again = AtlasConfig.from_dict(said)
    assert again.sections() == config.sections() and again.to_dict() == config.to_dict()
    for error in (NotImplementedError, ValueError):  # what transformers' tools expect, and what our commands print
        with pytest.raises(error, match="num_hidden_layers=3 cannot be set, it is 4 of this model: pattern has one"):
            config.num_hidden_layers = 3
        with pytest.raises(error, match=r"num_attention_heads=3 cannot be set.*: change attention\['heads'\]"):
            AtlasConfig.from_dict(said | {"num_attention_heads": 3})
    bare = moved(settings("R-")).config
    assert (bare.num_attention_heads, bare.head_dim) == (2, 8)


def test_no_input_is_too_long_where_the_state_does_not_grow() -> None:
    """lm-evaluation-harness cuts contexts at max_position_embeddings, and generate warns beyond."""
    for pattern, memory in (("M-*-", CALM), ("R-D-", {})):
        assert moved(settings(pattern, **memory)).config.max_position_embeddings >= 1 << 20
    for pattern, memory in (("M-F-", CALM), ("M-", {"preset": "dot", "window": 5})):
        assert moved(settings(pattern, **memory)).config.max_position_embeddings == 32
    config = moved(settings("*-")).config
    config.max_position_embeddings = 64
    assert config.seq_length == 64


@pytest.mark.parametrize("pattern", ["C-", "*-R-"])
def test_an_exported_graph_reads_padded_rows(pattern: str) -> None:
    model = moved(settings(pattern, **CALM), torch.float32)
    read, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    given = {"input_ids": read, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    graph = torch.export.export(model, (), given).module()
    with torch.no_grad():
        expected = model(**given, use_cache=False).logits
        torch.testing.assert_close(graph(**given)["logits"], expected)
        other = torch.ones_like(mask)
        other[0, :3] = 0
        positions = (other.cumsum(-1) - 1).clamp(min=0)
        found = graph(input_ids=read, attention_mask=other, position_ids=positions)["logits"]
        torch.testing.assert_close(found[:1, 3:], model(read[:1, 3:]).logits)
        other[0, 5] = 0
        with pytest.raises(RuntimeError, match="leaves out tokens inside a text"):
            graph(input_ids=read, attention_mask=other, position_ids=positions)


def without_redirection() -> AbstractContextManager[object]:
    """Without what another test of this process may have entered for Megatron (parallel/cpu.py): tracing strictly goes
    into it."""
    return overrides._pop_mode_temporarily() if overrides._get_current_function_mode() else nullcontext()


@pytest.mark.parametrize("pattern", [pytest.param("M-", marks=pytest.mark.slow), "D-*-"])
def test_a_strictly_traced_graph_is_the_same(pattern: str) -> None:
    model = moved(settings(pattern, **CALM), torch.float32)
    read, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    given = {"input_ids": read, "attention_mask": mask}
    with without_redirection():
        graph = torch.export.export(model, (), given, strict=True).module()
    with torch.no_grad():
        torch.testing.assert_close(graph(**given)["logits"], model(**given, use_cache=False).logits)


def test_a_graph_reads_any_batch_and_any_length_where_nothing_is_unrolled() -> None:
    given, other = {"input_ids": tokens(3, 12)}, {"input_ids": tokens(2, 30)}
    batch, length = Dim("batch", max=64), Dim("length", min=2, max=64)
    windowed = settings("*-F-")
    cases = (
        (settings("D-"), {0: batch}, {"input_ids": tokens(2, 12)}),
        (windowed, {0: batch, 1: length}, other),
        # A window that no persistent token makes a mask for.
        (replace(windowed, attention=replace(windowed.attention, persistent=0)), {0: batch, 1: length}, other),
    )
    for config, free, read in cases:
        model = moved(config, torch.float32)
        graph = torch.export.export(model, (), given, dynamic_shapes={"input_ids": free}).module()
        with torch.no_grad():
            torch.testing.assert_close(graph(**read)["logits"], model(**read).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="the length is dynamic, and an exported graph unrolls the memory of M layers"):
        model = moved(settings("M-*-", **CALM), torch.float32)
        torch.export.export(model, (), given, dynamic_shapes={"input_ids": {1: length}})


@pytest.mark.parametrize("locals", [(), ("4/8", "2/4")], ids=["alone", "locals"])
@pytest.mark.slow
def test_a_compiled_model_gives_the_same(locals: tuple[str, ...]) -> None:
    model = moved(settings("M-*-", locals=locals, projection=bool(locals), **CALM), torch.float32)
    compiled, read = torch.compile(model, backend="eager"), tokens(2, 12)
    mask = torch.ones_like(read)
    mask[1, :5] = 0
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}, {"position_ids": torch.arange(12)[None]}):
            torch.testing.assert_close(compiled(read, **given).logits, model(read, **given).logits)


@pytest.mark.parametrize("entry", [configuration_atlas, modeling_atlas])
def test_each_entry_names_all_that_travels(entry: ModuleType) -> None:
    """transformers 5.0.0 copies of a folder what its entries name, and nothing that those name in turn."""
    file = Path(str(entry.__file__))
    assert {*get_relative_imports(file), file.stem} == {other.stem for other in code_files()}


@pytest.mark.skipif(
    not hasattr(dynamic_module_utils, "_compute_local_source_files_hash"),
    reason="this transformers keeps one copy of the code for all folders of a name",
)
def test_folders_of_one_name_run_code_of_their_own(tmp_path: Path) -> None:
    """Two exports, the second of another version of this project."""
    folders = []
    for version, pattern in (("old", "M-"), ("new", "G-")):
        folder = tmp_path / version / "exported"
        model = moved(settings(pattern, **CALM), torch.float32)
        model.config.auto_map, model.config.architectures = AUTO_MAP, ["AtlasForCausalLM"]
        model.save_pretrained(folder)
        for file in code_files():
            shutil.copyfile(file, folder / file.name)
        with (folder / "baselines_atlas.py").open("a") as code:
            code.write(f"\n\nVERSION = {version!r}\n")
        folders.append((version, folder, model))
    for version, folder, model in (*folders, folders[0]):
        again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        code = sys.modules[type(again).__module__.replace("modeling", "baselines")]
        assert version == code.VERSION and same(model, again)


def test_pipelines(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, pipeline

    from atlas_megatron.data.tokenizer import train_tokenizer
    from atlas_megatron.hf.tokenizer_files import export_tokenizer

    text = "the memory of a small model reads and writes one token after another while it learns "
    train_tokenizer([text * 20], 280, tmp_path / "tokenizer")
    export_tokenizer(tmp_path / "tokenizer", tmp_path, 280)
    words = AutoTokenizer.from_pretrained(tmp_path)
    model = moved(settings("M-*-", **CALM), torch.float32)
    model.resize_token_embeddings(280)
    model.generation_config.update(pad_token_id=words.pad_token_id, bos_token_id=words.eos_token_id)
    write: Any = pipeline("text-generation", model=model, tokenizer=words, max_new_tokens=4, do_sample=False)
    alone = [write(prompt)[0]["generated_text"] for prompt in ("the memory", "one token after another")]
    both = write(["the memory", "one token after another"], batch_size=2)
    assert [found[0]["generated_text"] for found in both] == alone
    assert isinstance(write("")[0]["generated_text"], str)
    features: Any = pipeline("feature-extraction", model=model.model, tokenizer=words)
    assert len(features("the memory")[0][0]) == 32
