"""What would keep a run from its first step, found without a process or a model: data, tokenizer, directory, devices,
and packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from atlas_megatron.checkpoint import step_folders
from atlas_megatron.checkpoint.provenance import Provenance
from atlas_megatron.checkpoint.provenance import refusal as refusal_of_data
from atlas_megatron.config import Config, uses
from atlas_megatron.data import epochs
from atlas_megatron.data.batches import blend, check_tokenizer, check_tokenizer_of, sources
from atlas_megatron.data.tokenizer import load_tokenizer
from atlas_megatron.files.scratch import refusal
from atlas_megatron.model.build import parameter_dtype
from atlas_megatron.training import muon
from atlas_megatron.training.resuming import going_on, said_of, start_seen


def wrong_with_data(config: Config) -> list[str]:
    """A line for each of: the training data, the validation data, the tokenizer, and what does not fit together."""
    if not config.data.train:
        return ["data.train is empty; give the prefix of a .bin/.idx pair, as tools/prepare_data.py writes it"]
    validated = config.data.validation if config.train.validate_every and config.train.validate_sequences else ()
    checks: list[Callable[[], Any]] = [
        partial(sources, config, config.data.train),
        partial(sources, config, validated),
        partial(_check_tokenizer, config, (*config.data.train, *validated)),
    ]
    # The same word may be in several sets.
    return list(dict.fromkeys(line for line in map(_refusal, checks) if line))


def wrong_with_directory(config: Config) -> list[str]:
    """What keeps a run from writing to its directory; empty where it can, or can make it."""
    try:
        config.run.directory.encode()
    except UnicodeEncodeError:
        return [f"run.directory={config.run.directory!r} holds bytes that are no UTF-8; choose another run.directory"]
    why = refusal(Path(config.run.directory))
    return [f"run.directory={config.run.directory}: {why}; choose another run.directory"] if why else []


def how_it_goes_on(config: Config) -> tuple[Config, list[str], list[str]]:
    """The configuration of a run that goes on from a checkpoint, branches off or begins with one; what keeps it from
    that, and what it will say when it does. Both are empty for any other run. The data are sound: `wrong_with_data`."""
    try:
        start = start_seen(config)
        going = going_on(start.config, start.before)
        changes = Provenance.of(config).changes_since(start.folder) if start.folder else []
    except (ValueError, OSError) as error:
        return config, [str(error)], []
    if start.folder is None:
        return going, [], said_of(start, going, 0)
    wrong = [refusal_of_data(start.folder, config, changes)] if changes and not config.data.allow_change else []
    return going, wrong, said_of(start, going, step_folders.step_of(start.folder))


def epochs_read(config: Config) -> list[str]:
    """How often the run will read each set, a line each, and what follows. The data are sound: `wrong_with_data`."""
    drawn_from = sources(config, config.data.train)
    held = [epochs.tokens_of_a_pass(source.tokens, config.model.seq_length) for source in drawn_from]
    return epochs.lines(config, epochs.drawn(config, [source.weight for source in drawn_from], held))


def wrong_with_devices(config: Config) -> list[str]:
    """What the configuration asks of a GPU, or of a package, that is not here; a cluster's nodes may have it."""
    on_gpu, pattern = torch.cuda.is_available(), config.model.pattern
    found = []
    if config.memory.impl == "triton" and uses(pattern, "memory") and not on_gpu:
        found.append("memory.impl='triton' wants a GPU, and none is seen here; 'auto' takes what there is")
    if config.delta.impl == "fla" and uses(pattern, "delta") and not (on_gpu and _installed("fla")):
        found.append("delta.impl='fla' wants a GPU and flash-linear-attention, which are not here; 'auto' takes ours")
    if config.model.transformer_engine and not (on_gpu and _installed("transformer_engine")):
        found.append("model.transformer_engine=true wants a GPU and transformer-engine, which are not here")
    if config.train.cuda_graph and not on_gpu:
        found.append("train.cuda_graph=true wants a GPU, and none is seen here; set it false")
    if config.train.optimizer == "muon":
        found += filter(None, [muon.wrong_here(config.train, bf16=parameter_dtype(config).itemsize == 2)])
    return found


def _check_tokenizer(config: Config, words: tuple[str, ...]) -> None:
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_tokenizer(config, tokenizer)
    for _, prefix in () if config.data.allow_change else (blended for word in words for blended in blend((word,))):
        check_tokenizer_of(prefix, tokenizer)


def _refusal(check: Callable[[], Any]) -> str:
    try:
        check()
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
