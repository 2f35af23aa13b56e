"""Do candidate lists betray their target? Two predictors that never read a history must stay at chance.

Each remembers, for every item, the first list in which that item was the target:

- negatives: picks the candidate whose remembered list shares most items with the present one;
- slot: picks a candidate that stands where it stood in its remembered list.

Lists seeded by their target are found out. Source: the predictors are our own; the sample lists that come with S-DPO
(arXiv 2406.09215) are such lists: taught by their train lists, the first predictor is right on .79 of their test rows.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from rosepo_jax.data.columns import by_blocks

if TYPE_CHECKING:
    from rosepo_jax.data.rows import Rows

BLOCK = 1 << 13  # pairs of lists compared at a time: they stay in the cache


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
    known = np.flatnonzero(first_I[test.target_E] >= 0)
    if not len(known):
        return {"same": None, "other": None}
    twin_E = first_I[test.target_E[known]]
    shared: dict[str, float | None] = {}
    for name, row_E in (("same", twin_E), ("other", np.roll(twin_E, 1))):

        def count(block: slice) -> int:
            ours, theirs = test.take(known[block]), memory.take(row_E[block])  # noqa: B023
            theirs_ExC = np.where(theirs.candidates_ExC == theirs.target_E[:, None], -1, theirs.candidates_ExC)
            ours_ExC = np.where(ours.candidates_ExC == ours.target_E[:, None], -2, ours.candidates_ExC)
            return int(_shared(ours_ExC, theirs_ExC).sum())

        shared[name] = sum(by_blocks(count, len(known), BLOCK)) / len(known)
    return shared


def _shared(one_ExC: np.ndarray, other_ExC: np.ndarray) -> np.ndarray:
    """int64_E: how many items two lists of distinct items share. Rows stand last, so that a comparison is one loop."""
    other_CxE = np.ascontiguousarray(other_ExC.T)
    shared_E = np.zeros(len(one_ExC), np.int64)
    for item_E in np.ascontiguousarray(one_ExC.T):
        shared_E += (other_CxE == item_E).any(0)
    return shared_E


def memoriser(memory: "Rows", test: "Rows") -> dict[str, Any]:
    """HR@1 of picking the candidate whose remembered list overlaps the rest of the present one most; see `_verdict`."""
    first_I = _first_row(memory, test)
    item = np.flatnonzero(first_I >= 0)
    place_I = np.full(len(first_I), -1)
    place_I[item] = np.arange(len(item))
    remembered = memory.candidates_ExC[first_I[item]]
    score_ExC = np.zeros(test.candidates_ExC.shape)

    def score(block: slice) -> None:
        present_ExC = test.candidates_ExC[block]
        row, slot = np.nonzero(place_I[present_ExC] >= 0)
        # Each remembered list holds its own target too, which adds one to every score.
        score_ExC[block][row, slot] = _shared(remembered[place_I[present_ExC[row, slot]]], present_ExC[row])

    by_blocks(score, len(test), BLOCK // test.candidates_ExC.shape[1])
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
