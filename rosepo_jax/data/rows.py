"""What prepared data look like in memory: interactions in order, and the rows of a split made from them."""

import dataclasses
from typing import Any

import numpy as np

# windows: every step of the test users that training and validation leave alone (config.data.windows); else no rows
SPLITS = ("train", "held_out", "validation", "test", "windows")


@dataclasses.dataclass(frozen=True, eq=False)
class Events:
    """Interactions sorted by user and, within a user, in time. position: 0-based place in the user's sequence."""

    user_E: np.ndarray
    item_E: np.ndarray
    timestamp_E: np.ndarray
    position_E: np.ndarray
    length_E: np.ndarray  # of the user's sequence
    role_E: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one split: what is predicted from what.

    user_E, position_E: int32; the target is item number `position` (0-based) of the user's sequence.
    history_ExN: int32, the last N items before it, oldest first, right-padded with -1.
    target_E: int32. candidates_ExC: int32, the target and C-1 other items.
    """

    user_E: np.ndarray
    position_E: np.ndarray
    history_ExN: np.ndarray
    target_E: np.ndarray
    candidates_ExC: np.ndarray

    def __len__(self) -> int:
        return len(self.user_E)

    def take(self, indices: Any) -> "Rows":
        """The rows of `indices` (numbers or a mask), in that order."""
        return Rows(*(getattr(self, field.name)[indices] for field in dataclasses.fields(self)))
