"""Free text to items: exact matches only; what an answer is when it is none; the literature's substring rule apart."""

from collections.abc import Sequence

import numpy as np

from rosepo_jax.data.catalogue import Catalogue, normalise
from rosepo_jax.data.rows import Rows
from rosepo_jax.evaluation.answers import NOT_AN_ITEM, Answers

# The first that applies, from the right; only the first of them is an answer to the question.
STATUSES = ("candidate", "not_a_candidate", "history_copy", "not_in_catalogue", "empty", "truncated")


class TitleIndex:
    """Which item a text names: the one whose normalised title equals the text's normalised first line."""

    def __init__(self, catalogue: Catalogue):
        self._item_of: dict[str, int] = {}
        for item, title in enumerate(catalogue.titles):
            self._item_of.setdefault(normalise(title), item)
        self._size_I = np.bincount(catalogue.title_group_I, minlength=len(catalogue))[catalogue.title_group_I]

    def item(self, text: str) -> int:
        """The lowest item with that title, or NOT_AN_ITEM."""
        return self._item_of.get(first_line(text), NOT_AN_ITEM)

    def is_ambiguous(self, item: int) -> bool:
        """Whether other items have the same title: the answer names all of them, and is right for any."""
        return item >= 0 and self._size_I[item] > 1


def first_line(text: str) -> str:
    """The normalised first line; an answer goes no further."""
    return normalise(text.partition("\n")[0])


def read(texts: Sequence[str], ended_E: Sequence[bool] | np.ndarray, catalogue: Catalogue, rows: Rows) -> Answers:
    """Answers (K = 1) from one text a row; ended_E: whether the text ended by itself. A line end ends an answer too.

    What was cut off is no answer, also where its beginning happens to be a title.
    """
    index = TitleIndex(catalogue)
    whole_E = [bool(ended) or "\n" in text for text, ended in zip(texts, ended_E, strict=True)]
    item_E = np.array([index.item(text) if whole else NOT_AN_ITEM for text, whole in zip(texts, whole_E)], np.int64)
    return Answers(
        ranked_ExK=item_E[:, None],
        score_ExK=np.full((len(texts), 1), np.nan),
        text=list(texts),
        status=[_status(e, *answer, catalogue, rows) for e, answer in enumerate(zip(texts, whole_E, item_E))],
        ambiguous_E=np.array([index.is_ambiguous(item) for item in item_E], bool),
        substring_E=np.array([substring(text, catalogue, rows.candidates_ExC[e]) for e, text in enumerate(texts)]),
    )


def _status(row: int, text: str, whole: bool, item: int, catalogue: Catalogue, rows: Rows) -> str:
    if not whole:
        return "truncated"
    if not first_line(text):
        return "empty"
    if item < 0:
        return "not_in_catalogue"
    group_I, history = catalogue.title_group_I, rows.history_ExN[row]
    if group_I[item] in group_I[history[history >= 0]]:
        return "history_copy"
    return "candidate" if group_I[item] in group_I[rows.candidates_ExC[row]] else "not_a_candidate"


def substring(text: str, catalogue: Catalogue, candidates_C: np.ndarray) -> int:
    """The slot of the only candidate whose title stands anywhere in the first line; -1 for none or several.

    This is how the literature scores free answers, for comparison: a title that contains another candidate's can never
    be right, and one that stands inside a longer word is.
    Source:    as the released evaluation of LLaRA (arXiv 2312.02445) does it, lower-casing, first line.
    """
    line = text.partition("\n")[0].lower().strip()
    found = [slot for slot, item in enumerate(candidates_C) if catalogue.titles[item].lower().strip() in line]
    return found[0] if len(found) == 1 else -1
