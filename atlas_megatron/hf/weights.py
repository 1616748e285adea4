"""The weights of a Hugging Face folder, which may come from a stranger: described, found and compared before use.

Needs no Megatron. What is read is safetensors alone, whose format cannot run code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from atlas_megatron.files import integrity
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.hf.folders import check_shapes
from atlas_megatron.hf.names import OUTPUT, Name, parameters_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # of PEFT
SUMS = "checksums.json"  # of the files with weights, as they were written


class Weights:
    """The tensors of a Hugging Face folder, read where they lie: nothing is held in memory that is not asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where the folder has no readable weights."""
        names = files_of(folder)
        try:
            self.files = [safe_open(str(folder / name), "pt") for name in names]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the weights in {folder} cannot be read: {error}; restore its files") from error
        self._file_of = {name: file for file in self.files for name in file.keys()}  # noqa: SIM118  no mapping

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)


def files_of(folder: Path) -> list[str]:
    """The names of a folder's files with weights. Raises ValueError where there are none, or the index is damaged."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"{folder} holds neither {INDEX} nor {WEIGHTS}; give a folder that save_pretrained wrote")
        return [WEIGHTS]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the weights in {folder} cannot be read: {INDEX}: {error!r}; restore its files") from error
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is not beside it; restore its files")
    return names


def described_in(folder: Path) -> AtlasConfig:
    """What a folder's config.json describes. Raises ValueError where that is no ATLAS model."""
    file = folder / "config.json"
    if (folder / ADAPTER).is_file() and not file.is_file():
        raise ValueError(
            f"{folder} holds a LoRA adapter and no model; merge it first: PeftModel.from_pretrained(model, folder)"
            ".merge_and_unload().save_pretrained(...), with the code and tokenizer of the exported folder beside it"
        )
    try:
        said = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder} is no Hugging Face folder ({error}); give one that tools/convert_hf.py export wrote"
        ) from error
    kind = said.get("model_type") if isinstance(said, dict) else None
    if kind != AtlasConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {kind!r}; give an exported atlas model")
    length = said.get("seq_length", 1)
    if type(length) is not int or length < 1:
        raise ValueError(f"{file} says that seq_length is {length!r}, which is no number of tokens; restore it")
    try:
        return AtlasConfig.from_dict(said)
    except (TypeError, ValueError, AttributeError, KeyError, LookupError) as error:
        raise ValueError(f"{file} does not describe an atlas model: {error}; restore it") from error


def check(folder: Path, description: AtlasConfig) -> list[tuple[Name, tuple[int, ...]]]:
    """The parameters of a description, which the folder's weights hold in these very shapes, byte for byte as written.

    No memory is asked for that would grow with what the folder claims. Raises ValueError where it does not hold them.
    """
    try:
        parameters = parameters_of(description)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{folder}/config.json does not describe an atlas model: {reason[0]}; restore it") from error
    shapes = Weights(folder).shapes()
    if description.tied_embeddings:
        # Some writers name a tied tensor twice.
        shapes.pop(OUTPUT.hf, None)
    check_shapes(folder, [(name.hf, shape) for name, shape in parameters], shapes)
    check_sums(folder)
    return parameters


def note_sums(folder: Path) -> None:
    """Write the checksums of a folder's weights beside them."""
    sums = integrity.checksums([folder / name for name in files_of(folder)])
    (folder / SUMS).write_text(json.dumps({"crc32": sums}, indent=1) + "\n", encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Raise ValueError where the weights are not those of which the checksums were written; without any, none is."""
    file = folder / SUMS
    if not file.is_file():
        return
    try:
        sums: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8"))["crc32"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error!r}; export the model again") from error
    for name in files_of(folder):
        found = integrity.checksum(folder / name)
        if found != sums.get(name):
            raise ValueError(
                f"{folder / name} is not what was written: its checksum is {found}, not {sums.get(name)}; export the "
                f"model again, or, where you changed its weights yourself, remove {file}"
            )
