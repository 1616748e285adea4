"""A fine-tuning run from its settings to the folder that comes out."""

from __future__ import annotations

import json
import math
import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from atlas_megatron.config import WITH_MEMORY
from atlas_megatron.finetune import checkpoints
from atlas_megatron.finetune.examples import Examples, Loader, collate
from atlas_megatron.finetune.segments import SegmentReader
from atlas_megatron.finetune.settings import Settings, check, check_budget, read_deepspeed, read_model
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.hf.memory_atlas import reach_of
from atlas_megatron.hf.weights import INDEX, SUMS, described_in, note_sums
from atlas_megatron.hf.weights import check as check_weights
from atlas_megatron.parallel.cpu import flush_denormals
from atlas_megatron.records import Skipped
from atlas_megatron.scratch import new_folder

REPORT = "finetune.json"  # what a folder that came out was trained with, and what the run said
SHARD_SIZE = "2GB"
BESIDE_WEIGHTS = (".py", ".json", ".jinja", ".txt", ".model")  # code, configuration, tokenizers of any kind


@dataclass(frozen=True)
class Plan:
    """A checked run: nothing of it has been written yet."""

    settings: Settings
    config: AtlasConfig
    deepspeed: dict[str, Any] | None
    train: Examples
    validation: Examples | None
    world_size: int
    skipped: Skipped | None = None  # bad records that were left out
    done: bool = False  # the folder that comes out is there, and of this very run

    @property
    def segment(self) -> int:
        """Tokens; by default the length that the model was trained at."""
        return min(self.settings.segment or self.config.seq_length, self.train.longest)

    @property
    def reach(self) -> int:
        """Tokens after which gradients of memories end, as the exported model ends them in its own forward, where
        --detach-every is not given: those of its config.gradient_reach, or, for sequences longer than those of
        training, a quarter of that length. 0: they do not end for that."""
        ends = self.train.longest > (self.config.gradient_reach or self.config.seq_length)
        return self._bound if ends and self.settings.detach_every is None else 0

    @property
    def _bound(self) -> int:
        """As `reach`, whatever is asked for; 0 for a model without memories that gradients could explode in."""
        return reach_of(self.config) if set(WITH_MEMORY) & set(self.config.pattern) else 0

    @property
    def detach_every(self) -> int:
        """Segments over which gradients flow, 0 for all of them: given, or as `reach` asks."""
        if self.settings.detach_every is not None:
            return self.settings.detach_every
        return max(1, self.reach // self.segment) if self.reach else 0

    @property
    def window(self) -> int:
        """Tokens over which gradients flow at most."""
        whole = self.train.longest
        return min(whole, self.detach_every * self.segment) if self.detach_every else whole

    @property
    def gradients(self) -> str:
        """Where gradients end, in words."""
        if not self.reach:
            return f"detached every {self.detach_every} segments" if self.detach_every else "over every cut"
        ends = min(self.reach, self.detach_every * self.segment)
        return f"detached every {self.detach_every} segments, those of memories every {ends:,} tokens"

    @property
    def on_length(self) -> str:
        """A line on gradients and the length of training; empty where it bounds nothing."""
        trained, longest = self.config.seq_length, self.train.longest
        if self.reach:
            return (
                f"sequences of up to {longest:,} tokens, {trained:,} in training: gradients do not pass further than "
                "the exported model's own; --detach-every 0 lets them pass over every cut"
            )
        if self._bound and self.window > trained:
            return (
                f"warning: gradients pass over up to {self.window:,} tokens, more than the {trained:,} of training, "
                "and may explode; leave out --detach-every, or watch the gradient norm"
            )
        return ""

    @property
    def checkpointing(self) -> bool:
        """Unless it is said: where the gradients go over cuts."""
        chosen = self.settings.checkpointing
        return self.detach_every != 1 and self.train.longest > self.segment if chosen is None else chosen

    @property
    def steps(self) -> int:
        """An epoch's last may have fewer micro-batches than the others; a micro-batch that is not full is left out."""
        micro_batches = self.train.sequences // (self.settings.micro_batch * self.world_size)
        steps_an_epoch = math.ceil(micro_batches / self.settings.accumulation(self.world_size))
        return self.settings.steps or math.ceil(steps_an_epoch * self.settings.epochs)

    def identity(self) -> dict[str, Any]:
        """What must be the same where a run goes on from a checkpoint."""
        far: int | str = self.detach_every
        if self.reach:
            far = f"left to the length of training ({far}, memories after {self.reach} tokens)"
        return self.settings.decides() | {
            "detach_every": far,
            "steps": self.steps,
            "segment": self.segment,
            "sequences": self.train.sequences,
            "tokens": self.train.tokens,
            "devices": self.world_size,
            "deepspeed": self.deepspeed,
        }


def world_size() -> int:
    """Processes of this run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def plan(settings: Settings, devices: int) -> Plan:
    """Check everything that can be wrong, and read the data. Raises ValueError."""
    check(settings, devices)
    there = _settings_of(settings.out)
    if there is not None:
        # Before the data are read, which may take long.
        _refuse_other(settings.out, there, {k: v for k, v in settings.decides().items() if k != "detach_every"})
    config = read_model(settings.model)
    check_budget(settings, config)
    deepspeed = read_deepspeed(settings.deepspeed) if settings.deepspeed else None
    loader = Loader(settings, config)
    # First: it is the smaller one, and nothing else says sooner that there is none in it.
    validation = loader.load(settings.validation) if settings.validation else None
    train = loader.load(settings.data)
    if train.sequences < settings.batch:
        raise ValueError(
            f"the data hold {train.sequences} sequences, fewer than --batch {settings.batch}; give more data, a "
            "smaller --length or a smaller --batch"
        )
    planned = Plan(settings, config, deepspeed, train, validation, devices, loader.skipped)
    if settings.warmup >= planned.steps:
        raise ValueError(
            f"--warmup {settings.warmup} must be less than the {planned.steps:,} steps of the run; give a smaller one, "
            "more data, or more --epochs or --steps"
        )
    if there is None:
        return planned
    ours = json.loads(json.dumps(planned.identity()))
    _refuse_other(settings.out, there, dict.fromkeys(there) | ours)
    check_weights(settings.out, described_in(settings.out))
    return replace(planned, done=True)


def _settings_of(out: Path) -> dict[str, Any] | None:
    """What a folder that came out was trained with; None where nothing is there. Raises ValueError for any other."""
    if not out.exists() and not out.is_symlink():
        return None
    try:
        said = json.loads((out / REPORT).read_bytes())["settings"]
        if isinstance(said, dict):
            return said
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(
        f"--out {out} exists and holds no {REPORT} of a run; nothing is written over: choose another, or remove it"
    )


def _refuse_other(out: Path, there: dict[str, Any], ours: dict[str, Any]) -> None:
    changed = checkpoints.changed(ours, there)
    if changed:
        raise ValueError(
            f"--out {out} exists, of a run with other settings: {changed}; nothing is written over: choose another, or "
            "remove it"
        )


def finetune(run: Plan) -> Path:
    """Train, from the newest whole checkpoint on where there is one, and write the folder.

    Raises ValueError; also where another process trains for the same folder.
    """
    with _alone(run.settings.work):
        return _finetune(run)


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Within: no other run writes there. The first process holds the lock; where it cannot, the launcher ends all."""
    # Here: it imports Megatron, which takes seconds.
    from atlas_megatron.run_lock import RunLock

    lock = RunLock(work, partial(print, flush=True), "--out") if os.environ.get("RANK", "0") == "0" else None
    try:
        yield
    finally:
        if lock:
            lock.release()


def _finetune(run: Plan) -> Path:
    # transformers is quiet where it has nothing to say that a line of ours does not.
    from transformers.utils import logging as theirs

    from atlas_megatron.finetune.trainer import Progress, StateTrainer

    settings = run.settings
    flush_denormals()
    if not torch.cuda.is_available():
        # accelerate imports DeepSpeed where it is installed, which says at length what it does not find.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    resumed = checkpoints.newest(settings.work, run.identity())
    if run.deepspeed is not None:
        _prepare_deepspeed()
    arguments = _arguments(run)  # before the model: under ZeRO-3 it is loaded in parts
    if run.deepspeed is not None:
        _join_deepspeed()
    language_model = _load(run, arguments)
    reader = SegmentReader(language_model, run.segment, checkpointing=run.checkpointing, reach=run.reach)
    progress = Progress()
    trainer = progress.trainer = StateTrainer(
        model=reader,
        args=arguments,
        train_dataset=run.train.dataset,
        eval_dataset=run.validation.dataset if run.validation else None,
        data_collator=collate,
        callbacks=[progress],
        detach_every=run.detach_every,
        write_budget=settings.write_budget,
        identity=run.identity(),
        keep=settings.keep,
    )
    _silence_printer(trainer)
    if trainer.is_world_process_zero():
        print(_opening(run, resumed), flush=True)
    try:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the device's memory is full; give a smaller --segment or --micro-batch, --checkpointing, or a higher "
            f"stage of ZeRO, as --dry-run tells them ({str(error).splitlines()[0]})"
        ) from error
    except RuntimeError as error:
        if "without overflow" in str(error):
            raise ValueError(f"an update is too large for its numbers ({error}); give a smaller --lr") from error
        raise
    except AssertionError as error:
        if run.deepspeed is not None and _raised_by(error).startswith("deepspeed."):
            raise ValueError(f"DeepSpeed refuses --deepspeed {settings.deepspeed} ({error}); mend it") from error
        raise
    _write(run, trainer)
    trainer.accelerator.end_training()
    return settings.out


