"""Every file in configs/: loads, shrinks, sweeps, and reads its real log."""

import json
import pathlib
import subprocess
import sys

import pytest

from rosepo_jax import configuration
from rosepo_jax.errors import UserError

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py"))
LOGS = {  # config -> folder, (users, test rows) that the published description of the log gives
    "movietweetings": ("movietweetings-100k", 2290, 48),
    "movielens_small": ("ml-latest-small", None, 48),
    "lastfm": ("llara-lastfm", 1220, 48),
}


def spec(name, argument=""):
    return f"{REPOSITORY / 'configs' / name}.py" + (f":{argument}" if argument else "")


@pytest.mark.parametrize("name", CONFIGS)
def test_smoke_is_smaller_and_nothing_else_is_an_argument(name):
    whole, small = (configuration.load(spec(name, argument)) for argument in ("", "smoke"))
    assert small.model.width < whole.model.width and small.model.vocabulary <= whole.model.vocabulary
    assert (small.data.source, small.data.path, small.data.split) == (
        whole.data.source,
        whole.data.path,
        whole.data.split,
    )
    with pytest.raises(UserError, match=r":smok\b.*:smoke"):
        configuration.load(spec(name, "smok"))


@pytest.mark.parametrize("name", CONFIGS)
def test_sweeps_are_over_beta_and_smoothing(name):
    runs = configuration.get_sweep(spec(name))
    keys = {key for run in runs for key in run}
    assert "align.beta" in keys and any(key.startswith("align.smoothing.") for key in keys)
    assert len({json.dumps(run, sort_keys=True) for run in runs}) == len(runs) > 3
    for run in runs:
        config = configuration.load(spec(name, "smoke"))
        for key, value in run.items():
            configuration.override(config, key, value)


def rosepo(verb, name, folder, workdir):
    words = [f"--config={spec(name, 'smoke')}", f"--workdir={workdir}", f"--config.data.path={folder}"]
    done = subprocess.run(
        [sys.executable, "-m", "rosepo_jax", verb, *words],
        cwd=workdir.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.real_data
@pytest.mark.parametrize("name", LOGS)
def test_prepare_reads_the_real_log(real_data, tmp_path, name):
    folder, users, test_rows = LOGS[name]
    rosepo("prepare", name, real_data / folder, tmp_path / "run")
    statistics = json.loads((tmp_path / "run" / "prepare" / "statistics.json").read_text("utf-8"))
    assert users is None or statistics["users"] == users
    assert statistics["rows"]["test"] == test_rows
    assert statistics["rows"]["train"] > 10_000
    assert not statistics["candidate_leak"]["flagged"]


@pytest.mark.real_data
def test_a_whole_run_on_a_real_log(real_data, tmp_path):
    rosepo("run", "lastfm", real_data / LOGS["lastfm"][0], tmp_path / "run")
    results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text("utf-8"))
    for protocol in ("candidates", "catalogue", "generate"):
        assert {"sft", "sft_more", "aligned"} <= set(results["protocols"][protocol]["models"])
    assert (tmp_path / "run" / "report" / "report.html").stat().st_size > 10_000


def test_every_config_with_a_log_is_run_here():
    assert set(CONFIGS) == {"demo", *LOGS}
