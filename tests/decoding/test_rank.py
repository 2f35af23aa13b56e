"""The catalogue's best titles through a real byte-level tokenizer, against scoring every title by hand."""

import numpy as np
import pytest
from toy import ToyModel, assert_is, assert_sound, brute_force, random_params

from rosepo_jax.config import default
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.examples import TitleTable, prompt_texts
from rosepo_jax.data.prompts import Encoder, Template, train_tokenizer
from rosepo_jax.data.rows import Rows
from rosepo_jax.decoding import rank
from rosepo_jax.training import sharding
from rosepo_jax.training.policy import Policy

TITLES = (
    *("Alien", "Aliens", "Alien³", "Amélie", "Amelie", "AMÉLIE", "千と千尋の神隠し", "千", "千と", "🎬", "🎬🎥", "Ран"),
    *("Alien", "The Thing", "The Thing from Another World", "The Third Man", "The", "t", "Что? Где? Когда?", "千"),
    *("L'Été", "L’été", "Ünder", "ünder", "¡Átame!", "Se7en", "8½", "8 1/2", "M", "M*A*S*H", "شهر زیبا", "Zażółć"),
)
ROWS, K, VOCABULARY = 19, 4, 320  # a batch is 8: three of them, the last one padded


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([f"{title}\n" for title in TITLES[:20]], 280, directory)
    return Encoder(directory, Template.load("titles"), 24, 32)


def problem(encoder, seed):
    rng = np.random.default_rng(seed)
    catalogue = Catalogue(tuple(map(str, range(len(TITLES)))), TITLES, ((),) * len(TITLES), np.zeros(len(TITLES), int))
    history = rng.integers(-1, len(TITLES), (ROWS, 6)).astype(np.int32)
    history[:, 0] = np.maximum(history[:, 0], 0)
    zeros = np.zeros(ROWS, np.int32)
    rows = Rows(zeros, zeros, history, zeros, np.zeros((ROWS, 0), np.int32))
    policy = Policy(ToyModel(), encoder, sharding.make_mesh(default().mesh), {}, random_params(rng, VOCABULARY))
    return policy, policy.params, catalogue, TitleTable(encoder, TITLES), rows


def test_completion_makes_every_row_exact(encoder):
    opened = 0
    for seed in range(3):
        _, params, catalogue, titles, rows = arguments = problem(encoder, seed)
        how = dict(beams=16, k=K, batch_size=8, excluded_ExX=rows.history_ExN)
        beams, found = rank.catalogue_top(*arguments, **how), rank.catalogue_top(*arguments, **how, budget=400)
        prompts = encoder.prompt_ids(prompt_texts(encoder, catalogue, rows.history_ExN, rows.candidates_ExC))
        for row, prompt in enumerate(prompts):
            own = rows.history_ExN[row]
            for top in (beams, found):
                assert_sound(top.items[row], top.scores[row], prompt, params, titles.ids, own)
            assert_is(found.items[row], found.scores[row], brute_force(params, prompt, titles.ids, own))
        assert found.certified.all()
        proved = beams.certified  # these rows are left as they are
        np.testing.assert_array_equal(found.scores[proved], beams.scores[proved])
        opened += np.sum(~beams.certified)
    assert 5 < opened < 3 * ROWS - 5
