"""Padded arrays: what is real, to what width, and that nothing else changes."""

import itertools
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosepo_jax.data import examples
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.prompts import pad

EOS = 1


class Letters:
    """An encoder of one token a character: id = code point, EOS 1, pad 1."""

    eos = pad = EOS
    prompt_length, response_length = 100, 12
    template = types.SimpleNamespace(uses_candidates=True)

    def prompt_ids(self, texts):
        return [[2, *map(ord, text)] for text in texts]

    def response_ids(self, texts):
        return [[*map(ord, text), EOS] for text in texts]

    def prompt_texts(self, histories, candidates):
        return [" > ".join(h) + " ? " + ", ".join(c) for h, c in zip(histories, candidates)]


@given(st.lists(st.lists(st.integers(2, 99), max_size=6), min_size=1, max_size=5), st.integers(6, 9))
def test_pad_keeps_every_row(rows, length):
    tokens, mask = pad(rows, length, EOS)
    assert tokens.shape == mask.shape == (len(rows), length)
    assert tokens.dtype == np.int32 and mask.dtype == bool
    assert [t[m].tolist() for t, m in zip(tokens, mask)] == rows
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()  # right-padded
    assert (tokens[~mask] == EOS).all()


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_width_holds_the_longest_within_the_limit(longest, limit):
    limit = max(longest, limit)
    found = examples.width(longest, examples.WIDTHS, limit)
    assert longest <= found <= limit
    assert found in examples.WIDTHS or found == limit
    assert all(w < longest or w >= found for w in examples.WIDTHS)


def test_widths_grow_by_at_most_a_half():
    assert all(1 < b / a <= 1.5 for a, b in itertools.pairwise(examples.WIDTHS))


def test_prompts():
    batch = examples.prompts(Letters(), ["a", "b" * 19])
    assert batch["prompt_BxP"].shape == (2, 24)
    assert batch["prompt_mask_BxP"].sum(axis=1).tolist() == [2, 20]
    assert batch["prompt_BxP"][0, :2].tolist() == [2, ord("a")]
    assert examples.prompts(Letters(), ["b" * 99])["prompt_BxP"].shape == (1, 100)


def test_responses_keep_rows_and_their_order():
    texts = [["a", "bcd", "e"], ["fg", "h", "abcdefg"]]
    tokens_BxRxT, mask_BxRxT = examples.responses(Letters(), texts)
    assert tokens_BxRxT.shape == mask_BxRxT.shape == (2, 3, 12)
    for b, row in enumerate(texts):
        for r, text in enumerate(row):
            assert tokens_BxRxT[b, r][mask_BxRxT[b, r]].tolist() == [*map(ord, text), EOS]


def test_titles_are_those_taken():
    table = examples.TitleTable(Letters(), ["a", "bcd", "abcdefghijk"])
    assert table.length_I.tolist() == [2, 4, 12]
    tokens_BxRxT, mask_BxRxT = table.take(np.array([[2, 0, 1]]))
    assert tokens_BxRxT.shape == mask_BxRxT.shape == (1, 3, 12)
    assert [t[m].tolist() for t, m in zip(tokens_BxRxT[0], mask_BxRxT[0])] == [table.ids[item] for item in (2, 0, 1)]


def test_scored_prompts_and_responses_are_padded_to_few_widths():
    part = examples.scored(Letters(), ["a", "b" * 19], *examples.responses(Letters(), [["a", "bcd"], ["fg", "h"]]))
    assert part["prompt_BxP"].shape == (2, 24) and part["response_BxRxT"].shape == (2, 2, 12)
    assert part["fed_BxQ"].tolist() == [[0, 11, 12, 13] + [22] * 12, [0, 1, 11] + [22] * 13]


@pytest.mark.parametrize("uses", [True, False])
def test_prompt_texts_name_history_and_candidates(uses):
    catalogue = Catalogue(("x", "y", "z"), ("Argo", "Skyfall", "Lincoln"), ((),) * 3, np.zeros(3, np.int64))
    encoder = Letters()
    encoder.template = types.SimpleNamespace(uses_candidates=uses)
    encoder.prompt_texts = lambda histories, candidates: [histories, candidates]
    histories, candidates = examples.prompt_texts(encoder, catalogue, np.array([[2, 0, -1]]), np.array([[1, 2]]))
    assert histories == [["Lincoln", "Argo"]]
    assert candidates == ([["Skyfall", "Lincoln"]] if uses else None)