def _opening(run: Plan, resumed: Path | None) -> str:
    words = (
        f"{run.train.sequences:,} sequences, {run.train.tokens:,} tokens; {run.steps:,} steps of {run.settings.batch} "
        f"sequences, processes: {run.world_size}; segments of {run.segment:,} tokens, gradients {run.gradients}"
        f"{', recomputed' if run.checkpointing else ''}"
    )
    return "\n".join(filter(None, (words, run.on_length, f"going on from {resumed}" if resumed else "")))


def _arguments(run: Plan) -> Any:
    from transformers import TrainingArguments

    settings, validated = run.settings, run.validation is not None
    arguments = TrainingArguments(
        output_dir=str(settings.work),
        deepspeed=run.deepspeed,
        use_cpu=not torch.cuda.is_available(),
        bf16=settings.bf16,
        max_steps=run.steps,
        per_device_train_batch_size=settings.micro_batch,
        per_device_eval_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.accumulation(run.world_size),
        dataloader_drop_last=True,
        learning_rate=settings.lr,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        optim="adamw_torch",
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=None,  # by StateTrainer, which leaves a user's copies
        eval_strategy="steps" if validated else "no",
        eval_steps=settings.validate_every if validated else None,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cache=bool(run.config.use_cache),
    )
    # Of several GPUs that no launcher shares out, Trainer would take all, in threads; a process here has one.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _prepare_deepspeed() -> None:
    """What DeepSpeed finds out for itself only with MPI, or by building what a CPU does not need."""
    if "WORLD_SIZE" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", "29500")
    if not torch.cuda.is_available():
        import deepspeed

        # Sums through shared memory: minutes of a compiler, where gloo's will do.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _join_deepspeed() -> None:
    """Before a model is loaded in parts; transformers joins the processes, and tells DeepSpeed only later."""
    import deepspeed

    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def _load(run: Plan, arguments: Any) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM

    folder = str(run.settings.model)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
    try:
        if not run.settings.trust_remote_code:
            return AtlasForCausalLM.from_pretrained(folder, **options)
        # One process before the others: each copies the folder's code to where Python finds it.
        with arguments.main_process_first(desc="copying the model's code"):
            get_class_from_dynamic_module(run.config.auto_map["AutoModelForCausalLM"], folder, local_files_only=True)
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder} cannot be loaded ({reason}); export it again") from error


