"""The whole path through the command line, in processes of their own, on a world of a few hundred users."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from rosepo_jax.training.metrics import MEASURED

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CONFIG = "--config=configs/demo.py:smoke"
BEFORE_ALIGN = ("prepare", "oracle", "sft", "pairs")


@pytest.fixture(scope="session")
def environment():
    """One device."""
    kept = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return kept | {"JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="session")
def rosepo(environment):
    """Runs `rosepo WORDS`; text before the verb is Python to execute first."""

    def run(*words, status=0, prelude="", **variables):
        program = f"import sys\nfrom rosepo_jax.__main__ import main\n{prelude}\nsys.exit(main(sys.argv[1:]))"
        start = [sys.executable, "-c", program] if prelude else [sys.executable, "-m", "rosepo_jax"]
        done = subprocess.run(
            [*start, *map(str, words)],
            cwd=REPOSITORY, env=environment | variables, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def whole(rosepo, tmp_path_factory):
    """The workdir of one complete run. Nothing below it may be changed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    rosepo("run", CONFIG, f"--workdir={workdir}")
    return workdir


@pytest.fixture
def workdir(whole, tmp_path):
    """A workdir of one's own with everything before `align`."""
    return beginning(whole, tmp_path / "run")


def beginning(whole, workdir, stages=BEFORE_ALIGN):
    """The first stages of `whole` with its config, which commands without --config take."""
    workdir.mkdir()
    shutil.copy(whole / "config.json", workdir)
    for stage in stages:
        shutil.copytree(whole / stage, workdir / stage)
    return workdir


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def metrics(workdir, name="loss"):
    """step -> a training metric of `align`."""
    return {row["step"]: row[name] for row in rows(workdir / "align" / "metrics.jsonl") if name in row}


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys() and len(found) > 2
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=tolerance, atol=tolerance)


def test_a_run_leaves_results_report_and_manifests(whole):
    results = json.loads((whole / "evaluate" / "results.json").read_text("utf-8"))
    assert set(results) >= {"protocols", "comparisons"}
    models = {"popularity", "cooccurrence", "oracle", "sft", "sft_more", "aligned"}
    for protocol in ("candidates", "catalogue", "generate"):
        found = results["protocols"][protocol]
        assert found["hash"] and found["n"] == (8 if protocol == "generate" else 48)
        assert set(found["models"]) >= ({"sft", "sft_more", "aligned"} if protocol == "generate" else models)
    for model in models:
        cell = results["protocols"]["candidates"]["models"][model]
        assert {"HR@1", "HR@5", "NDCG@5", "MRR", "popularity_lift", "ARP", "gini", "coverage"} <= set(cell)
        assert cell["HR@1"]["hits"] == round(cell["HR@1"]["value"] * cell["HR@1"]["n"])
        low, high = cell["HR@1"]["ci95"]
        assert low <= cell["HR@1"]["value"] <= high
    generated = results["protocols"]["generate"]["models"]["aligned"]
    assert {"valid_ratio", "HR@1_of_valid", "not_in_catalogue", "history_copy", "duplicate"} <= set(generated)
    for row in results["comparisons"]:
        assert {"protocol", "metric", "a", "b", "difference", "ci95", "p", "test", "p_holm"} <= set(row)
    page = (whole / "report" / "report.html").read_text("utf-8")
    assert page.startswith("<!") and "<svg" in page
    for stage in (*BEFORE_ALIGN, "align", "evaluate", "report"):
        manifest = json.loads((whole / stage / "manifest.json").read_text("utf-8"))
        assert {"identity", "code", "resolved_config", "inputs", "packages", "device", "seeds"} <= set(manifest)
        assert not (whole / stage / "begun.json").exists()


def test_the_second_run_does_nothing(rosepo, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    done = rosepo("run", f"--workdir={whole}")
    assert done.stdout.split("\n")[:-1] == [
        f"{stage}: up to date" for stage in (*BEFORE_ALIGN, "align", "evaluate", "report")
    ]
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}


def test_another_setting_is_refused_and_named(rosepo, whole):
    done = rosepo("align", f"--workdir={whole}", "--config.align.beta=0.77", status=2)
    assert done.stderr.count("\n") == 1
    assert done.stderr.count("align.beta=") == 2 and "align.beta=0.77" in done.stderr and "--workdir" in done.stderr


