"""The embedded world: a generative model of titles and users whose true preferences are known.

It is a measuring instrument. Real logs do not tell which items a user likes nor which labels are noise; this log does.

A user's true preference is static, `utility_UxI` = genre taste + individual taste for the series + quality. Order comes
from what is shown: at each step a slate of items is exposed, a mixture of popular items and of items recalled for the
user (those of high utility, above all the next volume of a series the user has just taken up). The user picks

    argmax over the slate of  utility - POSITION * log2(1 + slot) + noise * Gumbel

and never takes an item twice. With probability `flip` the log names a random other item of the slate instead. The model
is our own; the slate follows the without-replacement sampling of Efraimidis & Spirakis (2006).
"""

import dataclasses
from typing import Any

import numpy as np

from rosepo_jax import seeds
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.log import Interactions, RawLog
from rosepo_jax.errors import UserError

TASTE_WIDTH = 8  # dimensions of the individual taste
GENRE, TASTE, QUALITY = 2.0, 2.0, 0.7  # standard deviations of the parts of the utility, in units of Gumbel noise
SHARPNESS = 0.8  # recall is softmax(SHARPNESS * utility + CONTINUATION * is next volume)
CONTINUATION = 4.0
POSITION = 0.5
ZIPF = 0.9  # exposure of the item of popularity rank r is proportional to r^-ZIPF
RECENT = 3  # the series of this many latest items are continued

NOUNS = {
    "Adventure": "Harbour Island Compass Voyage Summit Jungle Lagoon Caravan Frontier Expedition",
    "Mystery": "Cipher Alibi Witness Corridor Ledger Cellar Inspector Footprint Locket Riddle",
    "Fantasy": "Dragon Citadel Sorcerer Talisman Rune Griffin Enchantress Throne Prophecy Wyvern",
    "Romance": "Letter Waltz Promise Orchard Embrace Veranda Bouquet Serenade Wedding Valentine",
    "Science Fiction": "Nebula Android Orbit Reactor Starship Colony Satellite Quasar Hologram Wormhole",
    "Horror": "Crypt Phantom Asylum Scarecrow Coven Mausoleum Shriek Gargoyle Seance Catacomb",
    "Comedy": "Parade Neighbour Circus Understudy Picnic Landlord Roommate Trumpet Casserole Reunion",
    "History": "Regiment Cathedral Senator Armada Treaty Monarch Siege Chronicle Viceroy Rebellion",
    "Western": "Saloon Sheriff Canyon Mustang Prairie Outlaw Stagecoach Homestead Lasso Prospector",
    "Music": "Sonata Choir Violin Overture Jukebox Ballad Drummer Cadenza Chorus Nocturne",
    "Sport": "Marathon Stadium Goalkeeper Regatta Sprinter Champion Peloton Pitcher Boxer Trophy",
    "Nature": "Meadow Glacier Falcon Estuary Badger Thicket Monsoon Heron Reef Tundra",
}
ADJECTIVES = (
    "Amber Silent Crimson Hidden Broken Golden Distant Hollow Silver Burning Frozen Wandering Emerald Forgotten Velvet "
    "Midnight Restless Painted Gentle Iron Scarlet Last Paper Lonely Winter Copper Secret Savage Ivory Borrowed"
)


@dataclasses.dataclass(frozen=True)
class World:
    """A log and the truth behind it; users and items are numbered as in `log`."""

    log: RawLog
    utility_UxI: np.ndarray  # float32: the true preference; a higher utility is liked more
    flipped_UxI: np.ndarray  # bool: the logged interaction of this user with this item is a label flip

    @property
    def flipped(self) -> np.ndarray:
        """bool_E: which interactions of the log are label flips."""
        return self.flipped_UxI[self.log.interactions.user_E, self.log.interactions.item_E]


