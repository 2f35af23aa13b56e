"""Rows and texts as model inputs: the one place where histories and responses become padded id arrays."""

from collections.abc import Sequence

import numpy as np

from rosepo_jax import distributed
from rosepo_jax.data import layouts
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.prompts import Encoder, pad

# Widths that are padded to in scoring and decoding: few, so that few programs are compiled.
WIDTHS = [8 * step for k in range(12) for step in (2 * 2**k, 3 * 2**k)]  # 16 24 32 48 64 96 ...


class TitleTable:
    """Ids of every catalogue title with its EOS: tokens_IxT, mask_IxT (right-padded), length_I."""

    def __init__(self, encoder: Encoder, titles: Sequence[str]):
        self.ids = encoder.response_ids(titles)
        self.length_I = np.array([len(ids) for ids in self.ids], np.int32)
        self.tokens_IxT, self.mask_IxT = pad(self.ids, int(self.length_I.max()), encoder.pad)

    def take(self, items_BxR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of catalogue items and their mask, both [B, R, T]."""
        return self.tokens_IxT[items_BxR], self.mask_IxT[items_BxR]


def width(longest: int, widths: Sequence[int], limit: int) -> int:
    """The smallest of `widths` that holds `longest`, at most `limit` (which `longest` never exceeds)."""
    return min(next((w for w in widths if w >= longest), limit), limit)


def titles_of(catalogue: Catalogue, items_BxN: np.ndarray) -> list[list[str]]:
    """Titles of each row's items; -1 is padding."""
    return [[catalogue.titles[item] for item in row if item >= 0] for row in items_BxN]


def prompt_texts(encoder: Encoder, catalogue: Catalogue, history_BxN, candidates_BxC) -> list[str]:
    candidates = titles_of(catalogue, candidates_BxC) if encoder.template.uses_candidates else None
    return encoder.prompt_texts(titles_of(catalogue, history_BxN), candidates)


def responses(encoder: Encoder, texts_BxR: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of response texts and their mask [B, R, T], T the encoder's limit; every row has the same number R."""
    ids = encoder.response_ids([text for row in texts_BxR for text in row])
    tokens, mask = pad(ids, encoder.response_length, encoder.pad)
    shape = (len(texts_BxR), len(texts_BxR[0]), -1)
    return tokens.reshape(shape), mask.reshape(shape)


def prompts(encoder: Encoder, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """prompt_BxP and prompt_mask_BxP of this host's rendered prompts, for decoding; as wide on every host."""
    ids = encoder.prompt_ids(texts)
    (longest,) = distributed.agreed([max(map(len, ids))])
    length = width(longest, WIDTHS, encoder.prompt_length)
    tokens_BxP, mask_BxP = pad(ids, length, encoder.pad)
    return {"prompt_BxP": tokens_BxP, "prompt_mask_BxP": mask_BxP}


def scored(encoder: Encoder, texts: Sequence[str], response_BxRxT, response_mask_BxRxT) -> dict[str, np.ndarray]:
    """This host's prompts with their responses as one part of a batch, for scoring; as wide on every host."""
    ids = encoder.prompt_ids(texts)
    R, T = response_BxRxT.shape[1:]
    longest, fed = distributed.agreed([max(map(len, ids)), int(response_mask_BxRxT[:, :, 1:].sum(axis=(1, 2)).max())])
    P = width(longest, WIDTHS, encoder.prompt_length)
    Q = width(fed, WIDTHS, R * (T - 1))
    return layouts.padded(ids, response_BxRxT, response_mask_BxRxT, P, Q, encoder.pad)
