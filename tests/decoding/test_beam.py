import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import (
    EOS,
    SMALL,
    VOCABULARY,
    ToyModel,
    assert_is,
    assert_sound,
    brute_force,
    pad_prompts,
    random_params,
    random_prompts,
    random_titles,
    same_shape,
    scored_by_decoder,
)

from rosepo_jax.decoding import beam
from rosepo_jax.decoding.beam import beam_search
from rosepo_jax.decoding.trie import compile_trie


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([2, 5, 40]), st.integers(0, 4))
def test_certified_rows_equal_brute_force(seed, count, beams, banned):
    rng = np.random.default_rng(seed)
    titles, params, k = random_titles(rng, count), random_params(rng, VOCABULARY), 4
    prompts = random_prompts(rng, 3)
    excluded = np.full((3, 4), -1, np.int32)
    excluded[:, :banned] = rng.integers(0, count, (3, banned))
    trie = same_shape(compile_trie(titles, EOS))
    result = beam_search(
        ToyModel(), params, trie, *pad_prompts(prompts, 8), beams=beams, k=k, excluded_BxX=jnp.asarray(excluded)
    )
    items, scores, certified = map(np.asarray, result)
    for row, prompt in enumerate(prompts):
        assert_sound(items[row], scores[row], prompt, params, titles, excluded[row])
        if certified[row]:
            assert_is(items[row], scores[row], brute_force(params, prompt, titles, excluded[row]))
    if beams >= count:
        assert certified.all()


def test_the_certificate_says_no_when_the_beam_misses_the_best():
    """A title that starts badly and goes on well loses to a greedy beam; more beams find it."""
    rng = np.random.default_rng(0)
    missed = exact = 0
    for _ in range(60):
        titles, params = random_titles(rng, 40), random_params(rng, VOCABULARY)
        prompts = random_prompts(rng, 4)
        arguments = (ToyModel(), params, same_shape(compile_trie(titles, EOS)), *pad_prompts(prompts, 8))
        items, _, certified = map(np.asarray, beam_search(*arguments, beams=2, k=3))
        for row, prompt in enumerate(prompts):
            right = items[row].tolist() == [item for item, _ in brute_force(params, prompt, titles)[:3]]
            assert right or not certified[row]
            missed += not right
            exact += bool(certified[row])
    assert missed > 20
    assert exact > 5


@pytest.mark.parametrize("beams", [1, 50])
@pytest.mark.parametrize("titles", SMALL.values(), ids=SMALL)
def test_small_catalogues(titles, beams):
    """Fewer titles than beams and than k."""
    params = random_params(np.random.default_rng(3), VOCABULARY)
    prompts = [[1, 2, 3], [5]]
    items, scores, certified = map(
        np.asarray,
        beam_search(ToyModel(), params, compile_trie(titles, EOS), *pad_prompts(prompts, 4), beams=beams, k=7),
    )
    for row, prompt in enumerate(prompts):
        assert_sound(items[row], scores[row], prompt, params, titles)
        if beams >= 3:
            assert certified[row]
        if certified[row]:
            assert_is(items[row], scores[row], brute_force(params, prompt, titles))


def test_everything_excluded_returns_nothing():
    titles = [[1, EOS], [2, 3, EOS], [1, EOS]]
    params = random_params(np.random.default_rng(0), VOCABULARY)
    excluded = jnp.array([[2, 1, 2]])
    arguments = (ToyModel(), params, compile_trie(titles, EOS), *pad_prompts([[1]], 2))
    items, scores, certified = map(np.asarray, beam_search(*arguments, beams=2, k=2, excluded_BxX=excluded))
    assert items.tolist() == [[-1, -1]]
    assert (scores == -np.inf).all()
    assert certified.all()


def test_excluded_items_take_no_beam():
    """With the nine best titles excluded, one beam still finds the tenth and proves it: it is the only one left."""
    rng = np.random.default_rng(1)
    titles = [[token, token, EOS] for token in range(1, 11)]
    params, prompts = random_params(rng, 11), [[3, 4]]
    order = [item for item, _ in brute_force(params, prompts[0], titles)]
    arguments = (ToyModel(), params, compile_trie(titles, EOS), *pad_prompts(prompts, 2))
    items, _, certified = beam_search(*arguments, beams=1, k=1, excluded_BxX=jnp.array([order[:9]]))
    assert items.tolist() == [[order[9]]]
    assert certified.all()


