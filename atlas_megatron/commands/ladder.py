"""The ladder of sizes from one dial: show its rungs, or write their TOMLs and the lists that launch/ladder.sh reads.

The formulas and their sources stand in atlas_megatron/scaling/ladder.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version
from atlas_megatron.config import Config
from atlas_megatron.estimate.machine import Machine
from atlas_megatron.model.build import flops_per_token, num_params
from atlas_megatron.scaling import ladder

EXAMPLES = """\
examples:
  python tools/ladder.py show
  python tools/ladder.py write configs/scale                                  # what the repository holds
  python tools/ladder.py write runs/ladder 20M 40M 85M --tokens-per-parameter 40 --memory 40GiB --gpus-per-node 4
"""
TEMPLATE = """\
# {name} of the ladder, written by tools/ladder.py; the formulas and their sources: atlas_megatron/scaling/ladder.py.
# {parameters:,} parameters{apart}, {tokens:,} tokens, {training:.2e} training FLOPs.

[run]
directory = "{run.directory}"

[model]
pattern = "{model.pattern}"
hidden_size = {model.hidden_size}
ffn_hidden_size = {model.ffn_hidden_size}
vocab_size = {model.vocab_size}
seq_length = {model.seq_length}
tied_embeddings = true

[memory]
preset = "{memory.preset}"
heads = {memory.heads}
head_dim = {memory.head_dim}
gate_rank = {memory.gate_rank}
ns_period = {memory.ns_period}  # tokens between orthogonalised writes; 1 is the paper, {memory.chunk} one a chunk

[attention]  # of F, *, A and C layers, where model.pattern is given some
heads = {attention.heads}
head_dim = {attention.head_dim}

[train]
steps = {train.steps}
global_batch = {train.global_batch}  # {batch:,} tokens
micro_batch = {train.micro_batch}
lr = {train.lr}
min_lr = {train.min_lr}
warmup_steps = {train.warmup_steps}
precision = "{train.precision}"
recompute = {recompute}
validate_every = {train.validate_every}
validate_sequences = {train.validate_sequences}
log_every = {train.log_every}
stats_every = {train.stats_every}

[checkpoint]
every = {checkpoint.every}
keep = {checkpoint.keep}

[data]
train = ["{data.train[0]}"]
validation = ["{data.validation[0]}"]
tokenizer = "{data.tokenizer}"

