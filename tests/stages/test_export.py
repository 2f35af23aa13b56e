import argparse
import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from rosepo_jax import files
from rosepo_jax.config import default
from rosepo_jax.data import examples, store
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.decoding import rank
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import metrics, predictions, protocols
from rosepo_jax.evaluation.answers import Answers
from rosepo_jax.models import checkpoints_hf
from rosepo_jax.stages import export, prepare, runtime
from rosepo_jax.training import checkpoint, policy, sharding


@pytest.fixture
def config():
    return default()


@pytest.fixture
def workdir(tmp_path, config):
    """A run as its manifests record it."""
    config.data.path = "/elsewhere/logs"
    manifest = {
        "identity": "id-align",
        "code": "0.1.0+abc",
        "python": "3.11",
        "device": {"kind": "cpu"},
        "packages": {"jax": "1.2.3"},
        "resolved_config": runtime.plain(config.to_dict()),
        "inputs": {"prepare": "id-prepare"},
    }
    files.write_json(tmp_path / "align" / runtime.MANIFEST, manifest)
    prepared = manifest | {"identity": "id-prepare", "inputs": {"data.path": "hash-of-data"}}
    files.write_json(tmp_path / "prepare" / runtime.MANIFEST, prepared)
    make_model(tmp_path / "align", config)
    return tmp_path


