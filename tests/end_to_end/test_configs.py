"""Every file in configs/: loads, shrinks, sweeps, and reads its real log."""

import json
import pathlib
import subprocess
import sys

import pytest

from rosepo_jax import config as defaults
from rosepo_jax import configuration
from rosepo_jax.data.prompts import Template
from rosepo_jax.errors import UserError
from rosepo_jax.models import families

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py"))
LOGS = {  # config -> folder, users and train rows (None: not checked) that the description of the log gives
    "movietweetings": ("movietweetings-100k", 2290, None),
    "movielens_small": ("ml-latest-small", None, None),
    "lastfm": ("llara-lastfm", 1220, 47_872),
    "movielens_llara": ("llara-movielens", 943, 66_127),
    "llama3_8b": ("llara-movielens", 943, 66_127),
    "mistral_7b": ("llara-steam", 3388, 1000),  # a sample of the train rows
    "qwen3_4b": ("patchrec-goodreads", 2090, 149_773),
}
PUBLISHED = ("gemma3_4b", "llama3_1b", "llama3_8b", "mistral_7b", "qwen3_4b")


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


def rosepo(verb, name, folder, workdir, argument="smoke", *more):
    words = [f"--config={spec(name, argument)}", f"--workdir={workdir}", f"--config.data.path={folder}", *more]
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
    folder, users, train_rows = LOGS[name]
    rosepo("prepare", name, real_data / folder, tmp_path / "run")
    statistics = json.loads((tmp_path / "run" / "prepare" / "statistics.json").read_text("utf-8"))
    assert users is None or statistics["users"] == users
    rows = statistics["rows"]
    assert rows["test"] == 48
    assert rows["train"] > 10_000 if train_rows is None else rows["train"] + rows["held_out"] == train_rows
    assert not statistics["candidate_leak"]["flagged"]


@pytest.mark.real_data
def test_a_whole_run_on_a_real_log_by_a_published_protocol(real_data, tmp_path):
    """Prompts that list their candidates, free answers, all steps of the test users, the published table beside."""
    short = ["--config.model.vocabulary=8192", "--config.data.max_test=24"]  # 30 names are many tokens otherwise
    rosepo("run", "lastfm", real_data / LOGS["lastfm"][0], tmp_path / "run", "listed,smoke", *short)
    results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text("utf-8"))
    assert results["protocols"].keys() == {"candidates", "windows", "generate"}
    for protocol in results["protocols"].values():
        assert {"sft", "sft_more", "aligned"} <= set(protocol["models"])
    assert "substring_HR@1" in results["protocols"]["generate"]["models"]["aligned"]
    assert len(results["probes"]["aligned"]["order"]["HR@1"]) == 4 and results["published"]["n"] == 122
    assert any("drawn afresh" in sentence for sentence in results["defects"])
    page = (tmp_path / "run" / "report" / "report.html").read_text("utf-8")
    assert "LLaRA (SASRec)" in page and "drawn afresh" in page


def test_every_config_with_a_log_is_run_here():
    assert set(CONFIGS) == {"demo", "llama3_70b", *LOGS, *PUBLISHED}  # whose base must be split over devices


# ---- Published models: what the words of their arguments make --------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_on_any_hardware_is_the_same_experiment(name):
    whole = configuration.load(spec(name))
    assert families.architecture(whole.model.architecture).width > 1000 and "/" in whole.model.path
    assert whole.model.tuning == "lora" and (whole.mesh.hardware, whole.mesh.devices) == ("h100", 1)
    for hardware, (device, devices, *_) in defaults.MACHINES.items():
        for tuning in ("", ",full"):
            c = configuration.load(spec(name, hardware + tuning))
            assert (c.mesh.hardware, c.mesh.devices) == (device, devices)
            for section in (c.sft, c.align):
                assert section.batch_size % (devices * section.accumulate) == 0
            assert c.evaluate.batch_size % devices == c.pairs.batch_size % devices == 0
            alike = configuration.load(spec(name, tuning.lstrip(",")))
            for key in ("mesh", "evaluate", "pairs"):
                c[key] = alike[key]
            c.sft.accumulate, c.align.accumulate = alike.sft.accumulate, alike.align.accumulate
            assert c == alike


@pytest.mark.parametrize("rows", defaults.PUBLISHED)
def test_the_rows_of_a_published_model_can_be_chosen(rows):
    c, other = (configuration.load(spec("llama3_1b", words)) for words in (f"{rows},full", f"full,{rows}"))
    assert c == other and c.model.tuning == "full" and c.model.param_dtype == "float32"
    assert rows in c.data.path and Template.load(c.data.template).slots & {"history", "history_line"}
    assert not configuration.load(spec("llama3_1b", "full")).data.path.endswith("steam")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_small_run_needs_no_published_weights_and_no_special_hardware(name):
    c = configuration.load(spec(name, "smoke,full,v5p-64,steam"))
    assert (c.model.path, c.model.architecture, c.model.chat_template) == ("", "", False)
    assert c.mesh == defaults.default().mesh and c.sft.accumulate == c.align.accumulate == 1
    assert c.model.tuning == "full" and c.data.path.endswith("steam")


@pytest.mark.parametrize("words", ["h100-1,h200-1", "steam,movielens", "full,h100", "h100-1:full"])
def test_words_that_mean_nothing_are_refused(words):
    with pytest.raises(UserError, match=r"h100-8 \| .*movielens \| lastfm \| sdpo \| steam"):
        configuration.load(spec("qwen3_4b", words))
