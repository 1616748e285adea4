"""What a fine-tuning run is asked for, and the checks that need neither data nor model."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.hf.weights import check as check_weights
from atlas_megatron.hf.weights import described_in

SCHEDULES = ("cosine", "linear", "constant")
LARGEST_SEED = 2**32 - 1  # that numpy takes
# `{field}` of a prompt, or `{field.of.field}`.
FIELD = re.compile(r"\{([\w.]+)\}")


@dataclass(frozen=True)
class Settings:
    """A run. Lengths are in tokens, 0 meaning what the model or the data say."""

    model: Path
    data: tuple[str, ...]
    out: Path
    deepspeed: Path | None = None
    validation: tuple[str, ...] = ()
    key: str = "text"
    prompt: str = "{input}\n{question}\n"
    skip_bad: bool = False
    length: int = 0
    segment: int = 0
    detach_every: int | None = None  # 0: nowhere; None: nowhere, or as the length of training asks (see Plan)
    checkpointing: bool | None = None
    epochs: float = 1.0
    steps: int = 0
    batch: int = 8
    micro_batch: int = 1
    lr: float = 1e-4
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.1
    clip: float = 1.0
    write_budget: float = 0.0
    seed: int = 0
    bf16: bool = False
    trust_remote_code: bool = False
    save_every: int = 100
    validate_every: int = 100
    log_every: int = 1
    keep: int = 2

    @property
    def work(self) -> Path:
        """The folder of checkpoints and of what is logged, beside the model that comes out."""
        return self.out.with_name(f"{self.out.name}.training")

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of a step on each device. Raises ValueError where they do not divide the batch."""
        together = self.micro_batch * world_size
        if self.batch % together:
            raise ValueError(
                f"--batch {self.batch} is no multiple of --micro-batch {self.micro_batch} on {world_size} devices; "
                f"give for example --batch {-(-self.batch // together) * together}"
            )
        return self.batch // together

    def decides(self) -> dict[str, Any]:
        """What the numbers of a run depend on: a checkpoint of other settings is of another run."""
        apart = ("out", "save_every", "validate_every", "log_every", "keep", "validation", "checkpointing", "skip_bad")
        apart_too = ("trust_remote_code",)
        return {name: _plain(value) for name, value in asdict(self).items() if name not in apart + apart_too}


def check(settings: Settings, world_size: int) -> None:
    """Raise ValueError for numbers that cannot be, what is not installed, and a target in the model's folder."""
    _check_numbers(settings)
    settings.accumulation(world_size)
    wanted = ["transformers", "accelerate", "safetensors"] + (["deepspeed"] if settings.deepspeed else [])
    for package in wanted:
        if importlib.util.find_spec(package) is None:
            extra = "deepspeed" if package == "deepspeed" else "hf"
            raise ValueError(
                f"{package} is not installed; install it with: pip install -e '.[{extra}]' -c constraints.txt"
            )
    if settings.bf16 and not settings.deepspeed:
        raise ValueError(
            "--bf16 needs --deepspeed, whose optimizer keeps the weights in float32 beside it; add for example "
            "--deepspeed configs/deepspeed/zero1.json, or leave --bf16 out"
        )
    if settings.out.name in ("", ".."):
        raise ValueError(f"--out {str(settings.out)!r} is no folder of its own; name one, for example tuned/first")
    for parent in (settings.work, *settings.out.parents):
        if parent.is_symlink() and not parent.exists() or parent.exists() and not parent.is_dir():
            raise ValueError(f"--out {settings.out} needs {parent} as a folder, and it is none; choose another --out")
    model = settings.model.resolve()
    if model == settings.work.resolve() or model in settings.out.resolve().parents:
        raise ValueError(f"--out {settings.out} lies in the model's own folder; choose a folder outside of it")


