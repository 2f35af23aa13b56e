"""The frozen preference oracle as the other rooms use it: scores of items after a history."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from rosepo_jax.data import batches
from rosepo_jax.errors import UserError
from rosepo_jax.models import sasrec

BLOCK = 512  # rows scored at a time


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A SASRec-type scorer with the temperature tau that calibrates its score gaps (fitted on validation)."""

    config: sasrec.SASRecConfig
    params: sasrec.Params
    tau: float

    @classmethod
    def load(cls, directory: pathlib.Path) -> "Oracle":
        config, params, facts = sasrec.load(directory)
        if "tau" not in facts:
            raise UserError(f"{directory / 'config.json'}: tau is missing; run `rosepo oracle` again")
        return cls(config, params, facts["tau"])

    def scores(self, history_ExN: np.ndarray, item_ExC: np.ndarray) -> np.ndarray:
        """Scores [E, C] float32 of some items after each history."""
        found = np.zeros(item_ExC.shape, np.float32)
        for block, real in batches.blocks(len(history_ExN), BLOCK):
            score_BxI = np.asarray(_scores(self.config, self.params, jnp.asarray(history_ExN[block])))
            found[block[real]] = np.take_along_axis(score_BxI, item_ExC[block], axis=1)[real]
        return found


@functools.partial(jax.jit, static_argnums=0)
def _scores(config, params, history_BxN):
    return sasrec.scores(config, params, history_BxN)
