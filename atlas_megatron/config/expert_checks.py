"""What must hold of `E` layers and of the ranks that share them out, and what of it Megatron-Core cannot do."""

from __future__ import annotations

from atlas_megatron.config.layers import CUT, EXPERTS
from atlas_megatron.config.sections import Config


def check_experts(config: Config, world_size: int) -> None:
    """Raise ValueError where experts do not divide among ranks, or meet what has not been made to fit them."""
    parallel, pattern = config.parallel, config.model.pattern
    if EXPERTS not in pattern:
        if parallel.expert > 1:
            raise ValueError(
                f"parallel.expert={parallel.expert} but model.pattern={pattern!r} has no E layer; set parallel.expert=1"
            )
        return
    _check_router(config)
    _check_ranks(config, world_size)
    _check_company(config)


def _check_router(config: Config) -> None:
    experts = config.experts
    if experts.top_k > experts.count:
        raise ValueError(
            f"experts.top_k={experts.top_k} is more than experts.count={experts.count}; a token takes "
            f"{experts.count} at most"
        )
    if experts.shared_ffn_hidden_size % config.parallel.tensor:
        raise ValueError(
            f"experts.shared_ffn_hidden_size={experts.shared_ffn_hidden_size} does not divide by parallel.tensor="
            f"{config.parallel.tensor}; make it a multiple of it"
        )


def _check_ranks(config: Config, world_size: int) -> None:
    experts, parallel, pattern = config.experts, config.parallel, config.model.pattern
    if parallel.expert > experts.count:
        raise ValueError(
            f"parallel.expert={parallel.expert} ranks are more than experts.count={experts.count}; each holds one "
            f"expert at least: set parallel.expert={experts.count} or less"
        )
    if experts.count % parallel.expert:
        raise ValueError(
            f"experts.count={experts.count} does not divide by parallel.expert={parallel.expert}; nearest: "
            f"{max(1, round(experts.count / parallel.expert)) * parallel.expert}"
        )
    ranks = world_size // parallel.pipeline
    if ranks % parallel.expert:
        raise ValueError(
            f"parallel.expert={parallel.expert} does not divide the {ranks} ranks of a pipeline stage (a world of "
            f"{world_size} / parallel.pipeline={parallel.pipeline}); take a divisor of {ranks}"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} with E layers, which core trains under sequence parallelism alone; set "
            "parallel.sequence=true"
        )
    for rank in range(parallel.pipeline):
        if not any(EXPERTS in stage for stage in pattern.split(CUT)[rank :: parallel.pipeline]):
            raise ValueError(
                f"model.pattern={pattern!r} leaves pipeline rank {rank} without an E layer: its optimizer would have "
                "no part for experts, and checkpoints would not move; cut it so that each rank has one"
            )


def _check_company(config: Config) -> None:
    """What E layers have not been run with."""
    train = config.train
    hindrances = (
        (train.optimizer == "muon", "train.optimizer='muon'", "its matrices are marked layer by layer, not by expert"),
        (train.fp8 != "", f"train.fp8={train.fp8!r}", "each expert's tokens would have to be padded"),
        (train.cuda_graph, "train.cuda_graph=true", "the host reads how many tokens each expert gets"),
    )
    for hinders, given, why in hindrances:
        if hinders:
            raise ValueError(f"{given} with E layers in model.pattern: {why}; leave one of them out")
