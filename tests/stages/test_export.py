import argparse
import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from rosepo_jax import files
from rosepo_jax.config import default
from rosepo_jax.data import examples
from rosepo_jax.decoding import rank
from rosepo_jax.errors import UserError
from rosepo_jax.models import checkpoints_hf
from rosepo_jax.stages import export, runtime
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


GROUPS = {"HR@1 by decile": {"value": [0.5, 0.25], "n": [4, 4]}, "calibration": {"bins": [1, 2]}, "curve": [0.1, 0.2]}


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
    settings = {"model": {"path": "owner/model", "adapter": "/home/me/adapter"}, "seed": 0}
    assert export._without_folders(settings) == {"model": {"path": "owner/model", "adapter": "adapter"}, "seed": 0}
    assert export._without_folders({"model": {"path": "/home/me/model"}}) == {"model": {"path": "model"}}


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
    batch = examples.prompts(model.encoder, ["Blue Harbour\n"]) | examples.responses(
        model.encoder, [["Rain", "Harbour"]]
    )
    return rank.logps(model, model.params, {name: np.repeat(x, 8, axis=0) for name, x in batch.items()})


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
