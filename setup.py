"""The project's packages, commands and dependencies; constraints.txt pins the versions."""

from setuptools import find_packages, setup

setup(
    name="atlas-megatron",
    version="0.1.0",
    description="ATLAS: memories that learn at test time, pretrained on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.12,<3.13",
    # kernels/ itself is no package: a package of that name would shadow Hugging Face's `kernels`.
    # The shipped configurations go along: config/shipped.py finds them.
    package_dir={"atlas_kernels": "kernels/atlas_kernels", "atlas_megatron.configs": "configs"},
    packages=[
        *find_packages(include=["atlas_megatron", "atlas_megatron.*"]),
        *find_packages("kernels"),
        "atlas_megatron.configs",
    ],
    package_data={"atlas_megatron.configs": ["*.toml", "*/*.toml", "*/*.list", "*/*.json"]},
    install_requires=[
        "einops",  # Megatron-Core forms the two levels of context-parallel groups with it, without declaring it
        "matplotlib",
        "megatron-core==0.19.2",
        "numpy",
        "psutil",  # Megatron-Core's checkpoint writer asks for it without declaring it
        "pyarrow",
        "rich",
        "tensorboard",
        "tokenizers",
        "torch==2.11.0",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]==2.20.2"],
        "muon": ["emerging-optimizers==0.3.0"],
        "hf": ["accelerate", "safetensors", "transformers>=5.0.0"],
        "eval": ["lm-eval"],
        "deepspeed": ["deepspeed==0.19.8"],
        "bench": ["titans-pytorch==0.5.5"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "dev": [
            "accelerate",
            "deepspeed",
            "emerging-optimizers",
            "lm-eval",
            "mypy",
            "pytest",
            "pytest-xdist",
            "ruff",
            "safetensors",
            "transformers>=5.0.0",
        ],
    },
    entry_points={
        "console_scripts": [
            "atlas-eval=atlas_megatron.evaluate.command:main",
            "atlas-doctor=atlas_megatron.doctor:main",
            "atlas-generate=atlas_megatron.generate:main",
            "atlas-serve=atlas_megatron.serving.command:main",
            "atlas-sweep=atlas_megatron.commands.sweep:main",
            "atlas-train=atlas_megatron.train:main",
        ],
        # vLLM is no extra: it wants another torch, and has an environment of its own (make setup-vllm).
        "vllm.general_plugins": ["atlas=atlas_megatron.serving.vllm_plugin:register"],
    },
)
