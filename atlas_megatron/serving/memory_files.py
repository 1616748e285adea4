"""The memory files that a server offers: a request names one, and its conversation goes on from there.

Files lie in one folder. A request gives a name, never a path. A file is read and compared with the model before the
request is taken; one that has not changed since is not read again.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from atlas_megatron.hf.cache_atlas import AtlasCache
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.hf.modeling_atlas import PRINTED, print_of
from atlas_megatron.hf.weights import files_of

# Of a request's `vllm_xargs`: the name of a file.
KEY = "memory"
ADVICE = "save one with atlas-generate FOLDER --prompt-file TEXT --save-memory FILE"


class MemoryFiles:
    """A folder with memory files of one model."""

    def __init__(self, folder: Path, model: Path, config: AtlasConfig) -> None:
        """model: the exported folder, for the print of its weights. Raises ValueError where a folder is missing, or the
        model's state grows with what it reads."""
        if not folder.is_dir():
            raise ValueError(f"memories={folder} is no folder; give one with memory files, or leave it out")
        if config.grows:
            raise ValueError(
                f"memories={folder} was given, and the state of pattern={config.pattern!r} grows with what it reads: "
                "a file has no fixed size; leave memories out"
            )
        self.folder, self.config = folder, config
        self._weights = weights_print(model)
        self._checked: dict[Path, tuple[int, int]] = {}

    def check(self, name: object) -> None:
        """Raise ValueError for a name that is no file's here, and for a file that is damaged or of another model."""
        file = self.path(name)
        stamp = (file.stat().st_mtime_ns, file.stat().st_size)
        if self._checked.get(file) != stamp:
            self.load(name)
            self._checked[file] = stamp

    def load(self, name: object, device: str = "cpu") -> AtlasCache:
        """The memory of one text. Raises ValueError as `check`."""
        cache = AtlasCache.load_memory(self.path(name), self.config, device, self._weights)
        if cache.rows != 1 or not isinstance(cache.position, int):
            raise ValueError(f"memory {name!r} is of {cache.rows} texts, and a conversation has one; {ADVICE}")
        return cache

    def path(self, name: object) -> Path:
        """Where a file lies. Raises ValueError for what is no name of a file in the folder."""
        if not isinstance(name, str) or Path(name).name != name or not (self.folder / name).is_file():
            names = sorted(file.name for file in self.folder.iterdir() if file.is_file())
            raise ValueError(f"memory {name!r} is no file in this server's folder, which has {names}; {ADVICE}")
        return self.folder / name


def weights_print(model: Path) -> str:
    """As `AtlasPreTrainedModel.weights_print`, of an exported folder: no model is built."""
    found = {}
    for name in files_of(model):
        with safe_open(str(model / name), "pt") as file:
            for key in file.keys():  # noqa: SIM118  no mapping
                if key.startswith("model."):
                    tensor = file.get_tensor(key)
                    found[key.removeprefix("model.")] = (tuple(tensor.shape), tensor.flatten()[:PRINTED].clone())
    return print_of(found)


_offered: MemoryFiles | None = None


def offer(folder: Path, model: Path, config: AtlasConfig) -> None:
    """Let requests name the files of a folder. Raises ValueError as `MemoryFiles`."""
    global _offered
    _offered = MemoryFiles(folder, model, config)


def offered() -> MemoryFiles:
    """What `offer` was given in this process. Raises ValueError where it was not called."""
    if _offered is None:
        raise ValueError("a memory was named, and this server has none; start it with a folder of memory files")
    return _offered
