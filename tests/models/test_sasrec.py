"""SASRec against a naive float64 forward, and its invariances: padding, batch, causality, saving."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rosepo_jax import files
from rosepo_jax.errors import UserError
from rosepo_jax.models import sasrec
from rosepo_jax.models.sasrec import SASRecConfig

CONFIG = SASRecConfig(items=11, positions=6, width=8, layers=2, heads=2, dropout=0.3)
HISTORY = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, -1, -1, -1], [8, -1, -1, -1, -1, -1]], np.int32)


def random_params(config=CONFIG, dtype=np.float32):
    """No zero biases or unit scales, so that every parameter counts."""
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape) * 0.5, dtype), sasrec.init(config, KEY))


KEY = jax.random.key(0)
PARAMS = random_params()


def every_logit(config, params, history, key=None):
    """Logits [B, N, I] of the item after every position."""
    return sasrec.hidden(config, params, jnp.asarray(history), key=key) @ params["item"].T


def naive_hidden(params, history):
    """Hidden states of one unpadded history, one position and one head at a time."""
    norm = lambda x, p: (x - x.mean()) / np.sqrt(x.var() + 1e-6) * p["scale"] + p["bias"]  # noqa: E731
    linear = lambda x, p: x @ p["kernel"] + p["bias"]  # noqa: E731
    width = params["item"].shape[1]
    states = [params["item"][item] * np.sqrt(width) + params["position"][n] for n, item in enumerate(history)]
    for layer in range(CONFIG.layers):
        block = params[f"block_{layer}"]
        qkv = [linear(norm(x, block["attention_norm"]), block["qkv"]) for x in states]
        size = width // CONFIG.heads
        after = []
        for n, x in enumerate(states):
            heads = []
            for head in range(CONFIG.heads):
                part = slice(head * size, (head + 1) * size)
                q = qkv[n][:width][part]
                k = np.array([y[width : 2 * width][part] for y in qkv[: n + 1]])
                v = np.array([y[2 * width :][part] for y in qkv[: n + 1]])
                weight = np.exp(k @ q / np.sqrt(size))
                heads.append(weight / weight.sum() @ v)
            x = x + linear(np.concatenate(heads), block["out"])
            inner = np.maximum(linear(norm(x, block["mlp_norm"]), block["up"]), 0)
            after.append(x + linear(inner, block["down"]))
        states = after
    return np.array([norm(x, params["norm"]) for x in states])


def test_against_the_naive_forward_in_float64():
    with jax.enable_x64(True):
        params = random_params(dtype=np.float64)
        plain = jax.tree.map(np.asarray, params)
        logits = every_logit(CONFIG, params, HISTORY)
        scores = sasrec.scores(CONFIG, params, jnp.asarray(HISTORY))
        for row, history in enumerate(HISTORY):
            real = history[history >= 0]
            expected = naive_hidden(plain, real) @ plain["item"].T
            np.testing.assert_allclose(logits[row, : len(real)], expected, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(scores[row], expected[-1], rtol=1e-9, atol=1e-9)


scores = jax.jit(lambda history: sasrec.scores(CONFIG, PARAMS, history))


@given(rows=hnp.arrays(np.int32, (3, 6), elements=st.integers(0, 10)), lengths=st.tuples(*[st.integers(0, 4)] * 3))
@settings(max_examples=25, deadline=None)
def test_padding_and_batch_size_change_nothing(rows, lengths):
    rows = np.where(np.arange(6) < np.array(lengths)[:, None], rows, -1)
    wide, tight = np.asarray(scores(rows)), np.asarray(scores(rows[:, :4]))
    assert wide.dtype == np.float32 and wide.shape == (3, CONFIG.items)
    np.testing.assert_allclose(wide, tight, rtol=1e-5, atol=1e-5)
    alone = np.concatenate([np.asarray(scores(rows[i : i + 1])) for i in range(3)])
    np.testing.assert_allclose(wide, alone, rtol=1e-5, atol=1e-5)


def test_later_items_never_reach_earlier_positions():
    every = jax.jit(lambda history: every_logit(CONFIG, PARAMS, history))
    logits = np.asarray(every(HISTORY))
    for position in range(1, 6):
        changed = HISTORY.copy()
        changed[:, position:] = (changed[:, position:] + 3) % 11
        other = np.asarray(every(changed))
        np.testing.assert_array_equal(logits[:, :position], other[:, :position])
        assert np.all(np.abs(logits[:, position] - other[:, position]).max(-1) > 1e-3)


def test_item_scores_are_columns_of_scores():
    items = jnp.array([[0, 10, 4], [5, 5, 1], [2, 3, 9]])
    some = sasrec.item_scores(CONFIG, PARAMS, jnp.asarray(HISTORY), items)
    every = sasrec.scores(CONFIG, PARAMS, jnp.asarray(HISTORY))
    np.testing.assert_allclose(some, jnp.take_along_axis(every, items, 1), rtol=1e-5, atol=1e-5)


def test_order_of_the_history_matters():
    scores = sasrec.scores(CONFIG, PARAMS, jnp.array([[1, 2, 3], [3, 2, 1]]))
    assert np.abs(scores[0] - scores[1]).max() > 1e-2


def test_dropout_only_with_a_key():
    history = jnp.asarray(HISTORY)
    still, again = (every_logit(CONFIG, PARAMS, history) for _ in range(2))
    np.testing.assert_array_equal(still, again)
    a, b, c = (every_logit(CONFIG, PARAMS, history, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert np.any(a != c) and np.any(a != still)
    off = dataclasses.replace(CONFIG, dropout=0.0)
    np.testing.assert_array_equal(every_logit(off, PARAMS, history, KEY), still)


def test_states_of_some_positions_are_those_of_all():
    place = jnp.array([[5, 0], [2, 2], [0, 4]])
    every = sasrec.hidden(CONFIG, PARAMS, jnp.asarray(HISTORY))
    some = sasrec.hidden(CONFIG, PARAMS, jnp.asarray(HISTORY), place)
    np.testing.assert_allclose(some, jnp.take_along_axis(every, place[:, :, None], axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(rate):
    kept = np.asarray(sasrec._drop(jnp.ones((999, 1001)), rate, KEY), np.float64)
    assert len(np.unique(kept)) == 2 and kept.min() == 0
    rounded = round(rate * 256) / 256
    deviation = np.sqrt(rate * (1 - rate) / kept.size)  # of the share; five of them
    assert abs((kept == 0).mean() - rounded) < 5 * deviation
    assert abs(kept.mean() - 1) < 5 * deviation / (1 - rate)
    assert np.array_equal(sasrec._drop(jnp.ones(3), 0.0, KEY), np.ones(3))


def test_next_items():
    target, short = jnp.array([7, 0, 10]), jnp.concatenate([HISTORY, np.full((1, 6), -1, np.int32)])
    place, every = sasrec.next_items(jnp.asarray(HISTORY), target, "all")
    assert place is None
    np.testing.assert_array_equal(every, [[1, 4, 1, 5, 9, 7], [6, 5, 0, -1, -1, -1], [10, -1, -1, -1, -1, -1]])
    place, last = sasrec.next_items(jnp.asarray(HISTORY), target, "last")
    np.testing.assert_array_equal(place, [[5], [2], [0]])
    np.testing.assert_array_equal(last, [[7], [0], [10]])
    empty = sasrec.next_items(short, jnp.array([7, 0, 10, 4]), "all")[1][3]
    np.testing.assert_array_equal(empty, [4, -1, -1, -1, -1, -1])  # an empty history still predicts its target


def test_losses_in_closed_form():
    config = dataclasses.replace(CONFIG, dropout=0.0)
    place, following = sasrec.next_items(jnp.asarray(HISTORY), jnp.array([7, 0, 10]), "all")
    logits = np.asarray(every_logit(config, PARAMS, jnp.asarray(HISTORY)), np.float64)
    picked = [(b, n, following[b, n]) for b in range(3) for n in range(6) if following[b, n] >= 0]
    expected = np.mean([np.log(np.exp(logits[b, n]).sum()) - logits[b, n, i] for b, n, i in picked])
    loss = sasrec.cross_entropy(config, PARAMS, jnp.asarray(HISTORY), place, following, None)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)

    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    both = sasrec.binary_cross_entropy(config, zero, jnp.asarray(HISTORY), place, following, KEY)
    np.testing.assert_allclose(both, 2 * np.log(2), rtol=1e-6)
    two = dataclasses.replace(config, items=2)  # then the negative can only be the other item
    params = random_params(two)
    history, target = jnp.array([[0, 1, 1]]), jnp.array([0])
    predicted = sasrec.next_items(history, target, "last")
    scores = np.asarray(sasrec.scores(two, params, history))[0]
    loss = sasrec.binary_cross_entropy(two, params, history, *predicted, KEY)
    np.testing.assert_allclose(loss, np.logaddexp(0, -scores[0]) + np.logaddexp(0, scores[1]), rtol=1e-5)


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("loss", [sasrec.cross_entropy, sasrec.binary_cross_entropy])
def test_it_learns_an_order(loss, positions):
    """Items follow one another in a fixed cycle: the next one must come first."""
    config = SASRecConfig(items=7, positions=4, width=16, layers=1, heads=2, dropout=0.0)
    params, optimizer = sasrec.init(config, KEY), optax.adam(1e-2)
    history = (jnp.arange(7)[:, None] + jnp.arange(4)[None]) % 7
    target = (jnp.arange(7) + 4) % 7

    @jax.jit
    def step(params, state, key):
        predicted = sasrec.next_items(history, target, positions)
        gradient = jax.grad(lambda p: loss(config, p, history, *predicted, key))(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for number in range(150):
        params, state = step(params, state, jax.random.key(number))
    np.testing.assert_array_equal(jnp.argmax(sasrec.scores(config, params, history), 1), target)


def test_initialisation_is_a_function_of_the_key():
    a, b, c = (sasrec.init(CONFIG, jax.random.key(k)) for k in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert np.any(a["item"] != c["item"])
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(a))


def test_save_and_load(tmp_path):
    sasrec.save(tmp_path, CONFIG, PARAMS, temperature=1.5, data="abc")
    config, params, facts = sasrec.load(tmp_path)
    assert config == CONFIG and facts == {"temperature": 1.5, "data": "abc"}
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        sasrec.load(tmp_path)
    sasrec.save(tmp_path, CONFIG, PARAMS)
    other = dataclasses.asdict(dataclasses.replace(CONFIG, items=12))
    files.write_json(tmp_path / "config.json", {"architecture": other})
    with pytest.raises(UserError, match="do not fit"):
        sasrec.load(tmp_path)
    files.write_json(tmp_path / "config.json", {"items": 12})
    with pytest.raises(UserError, match="not an oracle's config"):
        sasrec.load(tmp_path)
    sasrec.save(tmp_path, CONFIG, PARAMS)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        sasrec.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"heads": 3}, "multiple of oracle.heads"), ({"dropout": 1.0}, "oracle.dropout"), ({"layers": 0}, "at least 1")],
)
def test_refusals(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match="width 7 for 6 positions"):
        sasrec.scores(CONFIG, PARAMS, jnp.zeros((1, 7), jnp.int32))
