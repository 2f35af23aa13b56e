"""Others' answers are scored as ours are: on the frozen rows of a run, by the same measures, under the same hash."""

import json

import numpy as np
import pytest

from rosepo_jax import __main__, files
from rosepo_jax import config as defaults
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.evaluation import metrics, predictions, protocols, significance, summary
from rosepo_jax.evaluation.answers import Answers
from rosepo_jax.stages import predictions as stage
from rosepo_jax.stages import prepare, runtime
from rosepo_jax.training import checkpoint, policy, sharding


def small_config():
    c = defaults.default()
    c.data.world.update({"users": 60, "titles": 60, "series": 12, "length": 10})
    c.data.core_item, c.data.windows, c.data.split, c.data.test_share = 2, True, "user_ratio", 0.4
    c.model.update({"vocabulary": 280, "width": 8, "layers": 1, "heads": 2, "kv_heads": 1, "mlp_width": 6})
    c.evaluate.update({"bootstrap": 50, "max_generate": 7})
    return c


class Run:
    """A workdir in which only `prepare` is complete, and how to ask for other systems' figures in it."""

    def __init__(self, workdir):
        self.config, self.workdir = small_config(), workdir
        self.prepared = runtime.execute(prepare, self.config, workdir)
        self.catalogue = Catalogue.load(self.prepared / "catalogue.jsonl")
        self.users = files.read_json(self.prepared / "users.json")

    def rows(self, protocol):
        return protocols.rows_of(self.config, self.prepared, protocol)

    def answers(self, seed, protocol="candidates"):
        """Random scores of the candidates, as a model of ours has them."""
        rows = self.rows(protocol)
        score_ExC = np.random.default_rng(seed).standard_normal(rows.candidates_ExC.shape) - 9
        ranked_ExC = metrics.ranking(score_ExC, rows.candidates_ExC)
        return Answers(ranked_ExC, -np.sort(-score_ExC, axis=1), full_score_ExC=score_ExC)

    def lines(self, protocol, answer):
        """One line for each row, in raw ids: `answer(row)` says what is answered."""
        rows = self.rows(protocol)
        asked = predictions.questions(rows, self.users, self.catalogue)
        return [{"user": row["user"], "position": row["position"], **answer(row)} for row in asked]

    def score(self, path, lines, *words):
        files.write_jsonl(path, lines)
        return __main__.main(["evaluate", f"--workdir={self.workdir}", f"--predictions={path}", *words])

    def results(self, name, protocol):
        return files.read_json(self.workdir / "others" / name / f"{protocol}.results.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("others") / "run")


def test_protocols_are_those_of_evaluate():
    assert tuple(protocols.PROTOCOLS) == stage.PROTOCOLS


def test_a_system_is_measured_as_our_models_are(run, tmp_path, capsys):
    answers = run.answers(0)
    ids = [[run.catalogue.ids[item] for item in items] for items in answers.ranked_ExK]
    rows = run.rows("candidates")
    lines = [
        {"user": run.users[user], "ranked": items, "scores": scores}
        for user, items, scores in zip(rows.user_E, ids, answers.score_ExK.tolist())
    ]
    assert run.score(tmp_path / "their-model.jsonl", lines[::-1]) == 0
    found = run.results("their-model", "candidates")
    ground = summary.Ground(rows, run.catalogue, None, run.config.evaluate.neighbours)
    expected, _ = summary.describe(answers, ground, 50, run.config.seed)
    assert found == {
        "protocols": {
            "candidates": {
                "hash": protocols.Setting(run.config, run.catalogue, rows).hash("candidates"),
                "n": len(rows),
                "split": "test",
                "semantic_space": None,
                "models": {"their-model": json.loads(json.dumps(runtime.plain(expected)))},
            }
        },
        "comparisons": [],
    }
    said = capsys.readouterr().out
    assert "candidates protocol: every item is a candidate" in said and "no semantic metrics" in said
    assert f"{expected['HR@1']['value']:.4f}" in said and "their-model/candidates.results.json" in said
    again = run.workdir / "others" / "their-model" / "candidates.predictions.jsonl"
    read = predictions.read(again, rows, run.users, run.catalogue)
    np.testing.assert_array_equal(read.ranked_ExK, answers.ranked_ExK)
    np.testing.assert_array_equal(read.full_score_ExC, answers.full_score_ExC)


@pytest.mark.parametrize(
    ("protocol", "kind", "answer"),
    [
        ("generate", "text", lambda row: row["candidate_titles"][0] + "\n"),
        ("candidates", "titles", lambda row: row["candidate_titles"][:3]),
        ("catalogue", "titles", lambda row: row["history_titles"][:3]),
        ("catalogue", "ranked", lambda row: row["candidates"][:3] + row["history"]),
        ("candidates", "ranked", lambda row: []),
        ("windows", "ranked", lambda row: row["candidates"][:3]),
    ],
)
def test_the_protocol_follows_from_the_answers(run, tmp_path, capsys, protocol, kind, answer):
    words = ["--protocol=windows"] if protocol == "windows" else []
    lines = run.lines(protocol, lambda row: {kind: answer(row)})
    assert run.score(tmp_path / "x.jsonl", lines, f"--name={kind}", *words) == 0
    assert (f"{protocol} protocol: " in capsys.readouterr().out) == (not words)
    found = run.results(kind, protocol)["protocols"][protocol]
    M = found["models"][kind]
    assert found["n"] == M["HR@1"]["n"] == len(lines) == len(run.rows(protocol))
    assert found["split"] == ("windows" if words else "test")
    if protocol != "generate":
        assert len(lines) > 7
    longest = max(len(line[kind]) for line in lines) if kind == "ranked" else 1
    assert ("HR@5" in M) == (longest >= 5)
    assert M["valid_ratio"]["value"] == float(any(line[kind] for line in lines))


def test_lists_are_cut_where_those_of_our_models_end(run, tmp_path):
    everything = list(run.catalogue.ids)
    lines = run.lines("catalogue", lambda row: {"ranked": everything})
    assert run.score(tmp_path / "all.jsonl", lines) == 0
    written = files.read_jsonl(run.workdir / "others" / "all" / "catalogue.predictions.jsonl")
    assert all(row["ranked"] == everything[:10] for row in written)


@pytest.fixture
def evaluated(run):
    """The run with what `evaluate` would have left of two models."""
    folder, rows = run.workdir / "evaluate", run.rows("candidates")
    for seed, model in enumerate(("aligned", "sft"), 1):
        path = folder / "predictions" / f"candidates.{model}.jsonl"
        predictions.write(path, rows, run.answers(seed), run.users, run.catalogue)

    def record(hash):
        cells = {"HR@1": {"value": 0.4321}}
        found = {"hash": hash, "models": {"aligned": cells, "sft": cells, "popularity": cells}}
        files.write_json(folder / "results.json", {"protocols": {"candidates": found}})
        files.write_json(folder / runtime.MANIFEST, {"identity": "e"})

    yield record
    (folder / runtime.MANIFEST).unlink()


def test_it_is_compared_with_the_models_that_were_asked_the_same(run, evaluated, tmp_path, capsys):
    rows = run.rows("candidates")
    predictions.write(tmp_path / "x.jsonl", rows, run.answers(0), run.users, run.catalogue)
    lines = files.read_jsonl(tmp_path / "x.jsonl")
    evaluated("another")
    assert run.score(tmp_path / "x.jsonl", lines) == 0
    assert run.results("x", "candidates")["comparisons"] == [] and "popularity" not in capsys.readouterr().out

    evaluated(protocols.Setting(run.config, run.catalogue, rows).hash("candidates"))
    assert run.score(tmp_path / "x.jsonl", lines) == 0
    found = run.results("x", "candidates")["comparisons"]
    assert "0.4321" in capsys.readouterr().out
    group_I = run.catalogue.title_group_I
    rank_E = [metrics.target_rank(run.answers(seed).ranked_ExK, rows.target_E, group_I) for seed in range(3)]
    expected = [
        {"protocol": "candidates", "metric": metric, "a": "x", "b": model}
        | significance.compare(of(rank_E[0]), of(rank_E[seed]), rows.user_E, 50, run.config.seed)
        for metric, of in (("HR@1", lambda r: metrics.hit_ratio(r, 1)), ("NDCG@5", lambda r: metrics.ndcg(r, 5)))
        for seed, model in enumerate(("aligned", "sft"), 1)
    ]
    for row, holm in zip(expected, significance.holm([row["p"] for row in expected])):
        row["p_holm"] = holm
    adjusted = significance.benjamini_hochberg([row["p"] for row in expected])
    assert found == json.loads(json.dumps([row | {"q_bh": q} for row, q in zip(expected, adjusted)]))


def test_title_vectors_are_those_of_the_sft_model(run, tmp_path):
    lines = run.lines("candidates", lambda row: {"ranked": row["candidates"]})
    folder = run.workdir / "sft"
    made = policy.create(run.config, folder, sharding.make_mesh(run.config.mesh), run.catalogue.titles)
    checkpoint.save_params(folder / "model", made.trainable)
    assert run.score(tmp_path / "x.jsonl", lines) == 0  # not complete yet
    assert run.results("x", "candidates")["protocols"]["candidates"]["semantic_space"] is None
    files.write_json(folder / runtime.MANIFEST, {"identity": "space"})
    assert run.score(tmp_path / "x.jsonl", lines) == 0
    (folder / runtime.MANIFEST).unlink()
    found = run.results("x", "candidates")["protocols"]["candidates"]
    assert found["semantic_space"] == "space"
    assert found["models"]["x"]["semantic_error_rate"]["n"] == len(lines)


def listing(folder):
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("file", "words", "message"),
    [
        ("x.jsonl", ["--name=../x"], "--name: '../x' is not a plain name"),
        ("x.jsonl", ["--name=/x"], "--name: '/x' is not"),
        ("x.jsonl", ["--name=.."], "--name: '..' is not"),
        ("x.jsonl", ["--name="], "--name: '' is not"),
        ("x.jsonl", ["--name=a\nb"], "--name: 'a\\nb' is not"),
        ("x.jsonl", ["--name=" + "x" * 101], "--name: 'xxx"),
        ("my file.jsonl", [], "--name: 'my file' is not a plain name"),
        ("x.jsonl", ["--name=aligned"], "--name=aligned: a model of the run is called so"),
        ("x.jsonl", ["--protocol=ranking"], "invalid choice: 'ranking'"),
        ("x.jsonl", ["--protocol=windows"], "rows have no line"),
        ("no.jsonl", [], "no.jsonl: no such file"),
    ],
)
def test_mistakes(run, tmp_path, capsys, file, words, message):
    lines = run.lines("candidates", lambda row: {"ranked": row["candidates"]})
    files.write_jsonl(tmp_path / file.replace("no", "yes"), lines)
    before = listing(run.workdir)
    arguments = ["evaluate", f"--workdir={run.workdir}", f"--predictions={tmp_path / file}", *words]
    assert __main__.main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert listing(run.workdir) == before


def test_without_prepare(run, tmp_path):
    files.write_json(tmp_path / "config.json", files.read_json(run.workdir / "config.json"))
    files.write_jsonl(tmp_path / "x.jsonl", [{"user": "u", "ranked": []}])
    assert __main__.main(["evaluate", f"--workdir={tmp_path}", f"--predictions={tmp_path / 'x.jsonl'}"]) == 2
