"""Words of no language. RULER draws its words from English lists (wonderwords); these need no download and are ours.

All words of one shape are equally long, so that none is a part of another.
"""

from __future__ import annotations

from random import Random

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
ENDINGS = "klmnprst"
SYLLABLE = len(CONSONANTS) * len(VOWELS)
WORDS = SYLLABLE**3 * len(ENDINGS)  # 2,744,000 of seven letters
SHORT_WORDS = SYLLABLE**2 * len(ENDINGS)  # 39,200 of five


def word(number: int, syllables: int = 3) -> str:
    """The number-th word, 0 <= number < WORDS (SHORT_WORDS of two syllables): syllables, then one consonant."""
    number, ending = divmod(number, len(ENDINGS))
    letters = ENDINGS[ending]
    for _ in range(syllables):
        number, syllable = divmod(number, SYLLABLE)
        letters = CONSONANTS[syllable // len(VOWELS)] + VOWELS[syllable % len(VOWELS)] + letters
    return letters


def pair(random: Random) -> str:
    """Two short words with a hyphen, the shape of RULER's adjective-noun keys."""
    return f"{word(random.randrange(SHORT_WORDS), 2)}-{word(random.randrange(SHORT_WORDS), 2)}"