def _check_numbers(settings: Settings) -> None:
    at_least = {"length": 0, "segment": 0, "detach_every": 0, "steps": 0, "warmup": 0, "batch": 1, "micro_batch": 1}
    at_least |= {"save_every": 1, "validate_every": 1, "log_every": 1, "keep": 2, "weight_decay": 0, "clip": 0}
    at_least |= {"write_budget": 0}
    for name, least in at_least.items():
        given = getattr(settings, name)
        if given is not None and given < least:
            raise ValueError(f"--{name.replace('_', '-')} is {given}; give {least} or more")
    for name in ("lr", "epochs", "weight_decay", "clip", "write_budget"):
        if not math.isfinite(getattr(settings, name)):
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(settings, name)}; give a finite number")
    for name in ("lr", "epochs"):
        if not getattr(settings, name) > 0:
            raise ValueError(f"--{name} is {getattr(settings, name)}; give a number greater than 0")
    if settings.length == 1:
        raise ValueError("--length is 1, and a sequence of one token predicts none; give 2 or more")
    if not 0 <= settings.seed <= LARGEST_SEED:
        raise ValueError(f"--seed is {settings.seed}; give 0 to {LARGEST_SEED}")
    if settings.schedule not in SCHEDULES:
        raise ValueError(f"--schedule {settings.schedule!r} is unknown; one of {', '.join(SCHEDULES)}")


def read_model(folder: Path) -> AtlasConfig:
    """The description of the model in an exported folder. Raises ValueError where it is none, or not whole."""
    described = described_in(folder)
    code = (described.auto_map or {}).get("AutoModelForCausalLM", "") if hasattr(described, "auto_map") else ""
    code = str(code).partition(".")[0]
    if not code or not (folder / f"{code}.py").is_file():
        raise ValueError(f"{folder} does not hold the model's code; export it again with tools/convert_hf.py")
    if "def detach(" not in (folder / "cache_atlas.py").read_text(encoding="utf-8"):
        raise ValueError(
            f"the code in {folder} is older than fine-tuning, whose cache cannot be detached; export it again with "
            "tools/convert_hf.py"
        )
    dtype = described.dtype
    if dtype is not None and not (dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(
            f"{folder}/config.json says that dtype is {dtype}, which no model comes out in; give bfloat16 or float32"
        )
    check_weights(folder, described)
    return described


def check_budget(settings: Settings, config: AtlasConfig) -> None:
    """Raise ValueError where --write-budget finds no gate to keep to it."""
    if not settings.write_budget:
        return
    if not config.section("memory").write_gate:
        raise ValueError(
            f"--write-budget is {settings.write_budget}, and the model in {settings.model} has no write gates to keep "
            "to it (memory.write_gate); leave it out"
        )
    if "write_budget" not in (settings.model / "memory_atlas.py").read_text(encoding="utf-8"):
        raise ValueError(
            f"the code in {settings.model} is older than --write-budget; export it again with tools/convert_hf.py"
        )


def read_deepspeed(file: Path) -> dict[str, Any]:
    """A DeepSpeed configuration. Raises ValueError where it is none, or not of ZeRO-1, -2 or -3."""
    try:
        said = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--deepspeed {file} cannot be read ({error}); see configs/deepspeed") from error
    zero = said.get("zero_optimization") if isinstance(said, dict) else None
    if not isinstance(zero, dict) or type(zero.get("stage")) is not int or zero["stage"] not in (1, 2, 3):
        raise ValueError(f"{file} does not set zero_optimization.stage to 1, 2 or 3; see configs/deepspeed")
    gathered = "stage3_gather_16bit_weights_on_model_save"
    if zero["stage"] == 3 and not zero.get(gathered):
        raise ValueError(f"{file} leaves out {gathered}, without which no model could be written; set it to true")
    # What the options here say, and DeepSpeed wants to be told.
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return dict.fromkeys(sizes, "auto") | said


def from_arguments(given: dict[str, Any]) -> Settings:
    """Settings of a parsed command line, whose other words are left out."""
    names = {field.name for field in fields(Settings)}
    return Settings(**{name: value for name, value in given.items() if name in names and value is not None})


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
