"""How an answer is judged, from 0 to 1 (RULER and BABILong report 100 times the mean)."""

from __future__ import annotations

from collections.abc import Sequence


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """The share of the answers that the prediction contains, whatever their case (RULER)."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """Whether the prediction contains any of the answers, whatever their case (RULER, for questions with variants)."""
    return float(any(answer.lower() in prediction.lower() for answer in answers))
