"""The README.md of an exported folder: what the model is, what it was trained on, how it did, how to load it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from atlas_megatron import config as megatron
from atlas_megatron.checkpoint import checkpoint, provenance, step_folders
from atlas_megatron.data.prefixes import blend
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.training import metrics

FILE = "README.md"
HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- test-time-memory
- {kind}
---
"""
LOADING = """## How to load it

With torch and transformers alone; this runs the Python files that lie in this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

Where the package atlas-megatron is installed, its own classes do, and no code of this folder runs:

```python
import atlas_megatron.hf.auto
model = AutoModelForCausalLM.from_pretrained(FOLDER)
```

From the command line: `atlas-generate FOLDER --prompt TEXT`. What was read is kept with `cache.save_memory(FILE)`, and
`model.load_memory(FILE)` goes on from it.
"""
NOT_EVALUATED = """- It was trained to continue text. It follows no instructions unless it was fine-tuned to.
- What it writes was not examined for truth or harm.
- Nothing is known of it beyond the figures above."""


def write_card(folder: Path, name: str, source: Path, description: AtlasConfig, parameters: int) -> None:
    """Write the card of a checkpoint's export. name: the model's; source: the checkpoint, in its run where it has one.

    Raises ValueError where the run's metrics are no records.
    """
    run = megatron.load_saved(source / checkpoint.CONFIG)
    parts = [
        HEAD.format(kind=description.model_type) + f"# {name}",
        _model(description, parameters),
        "## What it was trained on",
        _training(source, run),
        "## Metrics",
        _metrics(source),
        LOADING.rstrip(),
        "## Limits",
        _limits(description),
    ]
    (folder / FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _model(description: AtlasConfig, parameters: int) -> str:
    counts = Counter(description.pattern)
    rows = [f"| `{symbol}` | {megatron.LAYERS[symbol].kind} | {count} |" for symbol, count in counts.items()]
    return "\n".join(
        (
            f"A language model of {parameters:,} parameters, hidden width {description.hidden_size}, vocabulary "
            f"{description.vocab_size:,}. Layers, in this order: `{description.pattern}`.",
            "",
            "| symbol | layer | how many |",
            "|---|---|---:|",
            *rows,
        )
    )


def _training(source: Path, run: megatron.Config) -> str:
    step = step_folders.step_of(source)
    lines = []
    pairs = blend(run.data.train)
    if pairs:
        named = [_set(prefix) + ("" if weight is None else f", weight {weight:g}") for weight, prefix in pairs]
        lines.append(f"- data: {'; '.join(named)}")
    else:
        lines.append("- data: not noted")
    noted = provenance.digests(source)
    lines += [f"- SHA-256 over windows of {_set(prefix)}: `{digest}`" for prefix, digest in noted.items()]
    if step > 0:
        tokens = step * run.train.global_batch * run.model.seq_length
        lines.append(f"- {step:,} steps of {run.train.global_batch} sequences, {tokens:,} tokens")
    lines.append(f"- sequences of {run.model.seq_length:,} tokens")
    lines.append(f"- highest learning rate {run.train.lr:g}")
    return "\n".join(lines)


def _set(prefix: str) -> str:
    """The last two names of a data set's path: the rest is of the machine that trained."""
    return "/".join(Path(prefix).parts[-2:])


def _metrics(source: Path) -> str:
    record = _last_validation(source)
    if record is None:
        return "No validation was recorded where this checkpoint lies."
    rows = [("validation loss, nats a token", record["validation_loss"])]
    if record.get("validation_bits_per_byte") is not None:
        rows.append(("validation bits per byte", record["validation_bits_per_byte"]))
    difference = metrics.silenced_difference(record)
    if difference is not None:
        rows.append(("change of the loss with the memories silenced, nats a token", difference))
    lines = [f"| {name} | {value:.4f} |" for name, value in rows]
    return "\n".join((f"At step {record['step']:,}:", "", "| | |", "|---|---:|", *lines))


def _last_validation(source: Path) -> dict[str, Any] | None:
    """The record of the last validation up to a checkpoint's step; None where the run has none, or is not around it."""
    run, step = source.parent.parent, step_folders.step_of(source)
    if source.parent != checkpoint.folder_of(run) or not (run / metrics.METRICS).is_file():
        return None
    found = [r for r in metrics.read(run) if "validation_loss" in r and r["step"] <= step]
    return found[-1] if found else None


def _limits(description: AtlasConfig) -> str:
    length = f"- It was trained on {description.seq_length:,} tokens at once; longer texts were not measured here."
    if description.grows:
        state = "- Its state grows with the text: a layer of it keeps all that was read."
    else:
        state = "- Its state has one size, whatever the length of the text. A memory forgets what it does not keep."
    return "\n".join((length, state, NOT_EVALUATED))
