"""From a Megatron checkpoint of any layout to a folder that transformers loads: weights, configuration, code, card."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import CONFIG_NAME

import atlas_kernels
from atlas_megatron import config as megatron
from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.checkpoint.safe_loading import load_tensors, read_metadata
from atlas_megatron.files import integrity
from atlas_megatron.files.scratch import new_folder
from atlas_megatron.hf import configuration_atlas, modeling_atlas, registry_atlas
from atlas_megatron.hf.configuration_atlas import SECTIONS, AtlasConfig
from atlas_megatron.hf.folders import check_shapes, listing
from atlas_megatron.hf.model_card import write_card
from atlas_megatron.hf.names import EMBEDDING, OUTPUT, Name, parameters_of
from atlas_megatron.hf.tokenizer_files import Specials, export_tokenizer
from atlas_megatron.hf.weights import INDEX, WEIGHTS, note_sums

SHARD_SIZE = 2 << 30  # bytes; an export holds about two shards in memory, one read and one written
# Where `trust_remote_code` finds the classes.
AUTO_MAP = {
    "AutoConfig": "configuration_atlas.AtlasConfig",
    "AutoModel": "modeling_atlas.AtlasModel",
    "AutoModelForCausalLM": "modeling_atlas.AtlasForCausalLM",
}
# What a checkpoint holds besides parameters.
NOT_PARAMETERS = ("optimizer.", "random/", "common_state/")


@dataclass(frozen=True)
class Source:
    """A checkpoint, read without its model: sizes and types of its parameters, and any of them by name."""

    folder: Path
    config: AtlasConfig
    dtype: torch.dtype
    parameters: list[tuple[Name, tuple[int, ...]]]
    rows: dict[str, tuple[int, ...]]  # shapes on the disk, where a vocabulary may be padded

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """These parameters, by their Megatron names, whole."""
        tensors = {name: torch.empty(self.rows[name], dtype=self.dtype) for name in names}
        load_tensors(tensors, self.folder)
        return tensors


def export(source: Path, target: Path, shard_size: int = SHARD_SIZE) -> Path:
    """Write the newest checkpoint of a run, or a checkpoint, as a Hugging Face folder, shard by shard.

    Raises ValueError where the source is no whole checkpoint, its tensors are not those of its configuration, its
    tokenizer is larger than its vocabulary, or the target exists.
    """
    return _of(source, lambda folder: _export(_source_at(folder), target, shard_size))


def _export(read: Source, target: Path, shard_size: int) -> Path:
    with new_folder(target) as folder:
        tokens = export_tokenizer(read.folder, folder, read.config.vocab_size)
        _write_configuration(read, folder, tokens)
        _write_weights(read, folder, shard_size)
        note_sums(folder)
        _write_code(folder, read.config.pattern)
        count = sum(prod(shape) for _, shape in read.parameters)
        write_card(folder, target.name, read.folder, read.config, count)
    return target


def dry_run(source: Path) -> str:
    """What an export would write, a line a parameter. Raises as `export` does."""
    return listing(read_source(source).parameters)


def code_files() -> list[Path]:
    """The files that travel: the model's own, and those of atlas_kernels that it falls back on."""
    model = Path(inspect.getfile(modeling_atlas))
    homes = (model.parent, Path(inspect.getfile(atlas_kernels)).parent)
    found: dict[str, Path] = {}
    wanted = [model.stem]
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = next(file for file in (home / f"{name}.py" for home in homes) if file.is_file())
            wanted += get_relative_imports(found[name])
    return [found[name] for name in sorted(found)]


def _write_code(folder: Path, pattern: str) -> None:
    """The files that travel, and those of layers that were registered from outside: their symbols stand in the copy of
    the registry, and the files that transformers begins with name them."""
    ours = code_files()
    for file in ours:
        shutil.copyfile(file, folder / file.name)
    for symbol in dict.fromkeys(pattern):
        twin = registry_atlas.MIXERS[symbol]
        file = Path(inspect.getfile(twin))
        if file in ours:
            continue
        if file.name in {other.name for other in ours}:
            raise ValueError(f"{file} has the name of a file that every exported model holds; rename it")
        shutil.copyfile(file, folder / file.name)
        entry = f"\nfrom .{file.stem} import {twin.__name__}  # noqa: E402\n\nMIXERS[{symbol!r}] = {twin.__name__}\n"
        _append(folder, registry_atlas, entry)
        for module in (configuration_atlas, modeling_atlas):
            _append(folder, module, f'\nTRAVELS += """\nimport .{file.stem}\n"""\n')