def test_ties_go_to_the_lower_item_and_are_never_certified_away():
    """A model without preferences: all titles of one length tie."""
    params = {"embedding": np.zeros((VOCABULARY, 2), np.float32), "head": np.zeros((2, VOCABULARY), np.float32)}
    titles = [[5, EOS], [4, EOS], [3, EOS], [2, EOS], [1, EOS]]
    arguments = (ToyModel(), params, compile_trie(titles, EOS), *pad_prompts([[1]], 2))
    wide, narrow = (beam_search(*arguments, beams=beams, k=3) for beams in (5, 3))
    assert wide.items_Bxk.tolist() == [[0, 1, 2]]
    assert wide.certified_B.all()
    np.testing.assert_allclose(wide.scores_Bxk, 2 * np.log(1 / VOCABULARY), rtol=1e-6)
    # The dropped prefixes [4] and [5] cost half of a title, so they might still have won.
    assert narrow.items_Bxk.tolist() == [[2, 3, 4]]
    assert not narrow.certified_B.any()


def test_rows_do_not_depend_on_batch_padding_or_devices():
    rng = np.random.default_rng(5)
    titles, params, prompts = random_titles(rng, 60, 12, 6), random_params(rng, 12), random_prompts(rng, 8, 12)
    trie = compile_trie(titles, EOS)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    rows = jax.NamedSharding(mesh, jax.P("batch"))

    def search(prompts, width, fill, sharding=None):
        batch = jax.device_put(pad_prompts(prompts, width, fill), sharding)
        return jax.tree.map(np.asarray, beam_search(ToyModel(), params, trie, *batch, beams=6, k=5))

    together = search(prompts, 6, 1)
    parts = [search([prompt], 17, 9) for prompt in prompts]
    apart = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    for other in (apart, search(prompts, 6, 1, rows)):
        np.testing.assert_array_equal(other.items_Bxk, together.items_Bxk)
        np.testing.assert_array_equal(other.certified_B, together.certified_B)
        np.testing.assert_allclose(other.scores_Bxk, together.scores_Bxk, rtol=1e-5)


def test_one_compilation_serves_many_batches():
    rng = np.random.default_rng(2)
    trie, params = compile_trie(random_titles(rng, 9), EOS), random_params(rng, VOCABULARY)
    beam_search.clear_cache()
    for _ in range(3):
        beam_search(ToyModel(), params, trie, *pad_prompts(random_prompts(rng, 2), 7), beams=2, k=2)
    assert beam_search._cache_size() == 1


@pytest.mark.parametrize("numbers", [{"beams": 0, "k": 1}, {"beams": 1, "k": 0}])
def test_refuses_no_beams_and_no_results(numbers):
    params = random_params(np.random.default_rng(0), VOCABULARY)
    with pytest.raises(ValueError, match="at least 1"):
        beam_search(ToyModel(), params, compile_trie([[1, EOS]], EOS), *pad_prompts([[1]], 2), **numbers)


def test_decoder_beams_equal_scoring_every_title():
    (lm, params, titles, prompts, mask), every_BxI = scored_by_decoder()
    order = np.argsort(-every_BxI, axis=1)[:, :4]
    wide, narrow = (beam_search(lm, params, compile_trie(titles, EOS), prompts, mask, beams=b, k=4) for b in (50, 8))
    assert wide.certified_B.all()
    np.testing.assert_array_equal(wide.items_Bxk, order)
    np.testing.assert_allclose(wide.scores_Bxk, np.take_along_axis(every_BxI, order, axis=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        narrow.scores_Bxk, np.take_along_axis(every_BxI, np.asarray(narrow.items_Bxk), axis=1), rtol=1e-5, atol=1e-5
    )
    certified = np.asarray(narrow.certified_B)
    np.testing.assert_array_equal(np.asarray(narrow.items_Bxk)[certified], order[certified])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 21]), st.sampled_from([30, 1000, 4001]), st.booleans())
def test_the_best_of_a_wide_row_are_those_of_sorting_it(seed, k, width, tied):
    """Values and, where they are finite, places, the lower one first among equals."""
    rng = np.random.default_rng(seed)
    x_BxN = (rng.integers(0, 3, (2, width)) if tied else rng.normal(size=(2, width))).astype(np.float32)
    x_BxN[:, rng.permutation(width)[: rng.integers(0, width)]] = -np.inf
    best, place = map(np.asarray, jax.jit(beam.top_k, static_argnums=1)(x_BxN, k))
    expected, where = map(np.asarray, jax.lax.top_k(x_BxN, k))
    np.testing.assert_array_equal(best, expected)
    np.testing.assert_array_equal(place[best > -np.inf], where[expected > -np.inf])
    np.testing.assert_array_equal(np.take_along_axis(x_BxN, place, axis=1), best)