[parallel]
tensor = {parallel.tensor}
sequence = {sequence}
devices_per_node = {parallel.devices_per_node}
"""
LIST = """\
# A ladder, for launch/ladder.sh: a config beside this file and its nodes ({device}) a line.
{lines}
"""


def text(name: str, config: Config, setting: ladder.Setting) -> str:
    """The rung as TOML; `load` reads it back to an equal Config."""
    batch = config.train.global_batch * config.model.seq_length
    tokens = batch * config.train.steps
    return TEMPLATE.format(
        name=name,
        parameters=num_params(config),
        apart="" if setting.counts_embedding else f" ({ladder.counted(config, setting):,} without the embedding)",
        tokens=tokens,
        training=tokens * flops_per_token(config).training,
        batch=batch,
        recompute=str(config.train.recompute).lower(),
        sequence=str(config.parallel.sequence).lower(),
        **{section: getattr(config, section) for section in vars(config)},
    )


def rungs(arguments: argparse.Namespace) -> dict[str, tuple[Config, ladder.Setting]]:
    """The asked rungs with their settings; raises ValueError for an unknown one and for one that fits no device."""
    found = {}
    for name in dict.fromkeys(map(ladder.named, arguments.rungs or ladder.RUNGS)):
        setting = ladder.RUNGS[name]
        if arguments.memory:
            setting = replace(setting, memory=Machine.of([f"memory={arguments.memory}"]).memory)
        if arguments.gpus_per_node and setting.gpus_per_node:
            setting = replace(setting, gpus_per_node=arguments.gpus_per_node)
        given = {"tokens_per_parameter": arguments.tokens_per_parameter, "setting": setting}
        found[name] = (ladder.rung(name, **given), setting)
    return found


def show(found: dict[str, tuple[Config, ladder.Setting]]) -> Table:
    table = Table(title="the ladder")
    names = "rung parameters layers width heads MLP lr batch warm-up steps tokens FLOPs nodes tensor micro".split()
    for column in names:
        table.add_column(column, justify="right", no_wrap=True)
    for name, (config, _) in found.items():
        model, train = config.model, config.train
        batch = train.global_batch * model.seq_length
        tokens = batch * train.steps
        cells = (
            name, f"{num_params(config):,}", model.pattern.count("-"), model.hidden_size, config.memory.heads,
            model.ffn_hidden_size, f"{train.lr:.2g}", f"{batch:,}", train.warmup_steps, f"{train.steps:,}",
            f"{tokens:.2e}", f"{tokens * flops_per_token(config).training:.2e}", ladder.nodes_of(name),
            config.parallel.tensor, f"{train.micro_batch}{' recompute' if train.recompute else ''}",
        )  # fmt: skip
        table.add_row(*map(str, cells))
    return table


def files(found: dict[str, tuple[Config, ladder.Setting]]) -> dict[str, str]:
    """What `write` writes: a TOML a rung, and a list for GPUs and one for CPUs, as far as there are such rungs."""
    written = {f"{name.lower()}.toml": text(name, config, setting) for name, (config, setting) in found.items()}
    for kind, on_gpu in (("cpu", False), ("gpu", True)):
        own = [name for name, (_, setting) in found.items() if bool(setting.gpus_per_node) == on_gpu]
        if own:
            gpus = found[own[0]][1].gpus_per_node
            device = f"of {gpus} GPUs" if on_gpu else "of one CPU process"
            lines = "\n".join(f"{name.lower()}.toml {ladder.nodes_of(name)}" for name in own)
            written[f"{kind}.list"] = LIST.format(device=device, lines=lines)
    return written


def write(folder: Path, contents: dict[str, str], *, replaces: bool) -> None:
    """Write the files; raises ValueError, before it writes any, where one is there with other contents."""
    for name, content in contents.items():
        path = folder / name
        if path.is_file() and path.read_text(encoding="utf-8") != content and not replaces:
            raise ValueError(f"{path} is there and not what would be written; name another folder, or add --replace")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
        print(folder / name)


def main(words: Sequence[str] | None = None) -> int:
    """Show or write rungs; an exit status."""
    return command("ladder", lambda: _ladder(_parser().parse_args(words)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ladder.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("show", "a table of the rungs"), ("write", "their TOMLs and lists")):
        one = commands.add_parser(name, help=what)
        if name == "write":
            one.add_argument("folder", type=Path, metavar="FOLDER")
            one.add_argument("--replace", action="store_true", help="overwrite files that differ")
        one.add_argument("rungs", nargs="*", metavar="RUNG", help="default: all; for example 20M 1.3B")
        one.add_argument("--tokens-per-parameter", type=float, default=ladder.TOKENS_PER_PARAMETER)
        one.add_argument("--memory", metavar="SIZE", help="of a device (default 80GiB; of a CPU's process 4GiB)")
        one.add_argument("--gpus-per-node", type=int, metavar="G", help="default 8")
    return parser


def _ladder(arguments: argparse.Namespace) -> int:
    if arguments.gpus_per_node is not None and arguments.gpus_per_node < 1:
        raise ValueError(f"--gpus-per-node {arguments.gpus_per_node} is no number of GPUs; give at least 1")
    found = rungs(arguments)
    if arguments.command == "show":
        # Whole numbers before a narrow screen's width: a terminal wraps, a cut figure says nothing.
        Console(width=160, soft_wrap=True).print(show(found))
    else:
        write(arguments.folder, files(found), replaces=arguments.replace)
    return 0
