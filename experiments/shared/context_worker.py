"""What one process of context_parallel.py does: time a layer over its shard, or compare a trained model's outputs.

Every rank computes with one thread. Its bytes are those that it sends: halos, hand-offs, and the (N - 1) / N of an
all-to-all that goes to other ranks.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.config import Config, ParallelConfig
from atlas_megatron.data.batches import validation_labels
from atlas_megatron.model.build import build_model
from atlas_megatron.parallel import context, world
from atlas_megatron.parallel.context import settle

PING_BYTES = 8 << 20


@dataclass(frozen=True)
class Timed:
    """What to time: one mixer of `config` over sequences of its seq_length, `rounds` times after one to warm up."""

    config: Config
    batch: int
    rounds: int


@contextmanager
def sent_bytes() -> Iterator[Counter]:
    """Count the bytes that this process sends inside the block: point to point, and in all-to-alls."""
    counted: Counter = Counter()
    send, exchange = context.Chain.send, dist.all_to_all_single

    def counted_send(chain: context.Chain, tensor: Tensor, rank: int) -> None:
        counted["point to point"] += tensor.numel() * tensor.element_size()
        send(chain, tensor, rank)

    def counted_exchange(received: Tensor, blocks: Tensor, group: dist.ProcessGroup) -> None:
        counted["all-to-all"] += blocks.numel() * blocks.element_size() * (group.size() - 1) // group.size()
        exchange(received, blocks, group=group)

    context.Chain.send, dist.all_to_all_single = counted_send, counted_exchange  # type: ignore[method-assign]
    try:
        yield counted
    finally:
        context.Chain.send, dist.all_to_all_single = send, exchange  # type: ignore[method-assign]


def time_layer(timed: Timed) -> dict[str, Any]:
    """Medians of a layer's forward and backward: wall seconds and this process's own seconds; and the bytes it sent."""
    torch.set_num_threads(1)
    config = timed.config
    world.join(config)
    mixer = build_model(config).decoder.layers[0].mixer
    tokens = config.model.seq_length // config.parallel.context
    x = torch.randn(tokens, timed.batch, config.model.hidden_size, requires_grad=True)
    walls, works = [], []
    for _ in range(timed.rounds + 1):
        dist.barrier()
        wall, work = time.perf_counter(), time.process_time()
        with sent_bytes() as sent:
            mixer(x)[0].sum().backward()
        # Its own last message may still be under way; the barrier of the next round waits for it.
        works.append(time.process_time() - work)
        settle()
        dist.barrier()
        walls.append(time.perf_counter() - wall)
    found = {"wall": statistics.median(walls[1:]), "work": statistics.median(works[1:]), "sent": dict(sent)}
    if config.parallel.context > 1:
        found["bytes_per_second"] = _link_speed()
    world.leave()
    return found


def _link_speed() -> float:
    """Bytes a second between the first two ranks, of one large message there and back."""
    tensor, rank = torch.zeros(PING_BYTES // 4), dist.get_rank()
    seconds = []
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        if rank == 0:
            dist.send(tensor, 1)
            dist.recv(tensor, 1)
        elif rank == 1:
            dist.recv(tensor, 0)
            dist.send(tensor, 0)
        seconds.append(time.perf_counter() - start)
    return 2 * PING_BYTES / statistics.median(seconds)


@dataclass(frozen=True)
class Compared:
    """What to compare: the model of a run, in a layout, on some of its validation sequences.

    together: sequences in one forward. disturbed: whether the embedding's output is moved by one unit in the last
    place, up or down.
    """

    run: str
    parallel: ParallelConfig
    sequences: int
    together: int
    disturbed: bool = False


def outputs_and_gradients(compared: Compared) -> dict[str, Tensor]:
    """The likeliest next tokens of all sequences, [N, T], and all gradients of the mean loss of the first few."""
    torch.set_num_threads(1)
    model, config = checkpoint.load_model(compared.run, compared.parallel)
    if compared.disturbed:
        model.embedding.register_forward_hook(_disturb)
    shards, shard = config.parallel.context, parallel_state.get_context_parallel_rank()
    group = parallel_state.get_context_parallel_group()
    config = replace(config, train=replace(config.train, validate_sequences=compared.sequences))
    tokens = torch.tensor(validation_labels(config))
    likeliest = []
    with torch.no_grad():
        for some in tokens.split(compared.together):
            own = model(some.chunk(shards, 1)[shard], None, None).argmax(-1)
            parts = [torch.empty_like(own) for _ in range(shards)]
            dist.all_gather(parts, own, group=group)
            likeliest.append(torch.cat(parts, 1))
    few = tokens[: compared.together]
    some, following = (t.chunk(shards, 1)[shard] for t in (few, few.roll(-1, 1)))
    losses = model(some, None, None, labels=following)
    (losses.sum() / (compared.together * config.model.seq_length)).backward()
    found = {"likeliest": torch.cat(likeliest)}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=group)
        found[name] = parameter.grad
    settle()
    world.leave()
    return found


def _disturb(module: Any, inputs: Any, output: Tensor) -> Tensor:
    up = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    held = output.detach()
    return output + (torch.nextafter(held, torch.where(up, torch.inf, -torch.inf)) - held)
