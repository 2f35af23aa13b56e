"""Rows and texts as model inputs: the one place where histories and responses become padded id arrays."""

from collections.abc import Sequence

import numpy as np

from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.prompts import Encoder, pad

# Widths that batches are padded to: few, so that few programs are compiled, and close enough to waste little.
PROMPT_WIDTHS = [8 * step for k in range(12) for step in (2 * 2**k, 3 * 2**k)]  # 16 24 32 48 64 96 ...
RESPONSE_WIDTHS = [2**k for k in range(1, 12)]


class TitleTable:
    """Ids of every catalogue title with its EOS: tokens_IxT, mask_IxT (right-padded), length_I."""

    def __init__(self, encoder: Encoder, titles: Sequence[str]):
        self.ids = encoder.response_ids(titles)
        self.length_I = np.array([len(ids) for ids in self.ids], np.int32)
        self.tokens_IxT, self.mask_IxT = pad(self.ids, int(self.length_I.max()), encoder.pad)

    def take(self, items_BxR: np.ndarray) -> dict[str, np.ndarray]:
        """response_BxRxT and response_mask_BxRxT of catalogue items, cut to the longest title among them."""
        length = width(int(self.length_I[items_BxR].max()), RESPONSE_WIDTHS, self.tokens_IxT.shape[1])
        return {
            "response_BxRxT": self.tokens_IxT[items_BxR, :length],
            "response_mask_BxRxT": self.mask_IxT[items_BxR, :length],
        }


def width(longest: int, widths: Sequence[int], limit: int) -> int:
    """The smallest of `widths` that holds `longest`, at most `limit` (which `longest` never exceeds)."""
    return min(next((w for w in widths if w >= longest), limit), limit)


def titles_of(catalogue: Catalogue, items_BxN: np.ndarray) -> list[list[str]]:
    """Titles of each row's items; -1 is padding."""
    return [[catalogue.titles[item] for item in row if item >= 0] for row in items_BxN]


def prompt_texts(encoder: Encoder, catalogue: Catalogue, history_BxN, candidates_BxC) -> list[str]:
    candidates = titles_of(catalogue, candidates_BxC) if encoder.template.uses_candidates else None
    return encoder.prompt_texts(titles_of(catalogue, history_BxN), candidates)


def prompts(encoder: Encoder, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """prompt_BxP and prompt_mask_BxP of rendered prompts."""
    ids = encoder.prompt_ids(texts)
    length = width(max(map(len, ids)), PROMPT_WIDTHS, encoder.prompt_length)
    tokens_BxP, mask_BxP = pad(ids, length, encoder.pad)
    return {"prompt_BxP": tokens_BxP, "prompt_mask_BxP": mask_BxP}


def responses(encoder: Encoder, texts_BxR: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """response_BxRxT and response_mask_BxRxT of response texts; every row has the same number R."""
    R = len(texts_BxR[0])
    ids = encoder.response_ids([text for row in texts_BxR for text in row])
    length = width(max(map(len, ids)), RESPONSE_WIDTHS, encoder.response_length)
    tokens, mask = pad(ids, length, encoder.pad)
    return {
        "response_BxRxT": tokens.reshape(len(texts_BxR), R, -1),
        "response_mask_BxRxT": mask.reshape(len(texts_BxR), R, -1),
    }
