"""What a model answered, whoever the model is: the one form that every protocol produces and every metric reads."""

import dataclasses

import numpy as np

NOT_AN_ITEM = -1  # an answer that names no item of the catalogue
NO_ANSWER = -2  # the list ended before this place


@dataclasses.dataclass(frozen=True)
class Answers:
    """One model's answers to the E rows of a protocol.

    ranked_ExK: items, best first; NOT_AN_ITEM and NO_ANSWER where there is none.
    score_ExK: their scores, NaN where the model gave none.
    certified_E: bool; catalogue: this list is proved to equal that of scoring every title.
    full_score_ExC: candidates: the scores in the order of the row's list.
    text, status: free answers, and what became of each (`matching.STATUSES`).
    ambiguous_E: bool; the answered title belongs to several items.
    substring_E: slot of the only candidate whose title stands in the text, -1 for none or several (`matching`).
    """

    ranked_ExK: np.ndarray
    score_ExK: np.ndarray
    certified_E: np.ndarray | None = None
    full_score_ExC: np.ndarray | None = None
    text: list[str] | None = None
    status: list[str] | None = None
    ambiguous_E: np.ndarray | None = None
    substring_E: np.ndarray | None = None
