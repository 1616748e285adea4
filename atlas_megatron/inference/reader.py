"""A trained model that reads a text of any length piece by piece, wherever it was saved.

What it keeps of the text has a constant size, but for full attention and the exponential kernels.
Dims: B batch, T tokens.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from atlas_megatron.config import Config, at_chunk, layers_of
from atlas_megatron.data.pieces import Spoken as Spoken  # what a reader's text goes through, in and out
from atlas_megatron.data.pieces import pieces as pieces
from atlas_megatron.data.tokenizer import Tokenizer, load_tokenizer
from atlas_megatron.files import integrity
from atlas_megatron.files.scratch import file_beside
from atlas_megatron.parallel.device import flush_denormals

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

EXPORTED_ALONE = (
    "a memory is saved and loaded by an exported model; export the run first: tools/convert_hf.py export RUN FOLDER"
)


@dataclass(frozen=True)
class Weights:
    """Which ones a reader has. checkpoint: of a run; digest: what tells their bytes from all others."""

    checkpoint: Path | None = None
    digest: str = ""


class Reader(Protocol):
    """One text for each row of a batch, which all advance together."""

    tokenizer: Tokenizer
    weights: Weights
    config: Config  # of an exported model: what describes it
    device: torch.device
    growth: float  # bytes that each further token of a text adds to its state, without end; 0: it is of constant size

    def read(self, tokens: Tensor, keep: int | None = None) -> Tensor:
        """Logits [B, T, vocabulary] of the next T tokens [B, T] int64 of each text; keep: of the last so many alone."""

    def forget(self) -> None:
        """Begin new texts."""

    def mark(self) -> Any:
        """What has been read so far, to come `back` to; reading on does not change it."""

    def back(self, mark: Any, rows: Sequence[int] | None = None) -> None:
        """Go on from a mark; rows: with these of its texts alone, in this order, each as often as it is named."""

    def at_chunk(self, chunk: int) -> Reader:
        """The same weights, whose memories take gradients anchored every `chunk` tokens, before any text.

        Raises ValueError as `config.chunks.at_chunk`.
        """

    def save_memory(self, path: Path) -> None:
        """Write what was read to a file. Raises ValueError for a model that cannot, OSError where it does not fit."""

    def load_memory(self, path: Path) -> None:
        """Go on from what `save_memory` wrote. Raises ValueError for another model's, and for another file."""


class MegatronReader:
    """A model in one process. Raises ValueError where its tokenizer has more tokens than it."""

    def __init__(self, model: HybridModel, config: Config, tokenizer: Tokenizer, weights: Weights = Weights()) -> None:
        from atlas_megatron.parallel.device import device

        _check_tokenizer(tokenizer, config.model.vocab_size)
        self._model, self.config, self.tokenizer, self.weights = model, config, tokenizer, weights
        self.growth = _growth(config)
        self.device = device()
        self.forget()

    def forget(self) -> None:
        self.back({})

    def mark(self) -> Any:
        return dict(self._context.states)

    def back(self, mark: Any, rows: Sequence[int] | None = None) -> None:
        from atlas_megatron.mixers.stream import StreamContext, mapped

        self._context = StreamContext()
        self._context.states = dict(mark if rows is None else mapped(mark, _selecting(rows, self.device)))

    @torch.no_grad()
    def read(self, tokens: Tensor, keep: int | None = None) -> Tensor:
        from atlas_megatron.inference import streaming

        return streaming.read(self._model, tokens, self._context, keep)

    def at_chunk(self, chunk: int) -> MegatronReader:
        from atlas_megatron.model.build import build_model

        config = replace(self.config, memory=at_chunk(self.config.memory, chunk))
        model = build_model(config)
        # The same tensors, not copies.
        model.load_state_dict(self._model.state_dict(), assign=True)
        return MegatronReader(model.eval(), config, self.tokenizer, self.weights)

    def save_memory(self, path: Path) -> None:
        raise ValueError(EXPORTED_ALONE)

    def load_memory(self, path: Path) -> None:
        raise ValueError(EXPORTED_ALONE)