def _append(folder: Path, module: ModuleType, text: str) -> None:
    """Put text to the end of a module's copy in an exported folder."""
    with (folder / Path(inspect.getfile(module)).name).open("a", encoding="utf-8") as file:
        file.write(text)


def read_source(source: Path) -> Source:
    """What is at `source`: a run or a checkpoint. Raises ValueError where it is neither, or not what its configuration
    says."""
    return _of(source, _source_at)


def _source_at(folder: Path) -> Source:
    config = described(megatron.load_saved(folder / checkpoint.CONFIG))
    stored = read_metadata(folder).state_dict_metadata
    tensors = {
        name: entry
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith(NOT_PARAMETERS)
    }
    parameters = parameters_of(config)
    rows = {name: tuple(entry.size) for name, entry in tensors.items()}
    shapes = {name: _unpadded(name, shape, config) for name, shape in rows.items()}
    check_shapes(folder, [(name.megatron, shape) for name, shape in parameters], shapes)
    dtypes = {entry.properties.dtype for entry in tensors.values()}
    if len(dtypes) > 1:
        raise ValueError(f"{folder} holds parameters of several types, {', '.join(map(str, dtypes))}; they share one")
    return Source(folder, config, dtypes.pop(), parameters, rows)


def described(config: megatron.Config) -> AtlasConfig:
    """The description of the model in a run's configuration. Raises ValueError for layers that no exported model has.
    """
    missing = sorted(set(megatron.layers_of(config)) - set(registry_atlas.MIXERS))
    if missing:
        raise ValueError(
            f"model.pattern={config.model.pattern!r} has {', '.join(missing)} layers, which exported models do not "
            "have; keep the run as it is: atlas-eval and atlas-generate read its checkpoints"
        )
    sections = {name: asdict(getattr(config, name)) for name in SECTIONS}
    for section in sections.values():
        if "impl" in section:
            section["impl"] = "auto"  # the choice was for the machine that trained
    keys: dict[str, Any] = asdict(config.model) | sections
    return AtlasConfig(**keys, gradient_reach=config.train.gradient_reach or None)


def _of[T](source: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of a checkpoint, or of the newest one of a run."""
    if (source / checkpoint.MARKER).is_file():
        bad = integrity.wrong_size(source) or integrity.wrong_content(source)
        if bad:
            raise ValueError(f"checkpoint {source} is damaged: {bad}; take an older one")
        return read(source)
    if not checkpoint.folder_of(source).is_dir():
        raise ValueError(f"{source} is no checkpoint and no run with a whole one; give runs/NAME, or its checkpoint")
    return checkpoint.read_newest(source, read)


def _unpadded(name: str, shape: tuple[int, ...], config: AtlasConfig) -> tuple[int, ...]:
    """Rows of a vocabulary beyond the model's own are padding."""
    padded = name in (EMBEDDING.megatron, OUTPUT.megatron) and shape[0] > config.vocab_size
    return (config.vocab_size, *shape[1:]) if padded else shape


def _write_weights(source: Source, folder: Path, shard_size: int) -> None:
    shards, shapes = list(_shards(source, shard_size)), dict(source.parameters)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        read = source.read([name.megatron for name in names])
        # A copy only of what was padded.
        tensors = {name.hf: read[name.megatron][: shapes[name][0]].contiguous() for name in names}
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        # safetensors' own files are for their owner alone; some file systems have no such modes.
        with suppress(PermissionError):
            shutil.copymode(folder / CONFIG_NAME, folder / file)
        places |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        size = sum(prod(shape) for _, shape in source.parameters) * source.dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(source: Source, shard_size: int) -> Iterator[list[Name]]:
    """Parameters, in their order, as many a file as fit into its size, one at least."""
    names: list[Name] = []
    held = 0
    for name, shape in source.parameters:
        size = prod(shape) * source.dtype.itemsize
        if names and held + size > shard_size:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _write_configuration(source: Source, folder: Path, tokens: Specials | None) -> None:
    end, padding = (tokens.end, tokens.padding) if tokens else (None, None)
    config = source.config
    config.dtype = source.dtype
    config.architectures = ["AtlasForCausalLM"]
    config.auto_map = AUTO_MAP
    config.bos_token_id, config.eos_token_id, config.pad_token_id = end, end, padding
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=padding).save_pretrained(folder)
