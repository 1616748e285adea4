"""Tokenizer folders without tokenizer.json: SentencePiece models, vocab.json with merges.txt, and others.

transformers converts them, and runs no code of the folder. It is imported here alone, and where it is needed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from atlas_megatron.data.declared_tokens import CONFIG, read_object

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")


def converted(folder: Path) -> Backend:
    """The folder's tokenizer in the form of the tokenizers package.

    A vocab.json with merges.txt of no declared class is GPT-2's kind, byte-level. Raises ValueError for a folder that
    is no tokenizer, and with an install command where a package is missing that its conversion needs.
    """
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if vocabulary.is_file() and merges.is_file() and not _class_is_declared(folder):
        return _byte_level(vocabulary, merges)
    _check_packages(folder)
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder} is not a tokenizer folder ({reason}); give one with tokenizer.json") from error
    backend = getattr(found, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise ValueError(
            f"{folder} holds a tokenizer of class {type(found).__name__}, which has no tokenizer.json and cannot be "
            "converted to one; give another tokenizer"
        )
    return backend


def _class_is_declared(folder: Path) -> bool:
    said = (read_object(folder / CONFIG).get("tokenizer_class"), read_object(folder / "config.json").get("model_type"))
    return any(said)


def _byte_level(vocabulary: Path, merges: Path) -> Backend:
    try:
        backend = Backend(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # `tokenizers` raises bare Exception for every malformed file
        raise ValueError(f"{merges} and its vocab.json are no byte-pair encoding ({error}); restore them") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _check_packages(folder: Path) -> None:
    wanted = {"transformers": "pip install -e '.[hf]' -c constraints.txt"}
    model = next((name for name in SENTENCEPIECE if (folder / name).is_file()), "")
    if model:
        wanted["sentencepiece"] = "pip install sentencepiece"
    for package, command in wanted.items():
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{folder} holds no tokenizer.json, and converting its {model or 'files'} needs the {package} package; "
                f"install it with: {command}"
            )
