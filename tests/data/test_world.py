import hashlib

import numpy as np
import pytest

from rosepo_jax import config
from rosepo_jax.data import world
from rosepo_jax.data.catalogue import normalise
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import baselines, metrics


def settings(**changes):
    c = config.default().data.world
    c.update(changes)
    return c


SMALL = {"users": 200, "titles": 80, "series": 20, "genres": 4, "length": 12, "slate": 6}


@pytest.fixture(scope="module")
def default_world():
    return world.generate(settings(), seed=0)


def sequences(w):
    log = w.log.interactions
    return np.split(log.item_E, np.flatnonzero(np.diff(log.user_E)) + 1)


def digest(w):
    log = w.log.interactions
    parts = (log.user_E, log.item_E, log.timestamp_E, w.utility_UxI, w.flipped_UxI)
    text = "\n".join(w.log.catalogue.titles) + str(w.log.catalogue.groups)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts) + text.encode()).hexdigest()


def test_same_seed_gives_the_same_bytes_and_another_seed_another_world():
    first, again, other = (digest(world.generate(settings(**SMALL, flip=0.2), seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_log_is_well_formed(default_world):
    log, catalogue = default_world.log.interactions, default_world.log.catalogue
    assert len(default_world.log.users) == 2000 and len(catalogue) == 300
    assert default_world.utility_UxI.shape == (2000, 300) and default_world.utility_UxI.dtype == np.float32
    assert np.isfinite(default_world.utility_UxI).all()
    assert len(np.unique(log.user_E * 300 + log.item_E)) == len(log.user_E), "a user takes an item twice"
    same_user = np.diff(log.user_E) == 0
    assert (np.diff(log.timestamp_E)[same_user] > 0).all()
    assert (log.row_E == np.arange(len(log.row_E))).all()
    lengths = np.bincount(log.user_E)
    assert lengths.min() == 12 and lengths.max() == 36 and abs(lengths.mean() - 24) < 0.5


def test_titles_are_unique_and_come_in_series_of_one_genre(default_world):
    catalogue = default_world.log.catalogue
    assert len({normalise(title) for title in catalogue.titles}) == 300
    genre = dict(zip(catalogue.titles, catalogue.groups, strict=True))
    assert len(set(catalogue.groups)) == 8
    volumes = [title for title in catalogue.titles if title[-1].isdigit()]
    assert len(volumes) == 300 - 60
    for title in volumes:
        name, number = title.rsplit(" ", 1)
        assert genre[title] == genre[name]
        assert number == "2" or f"{name} {int(number) - 1}" in genre


def test_floors_and_ceiling_leave_room_to_learn(default_world):
    """HR@1 over 1 + 19 uniform candidates: popularity < co-occurrence < ranking by the true utility."""
    rows = sequences(default_world)
    items = 300
    count_I = np.bincount(np.concatenate([row[:-2] for row in rows]), minlength=items)
    windows = [(row[max(0, t - 10) : t], row[t]) for row in rows for t in range(1, len(row) - 2)]
    pad = lambda histories: np.array([np.pad(h, (0, 10 - len(h)), constant_values=-1) for h in histories])  # noqa: E731
    pairs_IxI = baselines.cooccurrence_counts(pad([h for h, _ in windows]), np.array([t for _, t in windows]), items)
    random = np.random.default_rng(0)
    target_E = np.array([row[-1] for row in rows])
    others = [random.choice(np.setdiff1d(np.arange(items), row), 19, replace=False) for row in rows]
    candidates_ExC = np.column_stack([others, target_E])
    history_ExN = pad([row[-11:-1] for row in rows])
    users = np.arange(len(rows))[:, None]

    def hit_rate(score_ExC):
        ranked = metrics.ranking(score_ExC, candidates_ExC)
        return metrics.hit_ratio(metrics.target_rank(ranked, target_E, np.arange(items)), 1).mean()

    popularity = hit_rate(baselines.popularity_scores(count_I, candidates_ExC))
    cooccurrence = hit_rate(baselines.cooccurrence_scores(pairs_IxI, history_ExN, candidates_ExC))
    truth = hit_rate(default_world.utility_UxI[users, candidates_ExC])
    assert 0.14 < popularity < 0.22
    assert 0.25 < cooccurrence < 0.36
    assert 0.48 < truth < 0.6


def test_order_is_informative(default_world):
    """The next volume of a recent series follows far more often than in the same sequences shuffled."""
    titles = default_world.log.catalogue.titles
    series = np.cumsum([not title[-1].isdigit() for title in titles])

    def continuations(rows):
        return np.mean(
            [
                any(row[t] == row[t - d] + 1 and series[row[t]] == series[row[t - d]] for d in (1, 2, 3))
                for row in rows
                for t in range(3, len(row))
            ]
        )

    random = np.random.default_rng(0)
    rows = sequences(default_world)[:500]
    assert continuations(rows) > 1.5 * continuations([random.permutation(row) for row in rows])


def test_flips_are_recorded_and_leave_the_truth_alone():
    clean, noisy = (world.generate(settings(**SMALL, flip=flip), 0) for flip in (0.0, 0.3))
    assert not clean.flipped_UxI.any()
    np.testing.assert_array_equal(clean.utility_UxI, noisy.utility_UxI)
    assert clean.log.catalogue.titles == noisy.log.catalogue.titles
    n = len(noisy.flipped)
    assert abs(noisy.flipped.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / n)
    assert noisy.flipped_UxI.sum() == noisy.flipped.sum()
    log = noisy.log.interactions
    utility_E = noisy.utility_UxI[log.user_E, log.item_E]
    assert utility_E[~noisy.flipped].mean() > utility_E[noisy.flipped].mean() + 1


def test_noise_and_exposure_do_what_they_say():
    def chosen_utility(w):
        log = w.log.interactions
        return w.utility_UxI[log.user_E, log.item_E].mean()

    def inequality(w):
        return metrics.gini(np.bincount(w.log.interactions.item_E, minlength=80))

    calm, wild = (world.generate(settings(**SMALL, noise=noise), 0) for noise in (0.0, 5.0))
    assert chosen_utility(calm) > chosen_utility(wild) + 0.5
    shown, recalled = (world.generate(settings(**SMALL, exposure=exposure), 0) for exposure in (1.0, 0.0))
    assert chosen_utility(recalled) > chosen_utility(shown)
    assert inequality(shown) > inequality(recalled)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"users": 0}, "sizes"),
        ({"slate": 1}, "slate"),
        ({"genres": 13}, "genres"),
        ({"series": 3}, "series"),
        ({"series": 400}, "series"),
        ({"length": 250}, "titles"),
        ({"exposure": 1.5}, "exposure"),
        ({"flip": -0.1}, "flip"),
        ({"noise": -1.0}, "noise"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes, word):
    with pytest.raises(UserError, match=word):
        world.generate(settings(**changes), 0)
