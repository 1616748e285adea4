"""What must hold of FP8 products and of CUDA graphs, which only a GPU has."""

from __future__ import annotations

from atlas_megatron.config.layers import split_sections
from atlas_megatron.config.sections import Config

# Sizes of FP8 products.
FP8_MULTIPLE = 16


def check_fp8(config: Config) -> None:
    """Raise ValueError where `train.fp8` asks for what Transformer Engine's FP8 products cannot take."""
    if not config.train.fp8:
        return
    if not config.model.transformer_engine:
        raise ValueError(
            f"train.fp8={config.train.fp8!r} with model.transformer_engine=false, whose linears know no FP8; set "
            "model.transformer_engine=true, or train.fp8=''"
        )
    if config.train.precision == "float32":
        raise ValueError(f"train.fp8={config.train.fp8!r} with train.precision='float32'; set precision='bfloat16'")
    model, parallel, pattern = config.model, config.parallel, config.model.pattern
    shards = parallel.context * (parallel.tensor if parallel.sequence else 1)
    sizes = {
        "model.hidden_size": model.hidden_size,
        f"model.ffn_hidden_size / tensor={parallel.tensor}": model.ffn_hidden_size // parallel.tensor,
        f"train.micro_batch x model.seq_length / {shards} shards": config.train.micro_batch
        * model.seq_length
        // shards,
    }
    for name in split_sections(pattern):
        section = getattr(config, name)
        width = section.heads * section.head_dim // parallel.tensor
        sizes[f"{name}.heads x head_dim / tensor={parallel.tensor}"] = width
    for name, size in sizes.items():
        if size % FP8_MULTIPLE:
            raise ValueError(
                f"{name} = {size} is no multiple of {FP8_MULTIPLE}, which train.fp8 needs; nearest: "
                f"{max(1, round(size / FP8_MULTIPLE)) * FP8_MULTIPLE}"
            )


def check_cuda_graph(config: Config) -> None:
    """Raise ValueError where a step does what a CUDA graph cannot hold, or what none has been captured with."""
    if not config.train.cuda_graph:
        return
    parallel, train = config.parallel, config.train
    hindrances = (
        (config.data.packed, "data.packed=true", "the host reads where documents begin"),
        (train.batch_ramp != "", f"train.batch_ramp={train.batch_ramp!r}", "a graph has one number of micro-batches"),
        (train.write_budget != 0, f"train.write_budget={train.write_budget}", "its weight is another in every step"),
        (train.recompute, "train.recompute=true", "the host keeps the random state of what is recomputed"),
        (train.recompute_modules != (), "train.recompute_modules", "the host keeps their random state"),
        (train.fp8 != "", f"train.fp8={train.fp8!r}", "the host updates its scales"),
        (parallel.pipeline > 1, f"parallel.pipeline={parallel.pipeline}", "stages wait for each other on the host"),
        (parallel.context > 1, f"parallel.context={parallel.context}", "shards wait for each other on the host"),
    )
    for hinders, given, why in hindrances:
        if hinders:
            raise ValueError(f"train.cuda_graph=true with {given}: {why}; set train.cuda_graph=false")
