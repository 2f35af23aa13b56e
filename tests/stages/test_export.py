import argparse
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rosepo_jax import files
from rosepo_jax.config import default
from rosepo_jax.errors import UserError
from rosepo_jax.models import checkpoints_hf
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.stages import export, runtime
from rosepo_jax.training import policy

DECODER = DecoderConfig(vocabulary=11, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp_width=6)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A run as its manifests record it; the parameters are new ones."""
    config = default()
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
    params = LanguageModel(DECODER).init(jax.random.key(0))
    monkeypatch.setattr(policy, "load_model", lambda *_: (DECODER, params, tmp_path / "align" / "tokenizer"))
    return tmp_path


def evaluated(workdir, align="id-align"):
    cell = {"value": 0.41234567, "ci95": [0.39, 0.43], "hits": 939, "n": 2290}
    files.write_json(workdir / "evaluate" / runtime.MANIFEST, {"inputs": {"align": align, "sft": "id-sft"}})
    comparison = {
        "protocol": "candidates", "metric": "HR@1", "a": "aligned", "b": "sft", "difference": 0.031,
        "ci95": [0.012, 0.05], "p": 0.002, "test": "paired permutation", "p_holm": 0.004,
    }  # fmt: skip
    models = {"sft": {"HR@1": cell | {"value": 0.77}}, "aligned": {"HR@1": cell, "ARP": {"value": None}}}
    protocols = {"candidates": {"hash": "hash-of-lists", "n": 2290, "models": models}}
    files.write_json(workdir / "evaluate" / "results.json", {"protocols": protocols, "comparisons": [comparison]})


def arguments(workdir, *words):
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    args = parser.parse_args(words)
    args.workdir = workdir
    return args


def test_writes_a_directory_with_a_card(workdir, tmp_path, capsys):
    evaluated(workdir)
    export.main(default(), arguments(workdir, f"--output={tmp_path / 'hf'}"))
    assert checkpoints_hf.read_config(tmp_path / "hf") == DECODER
    params = checkpoints_hf.read(tmp_path / "hf", DECODER)
    expected = policy.load_model(None, None, None)[1]
    assert all(np.array_equal(params[path], expected[path]) for path in expected)
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
    assert "/elsewhere" not in card and '"path": "logs"' in card
    assert "0.77" not in card
    settings = json.loads(card.split("```json\n")[1].split("```")[0])
    assert ConfigDict(settings).align.objective == "rosepo"


def test_results_of_another_checkpoint_are_not_shown(workdir):
    assert "Not evaluated." in export.card(workdir, "align")
    evaluated(workdir, align="id-other")
    card = export.card(workdir, "align")
    assert "Not evaluated." in card and "0.4123" not in card


def test_mistakes(workdir, tmp_path):
    with pytest.raises(UserError, match="--workdir"):
        export.main(None, arguments(None, "--output=x"))
    with pytest.raises(UserError, match="rosepo sft"):
        export.main(default(), arguments(workdir, "--checkpoint=sft", "--output=x"))
    with pytest.raises(UserError, match="not an empty directory"):
        export.main(default(), arguments(workdir, f"--output={tmp_path}"))
    with pytest.raises(SystemExit):
        arguments(workdir, "--checkpoint=oracle", "--output=x")