def test_the_first_loss_is_ln_2_whatever_the_smoothing_and_beta(rosepo, whole, tmp_path):
    """One process for all runs: most of the time would be start-up."""
    settings = [("oracle", 1.0), ("fixed", 0.1), ("none", 1.0), ("shuffled", 0.1)]
    common = "align --config.align.length=1steps --config.log.tensorboard=false"
    runs = [
        f"{common} --workdir={beginning(whole, tmp_path / mode)} "
        f"--config.align.smoothing.mode={mode} --config.align.beta={beta}"
        for mode, beta in settings
    ]
    rosepo(prelude=f"for words in {runs}:\n    assert main(words.split()) == 0\nsys.exit(0)")
    assert metrics(whole)[1] == pytest.approx(math.log(2), abs=1e-6)  # oracle, the config's beta
    for mode, beta in settings:
        assert metrics(tmp_path / mode)[1] == pytest.approx(math.log(2), abs=1e-6), (mode, beta)


def test_s_dpo_with_three_rejected_starts_at_log_4(rosepo, whole, tmp_path):
    workdir = beginning(whole, tmp_path / "run", BEFORE_ALIGN[:3])
    words = [f"--workdir={workdir}", "--config.pairs.negatives=3"]
    rosepo("pairs", *words)
    rosepo("align", *words, "--config.align.objective=s-dpo", "--config.align.length=1 steps")
    assert metrics(workdir)[1] == pytest.approx(math.log(4), abs=1e-6)


def test_eight_devices_give_the_losses_of_one(rosepo, whole, workdir):
    rosepo(
        "align", f"--workdir={workdir}", "--config.mesh.fsdp=4", "--config.mesh.tensor=2",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )  # fmt: skip
    assert json.loads((workdir / "align" / "manifest.json").read_text())["device"]["count"] == 8
    assert_close(metrics(workdir), metrics(whole), 1e-5)
    assert_close(metrics(workdir, "grad_norm"), metrics(whole, "grad_norm"), 1e-3)


@pytest.mark.parametrize("setting", ["smoothing.source=stored", "reference=cached"])
def test_stored_equals_computed(rosepo, whole, workdir, setting):
    rosepo("align", f"--workdir={workdir}", f"--config.align.{setting}")
    for name in ("loss", "rewards/margins", "grad_norm"):
        assert_close(metrics(workdir, name), metrics(whole, name), 1e-5)


def test_stages_that_train_say_how_fast_and_the_report_says_it_again(whole):
    summary = json.loads((whole / "report" / "summary.json").read_text())
    assert list(summary["training"]) == ["sft", "align"]
    for stage, pairs in (("sft", set()), ("align", {"pairs_per_second"})):
        last = [row for row in rows(whole / stage / "metrics.jsonl") if "loss" in row][-1]
        # There is no published peak of a CPU.
        known = set(MEASURED) - {"mfu", "compile_seconds", "pairs_per_second"} | pairs
        assert last.keys() & set(MEASURED) == known
        assert summary["training"][stage].keys() == known | {"compile_seconds"}
    assert "Speed and memory" in (whole / "report" / "report.html").read_text()


def test_killed_and_started_again(rosepo, whole, workdir):
    """A kill in the middle changes neither the metrics nor the model."""
    prelude = (
        "import os, signal\nfrom rosepo_jax.training.metrics import MetricWriter\nwrite = MetricWriter.scalars\n"
        "def scalars(self, step, values):\n"
        "    write(self, step, values)\n"
        "    if step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "MetricWriter.scalars = scalars"
    )
    rosepo("align", f"--workdir={workdir}", prelude=prelude, status=-9)
    assert (workdir / "align" / "begun.json").exists() and not (workdir / "align" / "manifest.json").exists()
    assert any(path.name.isdigit() for path in (workdir / "align" / "checkpoints").iterdir())
    rosepo("align", f"--workdir={workdir}")
    found, expected = (rows(w / "align" / "metrics.jsonl") for w in (workdir, whole))
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(found, expected):
        shared = {key for key in one.keys() & other.keys() if key not in MEASURED}
        assert {key: one[key] for key in shared} == pytest.approx(
            {key: other[key] for key in shared}, rel=1e-4, abs=1e-6
        )
    results = [json.loads((w / "align" / "manifest.json").read_text())["result"] for w in (workdir, whole)]
    assert results[0] == pytest.approx(results[1])


def catalogue(workdir):
    return [row["title"] for row in rows(workdir / "prepare" / "catalogue.jsonl")]


def test_recommend(rosepo, whole):
    titles = catalogue(whole)
    history = "|".join(titles[:3])
    done = rosepo("recommend", f"--workdir={whole}", f"--history={history}", "--k=5", "--json")
    found = json.loads(done.stdout)["recommendations"]
    assert [row["rank"] for row in found] == [1, 2, 3, 4, 5]
    assert {row["title"] for row in found} <= set(titles) - set(titles[:3])
    scores = [row["score"] for row in found]
    assert scores == sorted(scores, reverse=True) and scores[0] < 0
    table = rosepo("recommend", f"--workdir={whole}", f"--history={history}", "--k=5").stdout.splitlines()
    assert table[0] == "after: " + " | ".join(titles[:3])
    assert [line.split(maxsplit=2)[2] for line in table[1:]] == [row["title"] for row in found]


