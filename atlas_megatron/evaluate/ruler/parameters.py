"""RULER's tasks with their official parameters: NVIDIA/RULER, scripts/synthetic.yaml and constants.py."""

from __future__ import annotations

from atlas_megatron.evaluate.ruler.niah import Niah

NIAH_TOKENS = 128  # to generate

NIAH = {
    "niah_single_1": Niah("repeat", "words", "numbers", 1, 1, 1, NIAH_TOKENS),
    "niah_single_2": Niah("essay", "words", "numbers", 1, 1, 1, NIAH_TOKENS),
    "niah_single_3": Niah("essay", "words", "uuids", 1, 1, 1, NIAH_TOKENS),
    "niah_multikey_1": Niah("essay", "words", "numbers", 4, 1, 1, NIAH_TOKENS),
    "niah_multikey_2": Niah("needle", "words", "numbers", 1, 1, 1, NIAH_TOKENS),
    "niah_multikey_3": Niah("needle", "uuids", "uuids", 1, 1, 1, NIAH_TOKENS),
    "niah_multivalue": Niah("essay", "words", "numbers", 1, 4, 1, NIAH_TOKENS),
    "niah_multiquery": Niah("essay", "words", "numbers", 4, 1, 4, NIAH_TOKENS),
}
