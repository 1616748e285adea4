"""Pretraining ATLAS models on Megatron-Core."""

import logging
import warnings

# Said once a process, data workers included, by libraries we build on, about accelerators that a machine may
# rightly lack; they would bury the run's own lines. What is there is told by the trainer's first lines.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
warnings.filterwarnings("ignore", message="Apex is not installed")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
