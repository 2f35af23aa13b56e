"""Layouts: every batch fits one, rows are kept, little is padding, and few programs come of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosepo_jax.data import layouts
from rosepo_jax.data.layouts import Encoded, Part


@given(st.integers(1, 5000))
def test_widths_hold_the_longest_and_waste_at_most_a_sixteenth(longest):
    found = layouts.width(longest)
    assert longest <= found < longest * 17 / 16 + 1
    assert layouts.width(found) == found


def test_widths_are_few_and_round_where_they_are_large():
    assert [layouts.width(n) for n in (1, 2, 21, 32, 33, 64, 65, 200, 257, 500)] == [
        1, 2, 21, 32, 34, 64, 68, 200, 272, 512,
    ]  # fmt: skip
    assert len({layouts.width(n) for n in range(33, 1025)}) == 5 * 16


def lengths(generator, S, B):
    """Prompts of 5 to 40 tokens, most of them full; responses of 1 to 6 tokens."""
    prompt_SxB = np.minimum(generator.integers(5, 120, (S, B)), 40)
    return prompt_SxB, generator.integers(1, 7, (S, B))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), st.sampled_from([10, 250, 2000]))
def test_every_batch_of_the_sample_fits_and_the_last_layout_takes_anything(seed, shares, accumulate, updates):
    generator = np.random.default_rng(seed)
    prompt_SxGxB, fed_SxGxB = (x.reshape(20, shares, 16) for x in lengths(generator, 20 * shares, 16))
    limit = Part(16, 64, 12)
    found = layouts.choose(prompt_SxGxB, fed_SxGxB, accumulate=accumulate, updates=updates, limit=limit)
    assert 1 <= len(found) <= 4 and found[-1] == (limit,)
    for layout in found:
        assert sum(part.rows for part in layout) == 16
        assert all(part.rows % accumulate == 0 for part in layout)
        assert len(layout) <= min(layouts.MOST_PARTS, 1 + updates // layouts.UPDATES_PER_PART)
    for prompt_GxB, fed_GxB in zip(prompt_SxGxB, fed_SxGxB):
        number = layouts.first_fit(found, prompt_GxB, fed_GxB)
        assert number < len(found) - 1
        # What some shares need, the later layouts hold too: hosts agree on the last that one of them needs.
        for later in range(number, len(found)):
            assert layouts.first_fit(found[later:], prompt_GxB, fed_GxB) == 0
    assert layouts.first_fit(found, np.full((1, 16), 64), np.full((1, 16), 12)) == len(found) - 1
    longer = np.append(prompt_SxGxB[0, :1, 1:], [[42]], axis=1)  # than any of the sample
    assert sum(p.tokens for p in found[layouts.first_fit(found, longer, fed_SxGxB[0, :1])]) <= 16 * (50 + 8)
    with pytest.raises(ValueError, match="fit no layout"):
        layouts.first_fit(found, np.full((1, 16), 65), np.full((1, 16), 12))


def test_parts_are_added_while_they_pay():
    """A third of short prompts: one part wastes a quarter, two parts next to nothing; short runs keep one."""
    prompt_SxB = np.tile(np.repeat([20, 80], [32, 64]), (4, 1))

    def first(shares, updates=100):
        prompt_SxGxB = prompt_SxB.reshape(4, -1, shares).swapaxes(1, 2)
        limit = Part(96 // shares, 128, 4)
        return layouts.choose(prompt_SxGxB, np.ones_like(prompt_SxGxB), accumulate=1, updates=updates, limit=limit)[0]

    assert first(2) == (Part(16, 20, 1), Part(32, 80, 1))
    assert first(2, updates=99) == (Part(48, 80, 1),)
    # On 32 devices a part of the short prompts would hold too few tokens for each.
    assert first(32) == (Part(3, 80, 1),)


def rows(generator, B=12, R=3, T=6):
    prompts = [generator.integers(2, 90, n).tolist() for n in generator.integers(1, 30, B)]
    mask_BxRxT = np.arange(T) < generator.integers(1, T + 1, (B, R, 1))
    response_BxRxT = np.where(mask_BxRxT, generator.integers(2, 90, (B, R, T)), 0).astype(np.int32)
    return Encoded(prompts, response_BxRxT, mask_BxRxT, {"row_B": np.arange(B)})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2]))
def test_a_batch_holds_every_row_once_with_all_its_tokens(seed, shares):
    generator = np.random.default_rng(seed)
    encoded = rows(generator)
    B, R, T = encoded.response_BxRxT.shape
    sizes = [4, 8] if seed % 2 else [12]  # of both shares together
    layout = tuple(Part(size // shares, 32, R * (T - 1)) for size in sizes)
    batch = layouts.lay_out(layout, encoded, 1, shares)
    assert sorted(batch["row_B"]) == list(range(B))
    assert (batch["row_B"].reshape(shares, -1) // (B // shares) == np.arange(shares)[:, None]).all()
    assert [len(part["prompt_BxP"]) for part in batch["parts"]] == sizes
    first = 0
    for part in batch["parts"]:
        size = len(part["prompt_BxP"]) // shares
        for place, (prompt_P, mask_P, response_RxT, mask_RxT, fed_Q) in enumerate(zip(*part.values())):
            b = place // size * (B // shares) + first + place % size  # rows stand share by share
            row = batch["row_B"][b]
            assert prompt_P[mask_P].tolist() == encoded.prompts[row] and (prompt_P[~mask_P] == 1).all()
            np.testing.assert_array_equal(response_RxT, encoded.response_BxRxT[row])
            fed = [r * (T - 1) + t for r in range(R) for t in range(T - 1) if mask_RxT[r, t + 1]]
            assert fed_Q.tolist() == fed + [R * (T - 1)] * (len(fed_Q) - len(fed))
            np.testing.assert_array_equal(batch["count_BxR"][b], mask_RxT.sum(axis=1))
        first += size
    processed, useful = layouts.tokens(batch)
    assert processed == sum(size * (32 + R * (T - 1)) for size in sizes)
    assert useful == sum(map(len, encoded.prompts)) + encoded.response_mask_BxRxT[:, :, 1:].sum()


def test_the_longest_rows_stand_in_the_last_part():
    encoded = rows(np.random.default_rng(3))
    total = np.array([p + q for p, q in zip(*encoded.lengths)])
    batch = layouts.lay_out((Part(4, 29, 15), Part(8, 29, 15)), encoded, pad_id=1)
    assert (np.diff(total[batch["row_B"]]) >= 0).all()
