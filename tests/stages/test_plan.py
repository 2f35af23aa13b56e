"""From --sweep flags to runs: values, keys that move together, draws, names that cannot leave their folder."""

import math

import pytest

from rosepo_jax import config as defaults
from rosepo_jax import configuration, files
from rosepo_jax.errors import UserError
from rosepo_jax.stages import plan

HOSTILE = (
    "../../etc",
    "..",
    "a b;rm -rf $HOME",
    "$(id)`id`",
    "'\"",
    "--workdir=/tmp",
    "x" * 300,
    "ü" * 300,
    "/",
)


@pytest.fixture
def config():
    return defaults.default()


def overrides(config, *flags):
    return plan.product(plan.parse(config, flags))


def test_several_flags_are_multiplied(config):
    assert overrides(config, "align.beta=0.1,0.3", "seed=0,1") == [
        {"align.beta": "0.1", "seed": "0"},
        {"align.beta": "0.1", "seed": "1"},
        {"align.beta": "0.3", "seed": "0"},
        {"align.beta": "0.3", "seed": "1"},
    ]


def test_keys_that_move_together(config):
    assert overrides(config, "align.beta,sft.learning_rate=0.1:1e-4,0.3:3e-4", "seed=0,1")[::2] == [
        {"align.beta": "0.1", "sft.learning_rate": "1e-4", "seed": "0"},
        {"align.beta": "0.3", "sft.learning_rate": "3e-4", "seed": "0"},
    ]
    assert overrides(config, "pairs.strategy=self_hard:0.5") == [{"pairs.strategy": "self_hard:0.5"}]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("align.beta", "KEY=V1,V2"),
        ("align.beta=", "KEY=V1,V2"),
        ("align.beta=0.1,,0.3", "KEY=V1,V2"),
        ("=0.1", "KEY=V1,V2"),
        ("align.beta,=0.1:1", "KEY=V1,V2"),
        ("align.beta,seed=0.1:1,0.3", "2 keys need 2 words a value"),
        ("align.beta,seed=0.1:1:2", "2 keys need 2 words a value"),
        ("align.beta,seed=0.1:", "2 keys need 2 words a value"),
        ("align.beta=uniform(1)", r"KEY=uniform\(LOW,HIGH\)"),
        ("align.beta=uniform(1,0)", r"KEY=uniform\(LOW,HIGH\)"),
        ("align.beta=uniform(0,inf)", r"KEY=uniform\(LOW,HIGH\)"),
        ("align.beta=uniform(nan,1)", r"KEY=uniform\(LOW,HIGH\)"),
        ("align.beta=loguniform(0,1)", "LOW above 0"),
        ("align.beta=loguniform(0.1,1", "LOW above 0"),
        ("align.beta=uniform(__import__('os').system('id'),1)", "LOW"),
        ("align.beta,seed=uniform(0,1)", "LOW"),
        ("align.bta=uniform(0,1)", "did you mean align.beta"),
        ("align.objective=uniform(0,1)", "not a text"),
        ("pairs.negatives=uniform(0.5,3)", "pairs.negatives is a whole number"),
    ],
)
def test_flags_that_cannot_be_read(config, flag, message):
    with pytest.raises(UserError, match=message) as refused:
        plan.parse(config, [flag])
    assert str(refused.value).count("\n") == 0


def test_a_range_without_trials_is_refused(config):
    with pytest.raises(UserError, match="--trials=N"):
        overrides(config, "align.beta=uniform(0,1)")


def test_draws_are_a_function_of_seed_number_and_key(config):
    ranges = ["align.beta=loguniform(0.01,1)", "pairs.negatives=uniform(1,4)"]
    axes = plan.parse(config, [*ranges, "align.smoothing.mode=oracle,none"])
    drawn = plan.draws(axes, 400, 7)
    assert drawn[:20] == plan.draws(axes, 20, 7) != plan.draws(axes, 20, 8)
    assert [draw["align.beta"] for draw in drawn] == [d["align.beta"] for d in plan.draws(axes[:1], 400, 7)]
    betas = [draw["align.beta"] for draw in drawn]
    assert 0.01 <= min(betas) < 0.012 and 0.85 < max(betas) <= 1 and all(b == float(f"{b:.4g}") for b in betas)
    assert abs(sum(map(math.log10, betas)) / 400 + 1) < 0.1  # even in the logarithms of 0.01 to 1
    counts = [sum(draw["pairs.negatives"] == n for draw in drawn) for n in (1, 2, 3, 4)]
    assert sum(counts) == 400 and min(counts) > 70
    assert 150 < sum(draw["align.smoothing.mode"] == "none" for draw in drawn) < 250
    assert len(plan.planned(config, drawn)) == 400


