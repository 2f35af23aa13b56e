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
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4]), st.sampled_from([10, 250, 2000]))
def test_every_batch_of_the_sample_fits_and_the_last_layout_takes_anything(seed, unit, updates):
    generator = np.random.default_rng(seed)
    prompt_SxB, fed_SxB = lengths(generator, 20, 16)
    limit = Part(16, 64, 12)
    found = layouts.choose(prompt_SxB, fed_SxB, unit=unit, updates=updates, limit=limit)
    assert 1 <= len(found) <= 4 and found[-1] == (limit,)
    for layout in found:
        assert sum(part.rows for part in layout) == 16
        assert all(part.rows % unit == 0 for part in layout)
        assert len(layout) <= min(layouts.MOST_PARTS, 1 + updates // layouts.UPDATES_PER_PART)
    for prompt_B, fed_B in zip(prompt_SxB, fed_SxB):
        layout, order_B = layouts.fitting(found, prompt_B, fed_B)
        assert layout in found[:-1] and sorted(order_B) == list(range(16))
    assert layouts.fitting(found, np.full(16, 64), np.full(16, 12))[0] == (limit,)
    longer = np.append(prompt_SxB[0, 1:], 42)  # than any of the sample
    assert sum(part.tokens for part in layouts.fitting(found, longer, fed_SxB[0])[0]) <= 16 * (50 + 8)
    with pytest.raises(ValueError, match="fit no layout"):
        layouts.fitting(found, np.full(16, 65), np.full(16, 12))


def test_parts_are_added_while_they_pay():
    """A third of short prompts: one part wastes a quarter, two parts next to nothing; short runs keep one."""
    prompt_SxB = np.tile(np.repeat([20, 80], [32, 64]), (4, 1))
    fed_SxB = np.ones_like(prompt_SxB)
    limit = Part(96, 128, 4)
    two = (Part(32, 20, 1), Part(64, 80, 1))
    assert layouts.choose(prompt_SxB, fed_SxB, unit=2, updates=100, limit=limit)[0] == two
    assert layouts.choose(prompt_SxB, fed_SxB, unit=2, updates=99, limit=limit)[0] == (Part(96, 80, 1),)
    # On 64 devices a part of the short prompts would hold too few tokens for each.
    assert layouts.choose(prompt_SxB, fed_SxB, unit=32, updates=100, limit=limit)[0] == (Part(96, 80, 1),)


def rows(generator, B=12, R=3, T=6):
    prompts = [generator.integers(2, 90, n).tolist() for n in generator.integers(1, 30, B)]
    mask_BxRxT = np.arange(T) < generator.integers(1, T + 1, (B, R, 1))
    response_BxRxT = np.where(mask_BxRxT, generator.integers(2, 90, (B, R, T)), 0).astype(np.int32)
    return Encoded(prompts, response_BxRxT, mask_BxRxT, {"row_B": np.arange(B)})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_a_batch_holds_every_row_once_with_all_its_tokens(seed):
    generator = np.random.default_rng(seed)
    encoded = rows(generator)
    B, R, T = encoded.response_BxRxT.shape
    sizes = [4, 8] if seed % 2 else [12]
    batch = layouts.lay_out([tuple(Part(size, 32, R * (T - 1)) for size in sizes)], encoded, pad_id=1)
    assert sorted(batch["row_B"]) == list(range(B))
    assert [len(part["prompt_BxP"]) for part in batch["parts"]] == sizes
    b = 0
    for part in batch["parts"]:
        for prompt_P, mask_P, response_RxT, mask_RxT, fed_Q in zip(*part.values()):
            row = batch["row_B"][b]
            assert prompt_P[mask_P].tolist() == encoded.prompts[row] and (prompt_P[~mask_P] == 1).all()
            np.testing.assert_array_equal(response_RxT, encoded.response_BxRxT[row])
            fed = [r * (T - 1) + t for r in range(R) for t in range(T - 1) if mask_RxT[r, t + 1]]
            assert fed_Q.tolist() == fed + [R * (T - 1)] * (len(fed_Q) - len(fed))
            np.testing.assert_array_equal(batch["count_BxR"][b], mask_RxT.sum(axis=1))
            b += 1
    processed, useful = layouts.tokens(batch)
    assert processed == sum(size * (32 + R * (T - 1)) for size in sizes)
    assert useful == sum(map(len, encoded.prompts)) + encoded.response_mask_BxRxT[:, :, 1:].sum()


def test_the_longest_rows_stand_in_the_last_part():
    encoded = rows(np.random.default_rng(3))
    total = np.array([p + q for p, q in zip(*encoded.lengths)])
    batch = layouts.lay_out([(Part(4, 29, 15), Part(8, 29, 15))], encoded, pad_id=1)
    assert (np.diff(total[batch["row_B"]]) >= 0).all()
