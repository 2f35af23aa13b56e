"""From a real pretrained model to an exported recommender on a real log, as the README says: convert, run, export."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def command(*words):
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPOSITORY,
        env={key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def rosepo(*words):
    return command("-m", "rosepo_jax", *words)


@pytest.fixture(scope="module")
def pretrained(real_data, tmp_path_factory):
    source, folder = real_data / "ckpt-stories260k", tmp_path_factory.mktemp("stories") / "hf"
    command("benchmarks/convert_llama2c.py", source / "stories260K.bin", source / "tok512.bin", folder)
    return folder


def start(real_data, pretrained, workdir, *words):
    """Options that start a small run on LLaRA's LastFM from the pretrained model."""
    few = [
        "--config.sft.keep=last",
        "--config.data.history=3",
        "--config.data.max_test=16",
        "--config.data.max_validation=16",
    ]
    paths = [f"--config.model.path={pretrained}", f"--config.data.path={real_data / 'llara-lastfm'}"]
    return ["--config=configs/lastfm.py:stories260k,smoke", f"--workdir={workdir}", *paths, *few, *words]


def moved(pretrained, exported):
    """Relative change of every tensor by training."""
    before, after = (safetensors.numpy.load_file(folder / "model.safetensors") for folder in (pretrained, exported))
    assert before.keys() == after.keys()
    return {n: np.linalg.norm(after[n] - value) / np.linalg.norm(value) for n, value in before.items()}


@pytest.mark.real_data
def test_full_tuning_starts_from_the_pretrained_weights(real_data, pretrained, tmp_path):
    options = start(real_data, pretrained, tmp_path / "run")
    for verb in ("prepare", "sft"):
        rosepo(verb, *options)
    manifest = json.loads((tmp_path / "run" / "sft" / "manifest.json").read_text())
    assert manifest["result"]["base"]["path"] == str(pretrained) and manifest["inputs"]["model.path"]
    rosepo("export", f"--workdir={tmp_path / 'run'}", "--checkpoint=sft", f"--output={tmp_path / 'out'}")
    change = moved(pretrained, tmp_path / "out")  # a few steps on: near it, but not it
    assert all(0 < value < 0.5 for value in change.values()), change


@pytest.mark.real_data
def test_adapters_from_the_pretrained_model_to_both_exports(real_data, pretrained, tmp_path):
    workdir = tmp_path / "run"
    words = ["--config.model.tuning=lora", "--config.model.quantize=int8", "--config.evaluate.protocols=candidates"]
    rosepo("run", *start(real_data, pretrained, workdir, *words))
    results = json.loads((workdir / "evaluate" / "results.json").read_text())
    assert {"sft", "aligned"} <= results["protocols"]["candidates"]["models"].keys()
    rosepo("export", f"--workdir={workdir}", f"--output={tmp_path / 'out'}")
    rosepo("export", f"--workdir={workdir}", "--format=adapter", f"--output={tmp_path / 'adapter'}")
    assert "| HR@1 |" in (tmp_path / "out" / "README.md").read_text()
    for name, value in moved(pretrained, tmp_path / "out").items():
        assert (0 < value < 0.5) == ("_proj" in name), name

    rows = [{"prompt": "Kylie Minogue\n", "response": name} for name in ("Glee Cast", "All Time Low")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = []
    for number, model in enumerate((workdir / "align", tmp_path / "out", tmp_path / "adapter")):
        files = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / f'{number}.jsonl'}"]
        quantized = ["--config.model.quantize=int8"] if model.name == "adapter" else []
        rosepo("score", f"--model={model}", *files, *quantized)
        scores.append([json.loads(line)["logp"] for line in (tmp_path / f"{number}.jsonl").read_text().splitlines()])
    np.testing.assert_allclose(scores[1:], [scores[0]] * 2, atol=1e-4)
