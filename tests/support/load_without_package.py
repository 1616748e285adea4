"""Load an exported folder where nothing of this project is installed: `python load_without_package.py FOLDER OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

BLOCKED = ("atlas_megatron", "atlas_kernels", "megatron")


class Blocked:
    """As if they were not installed."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocked)  # type: ignore[arg-type]

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main(folder: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = torch.arange(2 * 21).view(2, 21) % 64
    with torch.no_grad():
        found = model(prompt)
        found.past_key_values.save_memory(f"{out}/memory")
        continued = model.generate(prompt, max_new_tokens=4, do_sample=False)
    model.save_pretrained(f"{out}/again")
    said = {"logits": found.logits, "continued": continued, "dtype": model.dtype}
    said["config"] = type(model.config).__module__
    said["code"] = sorted(file.name for file in Path(f"{out}/again").glob("*.py"))
    said["text"] = AutoTokenizer.from_pretrained(folder).decode(prompt[0])
    assert not any(name.split(".")[0] in BLOCKED for name in sys.modules)
    torch.save(said, f"{out}/said.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