def test_recommend_names_the_three_nearest_titles(rosepo, whole):
    titles = catalogue(whole)
    done = rosepo("recommend", f"--workdir={whole}", f"--history={titles[0]}x", status=2)
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert sum(title in done.stderr for title in set(titles)) >= 3 and titles[0] in done.stderr


def test_score_gives_what_evaluate_ranks_by(rosepo, whole, tmp_path):
    titles = dict(zip((row["id"] for row in rows(whole / "prepare" / "catalogue.jsonl")), catalogue(whole)))
    predictions = rows(whole / "evaluate" / "predictions" / "candidates.sft.jsonl")[:5]
    wanted = [
        {"prompt": "".join(f"{titles[i]}\n" for i in row["history"]), "response": titles[item], "expected": score}
        for row in predictions
        for item, score in zip(row["ranked"], row["scores"], strict=True)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wanted), "utf-8")
    rosepo(
        "score", f"--model={whole / 'sft'}", f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"
    )
    scored = rows(tmp_path / "out.jsonl")
    assert [{key: row[key] for key in wanted[0]} for row in scored] == wanted
    np.testing.assert_allclose([row["logp"] for row in scored], [row["expected"] for row in scored], atol=2e-4)
    assert all(row["tokens"] >= 2 for row in scored)


def test_another_system_is_scored_on_the_same_rows_and_joins_the_report(rosepo, whole, tmp_path):
    """A system that answers with each row's first three candidates, from nothing but what `export` gives it."""
    run = tmp_path / "run"
    beginning(whole, run, (*BEFORE_ALIGN, "align", "evaluate", "report"))
    rosepo("export", f"--workdir={run}", "--format=rows", f"--output={tmp_path / 'rows'}")
    asked = rows(tmp_path / "rows" / "rows.jsonl")
    assert not {"target", "item"} & set(asked[0])
    answers = [{"row": row["row"], "titles": row["candidate_titles"][:3]} for row in asked]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in answers), "utf-8")
    said = rosepo("evaluate", f"--workdir={run}", f"--predictions={path}").stdout
    found = json.loads((run / "others" / "mine" / "candidates.results.json").read_text("utf-8"))["protocols"]
    ours = json.loads((run / "evaluate" / "results.json").read_text("utf-8"))["protocols"]
    assert found["candidates"]["hash"] == ours["candidates"]["hash"]
    cell = found["candidates"]["models"]["mine"]["HR@1"]
    targets = [row["target"] for row in rows(run / "evaluate" / "predictions" / "candidates.sft.jsonl")]
    assert cell["hits"] == sum(row["candidates"][0] == target for row, target in zip(asked, targets))
    page = (run / "report" / "report.html").read_text("utf-8")
    assert "mine" in page and "mine" in said
    path.write_text("".join(json.dumps(row) + "\n" for row in answers[1:]), "utf-8")
    refused = rosepo("evaluate", f"--workdir={run}", f"--predictions={path}", status=2)
    assert refused.stderr.count("\n") == 1 and "mine.jsonl" in refused.stderr


def test_runs_are_compared_and_other_rows_refused(rosepo, whole, tmp_path):
    other = beginning(whole, tmp_path / "other", (*BEFORE_ALIGN, "align", "evaluate"))
    done = rosepo("report", whole, other, f"--output={tmp_path / 'both'}")
    assert "HR@1" in done.stdout and (tmp_path / "both" / "comparison.html").is_file()
    path = other / "evaluate" / "results.json"
    path.write_text(path.read_text("utf-8").replace('"hash": "', '"hash": "f', 1), "utf-8")
    refused = rosepo("report", whole, other, f"--output={tmp_path / 'none'}", status=2)
    assert refused.stderr.count("\n") == 1 and "candidates" in refused.stderr and not (tmp_path / "none").exists()
    assert "RUN RUN" in rosepo("report", whole, "--config.seed=1", status=2).stderr


def test_sweep_prints_a_table(rosepo, workdir):
    light = ["--config.evaluate.protocols=candidates", "--config.evaluate.sft_more=false"]
    done = rosepo("sweep", f"--workdir={workdir}", "--sweep=align.beta=0.1,0.5", *light)
    head, _, *lines = done.stdout[done.stdout.index("align.beta ") :].splitlines()
    assert "validation HR@1" in head and "test HR@1" in head
    assert sorted(line.split()[0] for line in lines) == ["0.1", "0.5"]
    assert done.stdout.count("sft: shared with") == 2