class HuggingFaceReader:
    """An exported model in its folder."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        """trust_remote_code: run the model's code in the folder, and not what is installed here.

        Raises ValueError where transformers is missing or cannot load the folder.
        """
        try:
            from safetensors import SafetensorError
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging as theirs
        except ImportError as error:
            raise ValueError(
                f"{folder} is a Hugging Face model, and reading it needs the transformers package; install it with: "
                "pip install -e '.[hf]' -c constraints.txt"
            ) from error
        from atlas_megatron.hf.folders import config_of
        from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
        from atlas_megatron.hf.weights import check, described_in, files_of

        check(folder, described_in(folder))
        # It would stand before the one line of what is wrong.
        theirs.disable_progress_bar()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
        try:
            if trust_remote_code:
                model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
            else:
                model = AtlasForCausalLM.from_pretrained(folder, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{folder} is not a whole Hugging Face model ({reason}); export it again") from error
        sums = integrity.checksums(folder / name for name in files_of(folder))
        self.weights = Weights(digest=hashlib.sha256(json.dumps(sums).encode()).hexdigest())
        self._model = model.to(self.device).eval()
        self.tokenizer = load_tokenizer(folder)
        _check_tokenizer(self.tokenizer, model.config.vocab_size)
        self.config = config_of(model.config)
        self.growth = _growth(self.config) if model.config.grows else 0.0
        self.forget()

    def forget(self) -> None:
        self._memory: Any = None

    def mark(self) -> Any:
        # The cache is a shell around states that nobody changes.
        return copy.copy(self._memory)

    def back(self, mark: Any, rows: Sequence[int] | None = None) -> None:
        self._memory = copy.copy(mark)
        if rows is not None and self._memory is not None:
            self._memory.select(torch.tensor(rows))

    def at_chunk(self, chunk: int) -> HuggingFaceReader:
        memory = at_chunk(self.config.memory, chunk)
        description = copy.deepcopy(self._model.config)
        description.memory = {name: getattr(memory, name) for name in description.memory}
        model = type(self._model)(description)
        # The same tensors, not copies.
        model.load_state_dict(self._model.state_dict(), assign=True)
        model.tie_weights()
        other = copy.copy(self)
        other.config, other._model = replace(self.config, memory=memory), model.eval()
        other.forget()
        return other

    def save_memory(self, path: Path) -> None:
        with file_beside(path) as written:
            self._memory.save_memory(written)

    def load_memory(self, path: Path) -> None:
        memory = self._model.load_memory(path)
        try:
            # A token on trial: states of another form show where they are used.
            with torch.no_grad():
                self._model(torch.zeros(1, 1, dtype=torch.int64, device=self.device), past_key_values=copy.copy(memory))
        except (RuntimeError, TypeError, LookupError, AttributeError, AssertionError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path} is no memory of one text of this model ({reason}); give another file") from error
        self._memory = memory

    @torch.no_grad()
    def read(self, tokens: Tensor, keep: int | None = None) -> Tensor:
        out = self._model(
            input_ids=tokens, past_key_values=self._memory, use_cache=True, logits_to_keep=keep if keep else 0
        )
        self._memory = out.past_key_values
        return out.logits


def _check_tokenizer(tokenizer: Tokenizer, rows: int) -> None:
    """Raise ValueError where the model's embedding has fewer rows than the tokenizer has tokens."""
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"the tokenizer in {tokenizer.folder} has {tokenizer.vocab_size} tokens, more than the model's "
            f"vocab_size={rows}; give the tokenizer that the model was trained with"
        )


def _selecting(rows: Sequence[int], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Takes these rows of a tensor that lies batch first."""
    index = torch.tensor(rows, device=device)
    return lambda tensor: tensor.index_select(0, index)


def open_reader(path: str | Path, *, trust_remote_code: bool = False) -> Reader:
    """The model in `path`: a run's directory, one of its checkpoints, or a folder that was exported for Hugging Face.

    Of a run the newest whole checkpoint; later ones that are damaged are named on standard error. Raises ValueError
    where it is neither, or the run has none. trust_remote_code: as HuggingFaceReader; of a run there is no code.
    """
    flush_denormals()
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} is no folder; give the directory of a run or an exported model")
    if (folder / "config.json").is_file():
        return HuggingFaceReader(folder, trust_remote_code=trust_remote_code)
    from atlas_megatron.checkpoint.checkpoint import read_newest

    if not integrity.is_marked(folder):
        return read_newest(folder, _of_checkpoint)
    bad = integrity.wrong_size(folder) or integrity.wrong_content(folder, 0, 1)
    if bad:
        raise ValueError(f"checkpoint {folder} is damaged ({bad}); give another one, or bring its files back")
    return _of_checkpoint(folder)


def _of_checkpoint(checkpoint: Path) -> MegatronReader:
    from atlas_megatron.checkpoint.checkpoint import load_checkpoint
    from atlas_megatron.checkpoint.provenance import own_tokenizer

    # Before it is read: a run that trains on may drop it meanwhile.
    weights = Weights(checkpoint, integrity.digest(checkpoint))
    # The one that it was trained with, not what may lie by now where data.tokenizer points, seen from here.
    tokenizer = own_tokenizer(checkpoint)
    model, config = load_checkpoint(checkpoint)
    return MegatronReader(model, config, tokenizer or load_tokenizer(config.data.tokenizer), weights)


def _growth(config: Config) -> float:
    """Bytes a token, in float32, that the layers say they grow by."""
    # Here: it brings Megatron, which an exported model is read without.
    from atlas_megatron.mixers import costs_of

    return 4 * sum(costs_of(symbol).growth(config) for symbol in layers_of(config))
