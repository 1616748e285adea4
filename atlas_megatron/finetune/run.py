"""A fine-tuning run from its plan to the folder that comes out."""

from __future__ import annotations

import json
import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from atlas_megatron.files.scratch import new_folder
from atlas_megatron.finetune import checkpoints
from atlas_megatron.finetune.examples import collate
from atlas_megatron.finetune.plan import REPORT, Plan
from atlas_megatron.finetune.segments import SegmentReader
from atlas_megatron.hf.weights import INDEX, SUMS, note_sums
from atlas_megatron.parallel.device import flush_denormals, keep_freed_memory

SHARD_SIZE = "2GB"
BESIDE_WEIGHTS = (".py", ".json", ".jinja", ".txt", ".model")  # code, configuration, tokenizers of any kind


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
    from atlas_megatron.resilience.run_lock import RunLock

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
        keep_freed_memory()
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