def generate(config: Any, seed: int) -> World:
    """The world of `config` (`config.data.world`: users, titles, genres, series, length, slate, exposure, noise, flip).

    The same bytes for the same config and seed. Raises UserError when the numbers do not fit together.
    """
    _check(config)
    series_I, volume_I, genre_S = _shelve(config, seed)
    rank_I = _popularity_rank(series_I, volume_I, seed)
    utility_UxI = _utility(config, seed, series_I, genre_S, rank_I)
    item_UxL, flipped_UxL, length_U = _live(config, seed, series_I, volume_I, rank_I, utility_UxI)

    user_E, position_E = np.nonzero(np.arange(item_UxL.shape[1]) < length_U[:, None])
    item_E = item_UxL[user_E, position_E]
    flipped_UxI = np.zeros(utility_UxI.shape, bool)
    flipped_UxI[user_E, item_E] = flipped_UxL[user_E, position_E]
    catalogue = Catalogue(
        ids=tuple(f"i{item}" for item in range(config.titles)),
        titles=_titles(series_I, volume_I, genre_S, seed),
        groups=tuple((tuple(NOUNS)[genre],) for genre in genre_S[series_I]),
        count_I=np.zeros(config.titles, np.int64),
    )
    interactions = Interactions(
        user_E=user_E.astype(np.int64),
        item_E=item_E,
        timestamp_E=_timestamps(item_UxL.shape, seed)[user_E, position_E].astype(np.float64),
        row_E=np.arange(len(user_E), dtype=np.int64),
        rating_E=None,
        split_E=None,
    )
    users = tuple(f"u{user}" for user in range(config.users))
    return World(RawLog(interactions, users, catalogue, repairs={}, frozen_rows=None), utility_UxI, flipped_UxI)


