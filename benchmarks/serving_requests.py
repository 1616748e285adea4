"""The same requests to one exported model in three ways, each in a process of its own; figures as JSON.

    python -m benchmarks.serving_requests WAY FOLDER JOB

WAY: vllm (in vLLM's environment), generate (transformers, one padded batch), atlas (atlas-generate's reader, one text
after the other). JOB: the keys of `Job`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEGMENT = 2048  # prompt tokens that are read at once, in every way


@dataclass(frozen=True)
class Job:
    """prompts: token ids, of several lengths; at_once: how many of them are asked together; new: tokens of an answer;
    lengths: of the prompts whose first token is timed."""

    prompts: list[list[int]]
    at_once: list[int]
    new: int
    lengths: list[int]

    def long(self, length: int) -> list[int]:
        """A prompt of so many tokens."""
        whole = [token for prompt in self.prompts for token in prompt]
        return (whole * (length // len(whole) + 1))[:length]


# Prompts and how many tokens each is to be continued by.
Ask = Callable[[list[list[int]], int], None]


def asking_vllm(folder: str, job: Job) -> Ask:
    from vllm import LLM, SamplingParams

    model = LLM(
        folder, dtype="float32", max_model_len=max(job.lengths) + job.new + 1, max_num_seqs=max(job.at_once),
        max_num_batched_tokens=SEGMENT, disable_log_stats=True, distributed_executor_backend="uni",
    )  # fmt: skip

    def ask(prompts: list[list[int]], new: int) -> None:
        greedy = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        model.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)

    return ask


def asking_generate(folder: str, job: Job) -> Ask:
    import torch

    from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
    from atlas_megatron.parallel.device import flush_denormals

    flush_denormals()
    model = AtlasForCausalLM.from_pretrained(folder).eval()

    def ask(prompts: list[list[int]], new: int) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "prefill_chunk_size": SEGMENT}
        model.generate(ids, attention_mask=mask, **options)

    return ask


def asking_atlas(folder: str, job: Job) -> Ask:
    import torch

    from atlas_megatron.inference.reader import open_reader

    reader = open_reader(folder)

    def ask(prompts: list[list[int]], new: int) -> None:
        for prompt in prompts:
            reader.forget()
            for piece in torch.tensor([prompt]).split(SEGMENT, 1):
                logits = reader.read(piece, keep=1)
            for _ in range(new - 1):
                logits = reader.read(logits[:, -1].argmax(-1, keepdim=True), keep=1)

    return ask


WAYS = {"vllm": asking_vllm, "generate": asking_generate, "atlas": asking_atlas}


def measured(ask: Ask, job: Job) -> dict[str, Any]:
    """CPU seconds of this process: other work on the machine does not count."""
    ask(job.prompts[:2], 2)

    def seconds(prompts: list[list[int]], new: int) -> float:
        start = time.process_time()
        ask(prompts, new)
        return time.process_time() - start

    return {
        "tokens_per_second": {n: n * job.new / seconds(job.prompts[:n], job.new) for n in job.at_once},
        "first_token_seconds": {n: seconds([job.long(n)], 1) for n in job.lengths},
    }


def main(way: str, folder: str, job: str) -> None:
    given = Job(**json.loads(Path(job).read_text(encoding="utf-8")))
    print("\n" + json.dumps(measured(WAYS[way](folder, given), given)))


if __name__ == "__main__":
    main(*sys.argv[1:])