def make_model(folder, config, **keys):
    """The model folder of a stage, as training leaves it."""
    config.model.update({"vocabulary": 280, "width": 8, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_width": 6} | keys)
    made = policy.create(config, folder, sharding.make_mesh(config.mesh), ["Blue Harbour", "Nights of Rain"])
    checkpoint.save_params(folder / "model", {path: x + 0.1 for path, x in made.trainable.items()})
    return policy.load(config, folder, made.mesh)


GROUPS = {
    "HR@1 by decile": [{"value": 0.5, "n": 4}, {"value": 0.25, "n": 4}],
    "calibration": {"bins": [1, 2]},
    "curve": [0.1, 0.2],
}


def evaluated(workdir, align="id-align"):
    cell = {"value": 0.41234567, "ci95": [0.39, 0.43], "hits": 939, "n": 2290}
    files.write_json(workdir / "evaluate" / runtime.MANIFEST, {"inputs": {"align": align, "sft": "id-sft"}})
    comparison = {
        "protocol": "candidates", "metric": "HR@1", "a": "aligned", "b": "sft", "difference": 0.031,
        "ci95": [0.012, 0.05], "p": 0.002, "test": "paired permutation", "p_holm": 0.004,
    }  # fmt: skip
    models = {"sft": {"HR@1": cell | {"value": 0.77}}, "aligned": {"HR@1": cell, "ARP": {"value": None}} | GROUPS}
    protocols = {"candidates": {"hash": "hash-of-lists", "n": 2290, "models": models}}
    files.write_json(workdir / "evaluate" / "results.json", {"protocols": protocols, "comparisons": [comparison]})


def arguments(workdir, *words):
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    args = parser.parse_args(words)
    args.workdir = workdir
    return args


def test_writes_a_directory_with_a_card(workdir, config, tmp_path, capsys):
    evaluated(workdir)
    export.main(config, arguments(workdir, f"--output={tmp_path / 'hf'}"))
    model = policy.load(config, workdir / "align", sharding.make_mesh(config.mesh))
    assert checkpoints_hf.read_config(tmp_path / "hf") == model.lm.config
    params = checkpoints_hf.read(tmp_path / "hf", model.lm.config)
    assert all(np.array_equal(params[path], value) for path, value in model.params.items())
    assert f"{sum(value.size for value in params.values()):,} parameters" in capsys.readouterr().out
    card = (tmp_path / "hf" / "README.md").read_text()
    for text in (
        "hash hash-of-data",
        "id-prepare",
        "`candidates`, 2290 rows, hash hash-of-lists",
        "| HR@1 | 0.4123 | [0.39, 0.43] | 2290 |",
        "| ARP |  |  |  |",
        "aligned - sft = 0.031 [0.012, 0.05], p = 0.004 (paired permutation)",
        "0.1.0+abc",
        "jax 1.2.3",
        "{history}",
        '"beta": 0.1',
    ):
        assert text in card, text
    assert not any(name in card for name in GROUPS)  # no row of a table
    assert "/elsewhere" not in card and '"path": "logs"' in card
    assert "0.77" not in card
    settings = json.loads(card.split("```json\n")[1].split("```")[0])
    assert ConfigDict(settings).align.objective == "rosepo"


def test_a_hub_id_is_shown_whole_and_a_folder_by_its_name():
    settings = {"model": {"path": "owner/model", "adapter": "/models/adapter"}, "seed": 0}
    assert export._without_folders(settings) == {"model": {"path": "owner/model", "adapter": "adapter"}, "seed": 0}
    assert export._without_folders({"model": {"path": "/models/model"}}) == {"model": {"path": "model"}}


def test_results_of_another_checkpoint_are_not_shown(workdir):
    assert "Not evaluated." in export.card(workdir, "align")
    evaluated(workdir, align="id-other")
    card = export.card(workdir, "align")
    assert "Not evaluated." in card and "0.4123" not in card


@pytest.mark.parametrize("quantized", ["none", "int8", "nf4"])
def test_an_adapter_leaves_alone_or_folded_into_its_base(workdir, config, tmp_path, quantized):
    """Both exports, opened again, give the log-probs of the run's own model."""
    export.main(config, arguments(workdir, f"--output={tmp_path / 'base'}"))
    shutil.rmtree(workdir / "align" / "model")
    keys = {"path": str(tmp_path / "base"), "tuning": "lora", "quantize": quantized}
    expected = score(make_model(workdir / "align", config, **keys))
    export.main(config, arguments(workdir, f"--output={tmp_path / 'merged'}"))
    export.main(config, arguments(workdir, "--format=adapter", f"--output={tmp_path / 'peft'}"))
    mesh, plain = sharding.make_mesh(config.mesh), default()
    np.testing.assert_allclose(score(policy.open_model(plain, tmp_path / "merged", mesh)), expected, rtol=1e-5)
    plain.model.quantize = quantized
    np.testing.assert_array_equal(score(policy.open_model(plain, tmp_path / "peft", mesh)), expected)
    assert "Next-item recommender" in (tmp_path / "peft" / "README.md").read_text()


def score(model):
    responses = examples.responses(model.encoder, [["Rain", "Harbour"]] * 8)
    return rank.logps(model, model.params, ["Blue Harbour\n"] * 8, *responses)


def test_only_an_adapter_on_a_base_of_ones_own_can_leave_alone(workdir, config, tmp_path):
    words = ["--format=adapter", f"--output={tmp_path / 'peft'}"]
    with pytest.raises(UserError, match="tuned the whole model"):
        export.main(config, arguments(workdir, *words))
    shutil.rmtree(workdir / "align" / "model")
    make_model(workdir / "align", config, tuning="lora")
    with pytest.raises(UserError, match="the base was a new model"):
        export.main(config, arguments(workdir, *words))
    assert not (tmp_path / "peft").exists()


def test_mistakes(workdir, config, tmp_path):
    with pytest.raises(UserError, match="--workdir"):
        export.main(None, arguments(None, "--output=x"))
    with pytest.raises(UserError, match="rosepo sft"):
        export.main(default(), arguments(workdir, "--checkpoint=sft", "--output=x"))
    with pytest.raises(UserError, match="not an empty directory"):
        export.main(config, arguments(workdir, f"--output={tmp_path}"))
    with pytest.raises(SystemExit):
        arguments(workdir, "--checkpoint=oracle", "--output=x")


@pytest.fixture
def asked(tmp_path_factory):
    """(config, workdir) in which only `prepare` is complete; `generate` asks about fewer rows than there are."""
    c, workdir = default(), tmp_path_factory.mktemp("asked")
    c.data.world.update({"users": 40, "titles": 60, "series": 12, "length": 10})
    c.data.core_item, c.data.windows, c.data.held_out_share, c.evaluate.max_generate = 2, True, 0.3, 7
    runtime.execute(prepare, c, workdir)
    return c, workdir


def test_rows_for_other_systems_do_not_hold_the_target(asked, tmp_path, capsys):
    config, workdir = asked
    export.main(config, arguments(workdir, "--format=rows", f"--output={tmp_path / 'out'}"))
    said = capsys.readouterr().out
    names = {"rows.jsonl": "catalogue", "windows.jsonl": "windows", "generate.jsonl": "generate"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)
    users = files.read_json(workdir / "prepare" / "users.json")
    catalogue = Catalogue.load(workdir / "prepare" / "catalogue.jsonl")
    for name, protocol in names.items():
        lines, rows = (
            files.read_jsonl(tmp_path / "out" / name),
            protocols.rows_of(config, workdir / "prepare", protocol),
        )
        assert lines == list(predictions.questions(rows, users, catalogue))
        assert not any("target" in key for line in lines for key in line)
        assert f"{len(rows)} in {name}" in said
    assert len(files.read_jsonl(tmp_path / "out" / "generate.jsonl")) == 7


def test_recbole_trains_on_held_out_rows_too(asked, tmp_path):
    config, workdir = asked
    export.main(config, arguments(workdir, "--format=recbole", f"--output={tmp_path / 'mt'}"))
    sizes = {
        name: len(store.read(workdir / "prepare" / "dataset", name)) for name in ("train", "held_out", "validation")
    }
    assert sizes["held_out"] > 0

    def lines(name):
        return (tmp_path / "mt" / name).read_text("utf-8").splitlines()[1:]

    assert len(lines("mt.train.inter")) == sizes["train"] + sizes["held_out"]
    assert len(lines("mt.valid.inter")) == sizes["validation"]
    rows = files.read_jsonl(workdir / "prepare" / "catalogue.jsonl")
    assert [line.split("\t")[0] for line in lines("mt.item")] == [row["id"] for row in rows]
    test = store.read(workdir / "prepare" / "dataset", "test")
    assert [line.split("\t")[2] for line in lines("mt.test.inter")] == [rows[item]["id"] for item in test.target_E]


def test_recbole_cannot_start_from_nothing(asked, tmp_path):
    config = default()
    config.data.update(asked[0].data)
    config.data.min_history = 0
    runtime.execute(prepare, config, tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.min_history=1"):
        export.main(config, arguments(tmp_path / "run", "--format=recbole", f"--output={tmp_path / 'mt'}"))
    assert not (tmp_path / "mt").exists()


def test_trec_runs_of_all_that_was_evaluated(asked, tmp_path, capsys):
    config, workdir = asked
    words = ["--format=trec", f"--output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="evaluate: not complete; run `rosepo evaluate"):
        export.main(config, arguments(workdir, *words))
    users = files.read_json(workdir / "prepare" / "users.json")
    catalogue = Catalogue.load(workdir / "prepare" / "catalogue.jsonl")
    reciprocal = {}
    for protocol, model in (("candidates", "sft"), ("candidates", "aligned"), ("generate", "my.model")):
        rows = protocols.rows_of(config, workdir / "prepare", protocol)
        score_ExC = np.random.default_rng(len(model)).standard_normal(rows.candidates_ExC.shape)
        answers = Answers(metrics.ranking(score_ExC, rows.candidates_ExC), -np.sort(-score_ExC, axis=1))
        path = workdir / "evaluate" / "predictions" / f"{protocol}.{model}.jsonl"
        predictions.write(path, rows, answers, users, catalogue)
        rank_E = metrics.target_rank(answers.ranked_ExK, rows.target_E, catalogue.title_group_I)
        reciprocal[protocol, model] = metrics.reciprocal_rank(rank_E).tolist()
    files.write_json(workdir / "evaluate" / runtime.MANIFEST, {})
    export.main(config, arguments(workdir, *words))
    assert "3 runs, 2 qrels" in capsys.readouterr().out
    assert len(list((tmp_path / "out").iterdir())) == 5
    for (protocol, model), expected in reciprocal.items():
        wanted = dict(line.split()[::2] for line in (tmp_path / "out" / f"{protocol}.qrels").read_text().splitlines())
        places = dict.fromkeys(wanted)
        for line in (tmp_path / "out" / f"{protocol}.{model}.run").read_text().splitlines():
            qid, _, docno, place, _, tag = line.split()
            assert tag == model
            if wanted[qid] == docno:
                places[qid] = int(place)
        assert [1 / place for place in places.values()] == expected


@pytest.mark.parametrize("format", ["rows", "recbole", "trec"])
def test_no_output_takes_the_place_of_another(asked, tmp_path, format):
    config, workdir = asked
    files.write_json(workdir / "evaluate" / runtime.MANIFEST, {})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="not an empty directory"):
        export.main(config, arguments(workdir, f"--format={format}", f"--output={tmp_path / 'out'}"))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    if format == "recbole":
        with pytest.raises(UserError, match="--output: 'my data' is not a plain name"):
            export.main(config, arguments(workdir, "--format=recbole", f"--output={tmp_path / 'my data'}"))
    with pytest.raises(UserError, match="prepare" if format != "trec" else "evaluate"):
        export.main(config, arguments(tmp_path, f"--format={format}", f"--output={tmp_path / 'other'}"))