def test_log_draws_of_whole_numbers(config):
    (axis,) = plan.parse(config, ["pairs.negatives=loguniform(1,8)"])
    found = [draw["pairs.negatives"] for draw in plan.draws([axis], 400, 0)]
    assert set(found) == set(range(1, 9)) and found.count(1) > 2 * found.count(4)
    assert all(type(value) is int for value in found)


def test_settings_listed_twice_run_once_and_aliases_are_resolved(config):
    (run,) = plan.planned(config, [{"align.label_smoothing": 0.2}, {"align.label_smoothing": "0.2"}])
    assert run.settings == {"align.smoothing.mode": "fixed", "align.smoothing.value": 0.2}
    assert (run.number, run.config.align.smoothing.value, config.align.smoothing.mode) == (0, 0.2, "oracle")


def test_names_are_a_function_of_the_settings():
    one = plan.run_id({"align.beta": 0.1, "data.path": "/a/b c"})
    assert one == plan.run_id({"data.path": "/a/b c", "align.beta": 0.1})
    assert one.startswith("beta=0.1_path=-a-b-c-") and "/" not in one
    assert one != plan.run_id({"align.beta": 0.1, "data.path": "/a/b-c"})
    assert plan.run_id({"sft.learning_rate": 0.1}) != plan.run_id({"align.learning_rate": 0.1})


@pytest.mark.parametrize("word", HOSTILE)
def test_no_word_makes_a_folder_elsewhere(config, tmp_path, word):
    (run,) = plan.planned(config, [{"data.path": word}])
    folder = run.folder(tmp_path / "w")
    assert folder.parent == tmp_path / "w" / "sweep" and run.name not in ("", ".", "..")
    assert len(run.name.encode()) < 100 and run.name.isascii() and run.name.isprintable() and "/" not in run.name
    folder.mkdir(parents=True)
    assert folder.resolve().parent == (tmp_path / "w" / "sweep").resolve()


@pytest.mark.parametrize("word", ["'\"\n", "\x00"])
def test_what_no_name_can_hold_is_refused(config, word):
    with pytest.raises(UserError, match=r"config\.data\.path=.* is not a text of one line"):
        plan.planned(config, [{"data.path": word}])


@pytest.mark.parametrize("word", HOSTILE)
def test_a_plan_is_saved_and_read_as_it_was(config, tmp_path, word):
    config.data.titles = word
    runs = plan.planned(config, [{"data.path": word, "align.beta": 0.1 + 0.2}, {"evaluate.protocols": ("candidates",)}])
    path = plan.save(tmp_path / "p", config, [run.settings for run in runs])
    again = plan.planned(configuration.load(str(path)), configuration.get_sweep(str(path)))
    assert [(r.number, r.name, r.settings, r.config.to_dict()) for r in again] == [
        (r.number, r.name, r.settings, r.config.to_dict()) for r in runs
    ]


def test_a_saved_plan_that_is_none_is_refused(tmp_path, config):
    path = plan.save(tmp_path, config, [{}])
    files.write_json(tmp_path / "runs.json", {"align.beta": 1})
    with pytest.raises(UserError, match=r"runs\.json: not a list of runs"):
        configuration.get_sweep(str(path))
    (tmp_path / "runs.json").unlink()
    assert configuration.get_sweep(str(path)) is None


def test_what_runs_share():
    assert plan.shared_stages(["align.beta"]) == ["prepare", "oracle", "sft", "pairs"]
    assert plan.shared_stages(["align.beta", "align.smoothing.temperature"]) == ["prepare", "oracle", "sft"]
    assert plan.shared_stages(["seed"]) == ["prepare"]
    assert plan.shared_stages(["data.history"]) == []
    assert plan.differing([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 2, "c": 0}]) == ["b", "c"]
