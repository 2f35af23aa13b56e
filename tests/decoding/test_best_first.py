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
    logps,
    pad_prompts,
    random_params,
    random_prompts,
    random_titles,
    same_shape,
    scored_by_decoder,
)

from rosepo_jax.decoding.beam import Result, beam_search
from rosepo_jax.decoding.best_first import best_first
from rosepo_jax.decoding.trie import compile_trie

K, LINES, PLENTY, FEW = 4, 3, 300, 12


def nothing_known(rows, k=K):
    return np.full((rows, k), -1, np.int32), np.full((rows, k), -np.inf, np.float32)


def prefix_scores(params, prompt, titles):
    """The log-prob of every prefix of these titles but the empty one."""
    scores = {}
    for title in titles:
        step = logps(params, prompt, np.array(title[:-1], int))[np.arange(len(title)), title]
        scores |= {tuple(title[: n + 1]): score for n, score in enumerate(np.cumsum(step)[:-1])}
    return np.array(list(scores.values()))


class Problem:
    """A random model, and a catalogue of titles of which some may be excluded for each of two prompts."""

    def __init__(self, seed, titles=None, banned=0):
        rng = np.random.default_rng(seed)
        self.titles = titles or random_titles(rng, rng.integers(1, 41))
        self.params, self.prompts = random_params(rng, VOCABULARY), random_prompts(rng, 2)
        self.excluded = np.full((2, 4), -1, np.int32)
        self.excluded[:, :banned] = rng.integers(0, len(self.titles), (2, banned))
        self.arguments = (
            ToyModel(), self.params, same_shape(compile_trie(self.titles, EOS)), *pad_prompts(self.prompts, 8)
        )  # fmt: skip

    def beams(self, beams=2):
        found = beam_search(*self.arguments, beams=beams, k=K, excluded_BxX=jnp.asarray(self.excluded))
        return jax.tree.map(np.asarray, found)

    def complete(self, items, scores, budget=PLENTY):
        found = best_first(
            *self.arguments, items, scores, lines=LINES, budget=budget, excluded_BxX=jnp.asarray(self.excluded)
        )
        return jax.tree.map(np.asarray, found)

    def check(self, found: Result):
        for row, prompt in enumerate(self.prompts):
            items, scores, certified = (leaf[row] for leaf in found)
            assert_sound(items, scores, prompt, self.params, self.titles, self.excluded[row])
            if certified:
                assert_is(items, scores, brute_force(self.params, prompt, self.titles, self.excluded[row]))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4), st.booleans())
def test_every_row_equals_brute_force(seed, banned, after_beams):
    """On from a beam that is too narrow, or from nothing; with few expansions the certificate does not lie."""
    problem = Problem(seed, banned=banned)
    known = problem.beams()[:2] if after_beams else nothing_known(2)
    found, short = problem.complete(*known), problem.complete(*known, budget=FEW)
    problem.check(found)
    problem.check(short)
    assert found.certified_B.all()


@pytest.mark.parametrize("titles", SMALL.values(), ids=SMALL)
def test_small_catalogues(titles):
    problem = Problem(3, titles)
    for known in (nothing_known(2), problem.beams()[:2]):
        found = problem.complete(*known)
        problem.check(found)
        assert found.certified_B.all()


def test_each_open_prefix_is_expanded_once_and_no_other():
    """With the right k results known, the proof takes exactly the prefixes that score no less than the k-th."""
    proved = {True: 0, False: 0}
    for seed in range(60):
        problem = Problem(seed)
        right = problem.complete(*nothing_known(2))
        found = problem.complete(*right[:2], budget=FEW)
        np.testing.assert_array_equal(found.items_Bxk, right.items_Bxk)
        for row, prompt in enumerate(problem.prompts):
            scores, last = prefix_scores(problem.params, prompt, problem.titles), right.scores_Bxk[row, -1]
            if np.abs(scores - last).min() > 1e-4:
                assert found.certified_B[row] == (np.sum(scores > last) <= FEW)
                proved[bool(found.certified_B[row])] += 1
    assert min(proved.values()) > 20


