"""In vLLM's own environment: `python vllm_process.py JOB OUT`, both files of JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

LENGTH, TOKENS = 160, 12


def texts(job: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """The greedy continuations of prompts, by folder."""
    from vllm import LLM, SamplingParams

    greedy, said = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True), {}
    for folder, prompts in job.items():
        # Eight tokens a step: prompts are read in pieces while others are continued.
        model = LLM(
            folder, dtype="float32", max_model_len=LENGTH, max_num_seqs=3, max_num_batched_tokens=8,
            enable_chunked_prefill=True, disable_log_stats=True, distributed_executor_backend="uni",
        )  # fmt: skip
        found = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
        said[folder] = [list(one.outputs[0].token_ids) for one in found]
        model.llm_engine.engine_core.shutdown()
    return said


def main(job: str, out: str) -> None:
    Path(out).write_text(json.dumps(texts(json.loads(Path(job).read_text()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
