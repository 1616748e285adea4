"""ATLAS (arXiv 2505.23735) pretrained on Megatron-Core."""