def test_completion_proves_and_corrects_what_the_beam_left_open():
    opened = corrected = 0
    for seed in range(40):
        problem = Problem(seed)
        beams = problem.beams()
        found = problem.complete(*beams[:2])
        opened += np.sum(~beams.certified_B)
        corrected += np.sum((found.items_Bxk != beams.items_Bxk).any(axis=1))
        assert not (found.items_Bxk != beams.items_Bxk).any(axis=1)[beams.certified_B].any()
    assert opened > corrected > 20


def test_ties_go_to_the_lower_item():
    """A first token is as good as any other, and EOS behind it is certain: all titles and all prefixes tie."""
    problem = Problem(0, [[token, EOS] for token in (5, 4, 3, 2, 1)])
    problem.params["embedding"][:] = 10.0 * (np.arange(VOCABULARY) != EOS)[:, None]
    problem.params["head"][:] = 30.0 * (np.arange(VOCABULARY) == EOS)
    problem.arguments = (*problem.arguments[:3], *pad_prompts([[EOS]] * 2, 8))
    wrong = (np.array([[1, 2, 3, 4]] * 2, np.int32), np.full((2, K), np.log(np.float32(1 / VOCABULARY))))
    for known in (nothing_known(2), wrong):
        found = problem.complete(*known)
        assert found.items_Bxk.tolist() == [[0, 1, 2, 3]] * 2
        np.testing.assert_allclose(found.scores_Bxk, np.log(1 / VOCABULARY), rtol=1e-6)
        assert found.certified_B.all()
        # A budget of four never comes to the fifth prefix and keeps no room for it.
        assert not problem.complete(*known, budget=4).certified_B.any()


def test_rows_do_not_depend_on_batch_padding_or_devices():
    rng = np.random.default_rng(5)
    titles, params, prompts = random_titles(rng, 60, 12, 6), random_params(rng, 12), random_prompts(rng, 8, 12)
    trie = compile_trie(titles, EOS)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    rows = jax.NamedSharding(mesh, jax.P("batch"))

    def search(prompts, width, fill, sharding=None):
        batch = jax.device_put((*pad_prompts(prompts, width, fill), *nothing_known(len(prompts))), sharding)
        return jax.tree.map(np.asarray, best_first(ToyModel(), params, trie, *batch, lines=4, budget=40))

    together, apart = search(prompts, 6, 1, rows), [search([prompt], 17, 9) for prompt in prompts]
    apart = jax.tree.map(lambda *leaves: np.concatenate(leaves), *apart)
    assert 0 < apart.certified_B.sum() < 8
    np.testing.assert_array_equal(together.items_Bxk, apart.items_Bxk)
    np.testing.assert_array_equal(together.certified_B, apart.certified_B)
    np.testing.assert_allclose(together.scores_Bxk, apart.scores_Bxk, rtol=1e-5)


def test_one_compilation_serves_many_batches():
    problem = Problem(0)
    problem.complete(*nothing_known(2))
    compiled = best_first._cache_size()
    for seed in (1, 2):
        Problem(seed).complete(*nothing_known(2))
    assert best_first._cache_size() == compiled


@pytest.mark.parametrize("numbers", [{"lines": 0, "budget": 1}, {"lines": 1, "budget": 0}])
def test_refuses_no_lines_and_no_budget(numbers):
    with pytest.raises(ValueError, match="at least 1"):
        best_first(*Problem(0).arguments, *nothing_known(2), **numbers)


def test_decoder_equals_scoring_every_title():
    (lm, params, titles, prompts, mask), every_BxI = scored_by_decoder()
    order = np.argsort(-every_BxI, axis=1)[:, :K]
    trie = compile_trie(titles, EOS)
    found = best_first(lm, params, trie, prompts, mask, *nothing_known(5), lines=4, budget=PLENTY)
    assert found.certified_B.all()
    np.testing.assert_array_equal(found.items_Bxk, order)
    np.testing.assert_allclose(found.scores_Bxk, np.take_along_axis(every_BxI, order, axis=1), rtol=1e-5, atol=1e-5)