def _check(config: Any) -> None:
    most = _longest(config) + config.slate
    words = len(ADJECTIVES.split()) * 10  # titles of one genre
    for wrong, what in (
        (min(config.users, config.titles, config.genres, config.series, config.length) < 1, "all sizes must be >= 1"),
        (config.slate < 2, "slate must be >= 2"),
        (config.genres > len(NOUNS), f"genres must be at most {len(NOUNS)}"),
        (config.series < config.genres, "series must be at least genres"),
        (config.series > config.titles, "series must be at most titles"),
        (-(-config.series // config.genres) > words, f"series must be at most {words} per genre"),
        (config.titles < most, f"titles must be at least {most} (1.5 length + slate)"),
        (not 0 <= config.exposure <= 1, "exposure must be in [0, 1]"),
        (not 0 <= config.flip <= 1, "flip must be in [0, 1]"),
        (config.noise < 0, "noise must be >= 0"),
    ):
        if wrong:
            raise UserError(f"data.world: {what}")


def _longest(config: Any) -> int:
    return config.length + config.length // 2


def _shelve(config: Any, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The series and the volume (from 0) of each item, and the genre of each series."""
    random = seeds.generator(seed, "world", "series")
    extra = random.integers(config.series, size=config.titles - config.series)
    series_I = np.sort(np.concatenate([np.arange(config.series), extra]))
    volume_I = np.arange(config.titles) - np.searchsorted(series_I, series_I)
    return series_I, volume_I, np.arange(config.series) % config.genres


def _titles(series_I: np.ndarray, volume_I: np.ndarray, genre_S: np.ndarray, seed: int) -> tuple[str, ...]:
    names = [""] * len(genre_S)
    for genre, nouns in enumerate(tuple(NOUNS.values())[: genre_S.max() + 1]):
        pairs = [f"The {adjective} {noun}" for adjective in ADJECTIVES.split() for noun in nouns.split()]
        order = seeds.generator(seed, "world", "titles", genre).permutation(len(pairs))
        for pair, series in zip(order, np.flatnonzero(genre_S == genre), strict=False):
            names[series] = pairs[pair]
    return tuple(
        names[series] + (f" {volume + 1}" if volume else "") for series, volume in zip(series_I, volume_I, strict=True)
    )


def _popularity_rank(series_I: np.ndarray, volume_I: np.ndarray, seed: int) -> np.ndarray:
    """The rank of each item, 1 = most exposed: series have a level, later volumes fall behind."""
    random = seeds.generator(seed, "world", "popularity")
    level_S = random.standard_normal(series_I.max() + 1)
    level_I = level_S[series_I] + 0.5 * random.standard_normal(len(series_I)) - 0.2 * volume_I
    return np.argsort(np.argsort(-level_I)) + 1


def _utility(config: Any, seed: int, series_I: np.ndarray, genre_S: np.ndarray, rank_I: np.ndarray) -> np.ndarray:
    random = seeds.generator(seed, "world", "taste")
    genre_UxG = random.dirichlet(np.full(config.genres, 0.5), size=config.users)
    taste_UxD = random.standard_normal((config.users, TASTE_WIDTH))
    series_SxD = random.standard_normal((config.series, TASTE_WIDTH))
    item_IxD = 0.9 * series_SxD[series_I] + np.sqrt(1 - 0.9**2) * random.standard_normal((config.titles, TASTE_WIDTH))
    # einsum, not BLAS: the sum has one order on every number of threads
    taste_UxI = np.einsum("ud,id->ui", taste_UxD, item_IxD) / np.sqrt(TASTE_WIDTH)
    genre_UxI = (genre_UxG * np.sqrt(config.genres))[:, genre_S[series_I]]
    utility_UxI = GENRE * genre_UxI + TASTE * taste_UxI + QUALITY * _standardise(-np.log(rank_I))
    return utility_UxI.astype(np.float32)


def _standardise(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / max(x.std(), 1e-12)


def _live(
    config: Any,
    seed: int,
    series_I: np.ndarray,
    volume_I: np.ndarray,
    rank_I: np.ndarray,
    utility_UxI: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All users take one step at a time: the logged items, which of them are flips, and the users' lengths."""
    U, I = utility_UxI.shape
    steps = _longest(config)
    rows = np.arange(U)[:, None]
    exposed_I = rank_I**-ZIPF / (rank_I**-ZIPF).sum()
    recall_UxI = np.exp(SHARPNESS * (utility_UxI - utility_UxI.max(1, keepdims=True)))
    next_I = np.where(np.append(series_I[1:] == series_I[:-1], False), np.arange(I) + 1, I)  # I = the series has ended
    bonus = np.exp(CONTINUATION)
    free_UxI = np.ones((U, I), bool)
    item_UxL = np.zeros((U, steps), np.int64)
    flipped_UxL = np.zeros((U, steps), bool)
    for step in range(steps):
        random = seeds.generator(seed, "world", "step", step)
        continued_UxI = np.zeros((U, I + 1), bool)
        continued_UxI[rows, next_I[item_UxL[:, max(0, step - RECENT) : step]]] = True
        wanted_UxI = recall_UxI * np.where(continued_UxI[:, :I], bonus, 1.0) * free_UxI
        weight_UxI = config.exposure * exposed_I * free_UxI
        weight_UxI += (1 - config.exposure) * wanted_UxI / wanted_UxI.sum(1, keepdims=True)
        with np.errstate(divide="ignore"):
            wait_UxI = random.standard_exponential((U, I)) / weight_UxI
        slate_UxM = np.argsort(wait_UxI, axis=1, kind="stable")[:, : config.slate]
        gain_UxM = utility_UxI[rows, slate_UxM] - POSITION * np.log2(2 + np.arange(config.slate))
        pick_U = np.argmax(gain_UxM + config.noise * random.gumbel(size=gain_UxM.shape), axis=1)
        flip_U = random.random(U) < config.flip
        other_U = (pick_U + random.integers(1, config.slate, size=U)) % config.slate
        item_UxL[:, step] = slate_UxM[rows[:, 0], np.where(flip_U, other_U, pick_U)]
        flipped_UxL[:, step] = flip_U
        free_UxI[rows[:, 0], item_UxL[:, step]] = False
    shortest = max(1, config.length - config.length // 2)
    length_U = seeds.generator(seed, "world", "length").integers(shortest, steps, size=U, endpoint=True)
    return item_UxL, flipped_UxL, length_U


def _timestamps(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Seconds: users join over three months and come back about once a day, never twice in the same second."""
    random = seeds.generator(seed, "world", "time")
    start_Ux1 = random.integers(90 * 86_400, size=(shape[0], 1))
    return start_Ux1 + np.cumsum(1 + random.exponential(86_400, size=shape).astype(np.int64), axis=1)
