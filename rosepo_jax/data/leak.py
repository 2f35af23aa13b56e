"""Do candidate lists betray their target? Two predictors that never read a history must stay at chance.

Each remembers, for every item, the first list in which that item was the target:

- negatives: picks the candidate whose remembered list shares most items with the present one;
- slot: picks a candidate that stands where it stood in its remembered list.

Lists seeded by their target are found out. Source: the predictors are our own; the sample lists that come with S-DPO
(arXiv 2406.09215) are such lists: taught by their train lists, the first predictor is right on .79 of their test rows.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rosepo_jax.data.rows import Rows

BLOCK = 1 << 22  # comparisons made at a time, to bound memory


def check(rows: dict[str, "Rows"]) -> dict[str, Any]:
    """Both memorisers, taught by the train and by the validation lists and tested on the test lists; any `flagged`?

    `overlap` says why: how many other candidates two lists share, of the same target and of different ones.
    `slots`: how often the rarest and the most frequent slot hold the target of a test row.
    """
    test = rows["test"]
    found = {
        name: {"negatives": memoriser(rows[name], test), "slot": slot_memoriser(rows[name], test)}
        for name in ("train", "validation")
    }
    flagged = any(probe["flagged"] for probes in found.values() for probe in probes.values())
    slot_C = np.bincount(
        (test.candidates_ExC == test.target_E[:, None]).argmax(1), minlength=test.candidates_ExC.shape[1]
    )
    return {
        "flagged": flagged,
        **{name: {**probes, "overlap": overlap(rows[name], test)} for name, probes in found.items()},
        "slots": {"fewest": int(slot_C.min()), "most": int(slot_C.max())},
    }


def overlap(memory: "Rows", test: "Rows") -> dict[str, float | None]:
    """Mean number of candidates, targets apart, that a test list shares with a list of `memory`.

    `same`: with the first list of the same target; `other`: with that of the next test row's target, which is chance.
    """
    first_I = _first_row(memory, test)
    known = test.take(first_I[test.target_E] >= 0)
    if not len(known):
        return {"same": None, "other": None}
    twin_E = first_I[known.target_E]
    shared: dict[str, float | None] = {}
    for name, row_E in (("same", twin_E), ("other", np.roll(twin_E, 1))):
        lists = memory.take(row_E)
        theirs_ExC = np.where(lists.candidates_ExC == lists.target_E[:, None], -1, lists.candidates_ExC)
        ours_ExC = np.where(known.candidates_ExC == known.target_E[:, None], -2, known.candidates_ExC)
        shared[name] = float((ours_ExC[:, :, None] == theirs_ExC[:, None, :]).sum((1, 2)).mean())
    return shared


def memoriser(memory: "Rows", test: "Rows") -> dict[str, Any]:
    """HR@1 of picking the candidate whose remembered list overlaps the rest of the present one most; see `_verdict`."""
    first_I = _first_row(memory, test)
    remembered_MxC = np.sort(memory.candidates_ExC, axis=1)
    n_items = len(first_I)
    # One sorted array of (row of memory, item) makes every overlap a look-up.
    key = (np.arange(len(remembered_MxC))[:, None] * n_items + remembered_MxC).ravel()
    score_ExC = np.zeros(test.candidates_ExC.shape)
    size = test.candidates_ExC.shape[1]
    step = max(1, BLOCK // (size * size))
    for start in range(0, len(test), step):
        present_ExC = test.candidates_ExC[start : start + step].astype(np.int64)
        wanted = first_I[present_ExC][:, :, None] * n_items + present_ExC[:, None, :]
        hit = key[np.searchsorted(key, wanted).clip(max=len(key) - 1)] == wanted
        hit[:, np.arange(size), np.arange(size)] = False  # every remembered list holds its own target
        score_ExC[start : start + step] = hit.sum(2)
    return _verdict(score_ExC, test, first_I)


def slot_memoriser(memory: "Rows", test: "Rows") -> dict[str, Any]:
    """HR@1 of picking a candidate in its remembered slot."""
    first_I = _first_row(memory, test)
    slot_M = (memory.candidates_ExC == memory.target_E[:, None]).argmax(1)
    score_ExC = slot_M[first_I[test.candidates_ExC]] == np.arange(test.candidates_ExC.shape[1])
    return _verdict(score_ExC.astype(float), test, first_I)


def _first_row(memory: "Rows", test: "Rows") -> np.ndarray:
    """int64_I: the first row of `memory` with each item as its target, -1 where there is none."""
    n_items = 1 + max(int(rows.candidates_ExC.max(initial=-1)) for rows in (memory, test))
    first_I = np.full(n_items, -1, np.int64)
    first_I[memory.target_E[::-1]] = np.arange(len(memory))[::-1]
    return first_I


def _verdict(score_ExC: np.ndarray, test: "Rows", first_I: np.ndarray) -> dict[str, Any]:
    """HR@1 of the best scored candidate against chance, over the n rows whose target is remembered.

    Only remembered candidates compete, so that popularity (only popular items are remembered) does not count as a leak:
    chance is the mean of 1 / their number, which is 1 / C when all are. Ties share the hit. Flagged above
    bound = chance + 3 standard errors of chance.
    """
    test_E = first_I[test.target_E] >= 0
    known_ExC = first_I[test.candidates_ExC[test_E]] >= 0
    n = len(known_ExC)
    if not n:
        return {"HR@1": 0.0, "chance": 0.0, "bound": 0.0, "n": 0, "flagged": False}
    score_ExC = np.where(known_ExC, score_ExC[test_E], -1.0)
    best_ExC = score_ExC == score_ExC.max(1, keepdims=True)
    target_ExC = test.candidates_ExC[test_E] == test.target_E[test_E, None]
    rate = float(((best_ExC & target_ExC).sum(1) / best_ExC.sum(1)).mean())
    chance_E = 1 / known_ExC.sum(1)
    chance = float(chance_E.mean())
    bound = chance + 3 * float(np.sqrt((chance_E * (1 - chance_E)).sum())) / n
    return {"HR@1": rate, "chance": chance, "bound": bound, "n": n, "flagged": rate > bound}
