import itertools
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosepo_jax.decoding.trie import compile_trie

EOS = 0
CATALOGUES = st.lists(st.lists(st.integers(1, 4), max_size=5), min_size=1, max_size=30)


def walk(trie):
    """Every node with its prefix, read from the arrays alone."""
    found, stack = {}, [(0, ())]
    while stack:
        node, prefix = stack.pop()
        found[node] = prefix
        children = range(trie.child_start_M1[node], trie.child_start_M1[node + 1])
        tokens = [int(trie.token_M[child]) for child in children]
        assert tokens == sorted(set(tokens))
        assert (trie.parent_M[children.start : children.stop] == node).all()
        stack += [(child, (*prefix, token)) for child, token in zip(children, tokens)]
    return found


@settings(max_examples=200, deadline=None)
@given(CATALOGUES)
def test_nodes_are_exactly_the_prefixes(titles):
    trie = compile_trie([[*title, EOS] for title in titles], EOS)
    titles = [tuple(title) for title in titles]
    prefixes = walk(trie)
    assert sorted(prefixes) == list(range(len(trie.token_M)))
    assert sorted(prefixes.values()) == sorted({title[:n] for title in titles for n in range(len(title) + 1)})
    ranked = sorted(set(titles))
    assert trie.rank_I.tolist() == [ranked.index(title) for title in titles]
    for node, prefix in prefixes.items():
        assert trie.item_M[node] == (titles.index(prefix) if prefix in titles else -1)
        below = [rank for rank, title in enumerate(ranked) if title[: len(prefix)] == prefix]
        assert below == list(range(trie.first_M[node], trie.last_M[node]))
        if prefix in titles:
            assert ranked[trie.first_M[node]] == prefix
    widest = [0] * max(1, max(map(len, titles)))
    for node, prefix in prefixes.items():
        if len(prefix) < len(widest):
            children = int(trie.child_start_M1[node + 1] - trie.child_start_M1[node])
            widest[len(prefix)] = max(widest[len(prefix)], children)
    assert trie.branching == tuple(widest)
    level_T, widths = trie.levels()
    for depth, level in enumerate(level_T):
        assert widths[level] >= max(widest[depth + 1 :], default=0)  # no child is left out
    assert all(4 * narrow <= wide for wide, narrow in itertools.pairwise(widths))  # so there are few
    assert trie.rank_I.tolist() == [ranked.index(title) for title in titles]  # equal titles share one


def test_prefix_titles_and_duplicates():
    alien, aliens = [5, 6, EOS], [5, 6, 7, EOS]
    trie = compile_trie([aliens, alien, aliens], EOS)
    assert trie.rank_I.tolist() == [1, 0, 1]
    assert trie.item_M.tolist() == [-1, -1, 1, 0]
    assert trie.token_M.tolist() == [EOS, 5, 6, 7]
    assert trie.branching == (1, 1, 1)


def test_unicode_titles_as_bytes():
    titles = ["Amélie", "Amelie", "千と千尋の神隠し", "千", "🎬"]
    trie = compile_trie([[*(byte + 1 for byte in title.encode()), EOS] for title in titles], EOS)
    spelled = {node: bytes(token - 1 for token in prefix) for node, prefix in walk(trie).items()}
    ends = np.flatnonzero(trie.item_M >= 0)
    assert len(ends) == len(titles)
    assert {spelled[node].decode(): titles[trie.item_M[node]] for node in ends} == {title: title for title in titles}


@pytest.mark.parametrize("titles", [[], [[]], [[1]], [[1, EOS], [2]], [[EOS, 1, EOS]], [[1, EOS, EOS]], [[-1, EOS]]])
def test_refuses_what_is_not_a_title(titles):
    with pytest.raises(ValueError, match="title"):
        compile_trie(titles, EOS)


def test_twenty_thousand_titles_are_small_and_fast():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 24, 20_000)
    titles = [[*(1 + (rng.zipf(1.3, n) % 30_000)).tolist(), EOS] for n in lengths]
    start = time.perf_counter()
    trie = compile_trie(titles, EOS)
    assert time.perf_counter() - start < 5.0
    # Linear in the tokens of the titles: no table over vocabulary x nodes.
    assert sum(leaf.size for leaf in jax.tree.leaves(trie)) <= 6 * (lengths.sum() + len(titles) + 1)
    chosen = rng.integers(len(titles), size=200)
    for item in chosen:
        node = 0
        for token in titles[item][:-1]:
            children = slice(trie.child_start_M1[node], trie.child_start_M1[node + 1])
            node = children.start + int(np.searchsorted(trie.token_M[children], token))
            assert trie.token_M[node] == token
        assert titles[trie.item_M[node]] == titles[item]
