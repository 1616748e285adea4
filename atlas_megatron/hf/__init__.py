"""The Hugging Face side: a model of plain modules that travels with its weights, and the conversion to and from it.

The files named `*_atlas.py` travel: an exported folder holds them beside the files of atlas_kernels, all flat. They
import each other relatively, and neither Megatron nor this package.
"""