def _write(run: Plan, trainer: Any) -> None:
    """The folder that came in with new weights: its code, configuration and tokenizer as they were."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        language_model, dtype = trainer.model.language_model, run.config.dtype or torch.float32
        # Each once: what is tied has two names in a state, and one as a parameter.
        names = [name for name, _ in language_model.named_parameters()]
        weights = {name: weights[f"language_model.{name}"].to(dtype) for name in names}
        bad = next((name for name, value in weights.items() if not value.isfinite().all()), None)
        if bad is not None:
            # The loss of a last step says nothing of the weights after it.
            raise ValueError(
                f"{bad} is not finite after step {trainer.state.global_step}, and nothing is written; remove "
                f"{run.settings.work}, and start again with a smaller --lr, a longer --warmup or a smaller --clip"
            )
        with new_folder(run.settings.out) as folder:
            language_model.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD_SIZE)
            for file in run.settings.model.iterdir():
                if file.is_file() and file.suffix in BESIDE_WEIGHTS and file.name not in (INDEX, SUMS, REPORT):
                    shutil.copyfile(file, folder / file.name)
            note_sums(folder)
            report = {"settings": run.identity(), "history": trainer.state.log_history}
            (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    trainer.accelerator.wait_for_everyone()


def _raised_by(error: BaseException) -> str:
    """The module that raised an error."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""


def _silence_printer(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
