"""RULER's tasks with their official parameters: NVIDIA/RULER, scripts/synthetic.yaml and constants.py.

A length here is that of the prompt; RULER's max_seq_length holds the tokens to generate too. An edition is named by the
day from which its texts are those of that repository. The newest changed two tasks: vt and cwe are here as it has them
and as they were before.
"""

from __future__ import annotations

from dataclasses import replace

from atlas_megatron.evaluate.ruler.common_words import CommonWords, Repeats, Size
from atlas_megatron.evaluate.ruler.frequent_words import FrequentWords
from atlas_megatron.evaluate.ruler.niah import Niah
from atlas_megatron.evaluate.ruler.tracking import EARLIER, NEWEST, Tracking

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
# Ours, not RULER's: sixteen needles at even depths of one context, each asked for on its own.
NIAH_EACH = {
    "niah_each_1": Niah("repeat", "words", "numbers", 16, 1, 16, max_new_tokens=32, apart=True),
    "niah_each_2": Niah("essay", "words", "numbers", 16, 1, 16, max_new_tokens=32, apart=True),
}
TRACKING = {"vt": Tracking(chains=1, hops=4, max_new_tokens=30, edition=NEWEST)}
TRACKING_EARLIER = {EARLIER: replace(TRACKING["vt"], edition=EARLIER)}
COMMON_WORDS = {
    "cwe": CommonWords(
        common=10,
        long=Size(Repeats(30, 3), example_words=40, example_repeats=Repeats(10, 3)),
        long_from=4096,
        short=Size(Repeats(6, 1), example_words=20, example_repeats=Repeats(3, 1)),
        max_new_tokens=120,
    )
}
COMMON_WORDS_EARLIER = {EARLIER: replace(COMMON_WORDS["cwe"], before_answer="")}
FREQUENT_WORDS = {"fwe": FrequentWords(alpha=2.0, letters=6, tokens_a_word=50, max_new_tokens=50)}
