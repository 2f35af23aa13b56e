"""The command line: overrides, where configs come from, one-line errors, exit statuses."""

import errno
import pathlib
import subprocess
import sys
import types

import pytest

from rosepo_jax import __main__ as cli
from rosepo_jax.stages import STAGES, runtime

CONFIG = """
from rosepo_jax import config

def get_config(arg=""):
    c = config.default()
    if arg == "smoke":
        c.align.beta = 0.7
    return c
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.py").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def executed(monkeypatch):
    """What the command line asks the runtime to do, instead of doing it."""
    calls = []
    monkeypatch.setattr(runtime, "module", lambda verb: types.SimpleNamespace(NAME=verb))
    monkeypatch.setattr(runtime, "execute", lambda stage, config, workdir: calls.append((stage.NAME, config, workdir)))
    return calls


def python(*words, cwd):
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_both_ways_to_write_an_override_and_their_types(here, executed):
    words = "--config.align.beta=0.3 --config.align.smoothing.mode fixed --config.seed=7 --config.log.tensorboard=false"
    assert cli.main(["align", "--config=configs/demo.py", "--workdir=w", *words.split()]) == 0
    [(verb, config, workdir)] = executed
    assert (verb, workdir) == ("align", pathlib.Path("w"))
    assert config.align.beta == 0.3
    assert config.align.smoothing.mode == "fixed"
    assert config.seed == 7 and type(config.seed) is int
    assert config.log.tensorboard is False


def test_run_is_every_stage_in_order(here, executed):
    assert cli.main(["run", "--workdir=w"]) == 0
    assert [verb for verb, *_ in executed] == list(STAGES)


def test_argument_of_a_config_and_the_default_workdir(here, executed):
    assert cli.main(["sft", "--config=configs/demo.py:smoke"]) == 0
    [(_, config, workdir)] = executed
    assert config.align.beta == 0.7
    assert workdir == pathlib.Path("runs/demo-smoke")
    assert cli.main(["sft"]) == 0
    assert executed[1][1].align.beta == 0.1
    assert executed[1][2] == pathlib.Path("runs/demo")


def test_a_workdir_brings_its_own_config(here, executed):
    (here / "w").mkdir()
    (here / "w" / "config.json").write_text('{"align": {"beta": 0.9}, "evaluate": {"protocols": ["candidates"]}}')
    assert cli.main(["align", "--workdir=w", "--config.seed=3"]) == 0
    [(_, config, _)] = executed
    assert (config.align.beta, config.seed, config.evaluate.protocols) == (0.9, 3, ("candidates",))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["aling"], ["rosepo aling: ", "did you mean align?"]),
        (["align", "--config.align.bta=1"], ["rosepo align: ", "align.bta", "did you mean align.beta?"]),
        (["align", "--config.align.beta=big"], ["config.align.beta", "'big'", "a number"]),
        (["align", "--config.sft.batch_size=1.5"], ["config.sft.batch_size", "'1.5'", "an integer"]),
        (["align", "--config.log.tensorboard=yes"], ["config.log.tensorboard", "true or false"]),
        (["align", "--config.align=1"], ["config.align is a section"]),
        (["align", "--config.align.beta"], ["--config.align.beta needs a value"]),
        (["align", "--config.align.beta", "--workdir=w"], ["--config.align.beta needs a value"]),
        (["align", "--wokdir=w"], ["--wokdir", "did you mean --workdir?"]),
        (["align", "--config=configs/dmo.py"], ["configs/dmo.py: no such config file", "did you mean demo.py?"]),
        (["sweep", "--sweep=align.beta"], ["--sweep=align.beta", "KEY=V1,V2"]),
        (["sweep"], ["has no get_sweep()"]),
    ],
)
def test_mistakes_are_one_line_and_status_2(here, executed, capsys, words, parts):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    assert all(part in error for part in parts), error
    assert not executed
    assert not (here / "w").exists() and not (here / "runs").exists()


@pytest.mark.parametrize("key", ["data.path", "data.titles", "model.path", "pairs.path"])
def test_a_name_that_is_too_long(here, capsys, key):
    assert (
        cli.main(["prepare", "--config.data.source=table", "--config.data.path=x", f"--config.{key}={'x' * 5000}"]) == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("rosepo prepare: ") and error.count("\n") == 1 and len(error) < 2200


def test_what_the_system_refuses_is_one_line_and_a_bug_is_not(here, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "w/a\nb")

    monkeypatch.setattr(runtime, "execute", refuse)
    assert cli.main(["prepare"]) == 2
    assert capsys.readouterr().err == "rosepo prepare: w/a\\nb: No space left on device\n"
    monkeypatch.setattr(runtime, "execute", lambda *_: pathlib.Path("nowhere").read_text())
    with pytest.raises(FileNotFoundError):
        cli.main(["prepare"])


def test_interrupted_is_130(here, executed, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "execute", interrupt)
    assert cli.main(["prepare"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_bugs_keep_their_traceback(here, executed, monkeypatch):
    monkeypatch.setattr(runtime, "execute", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["prepare"])


def test_without_a_config_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare"]) == 2
    assert "--config=NAME.py" in capsys.readouterr().err


@pytest.fixture
def tool(monkeypatch):
    """Stands for recommend and score: what they are called with."""
    called = []

    def add_arguments(parser):
        parser.add_argument("--model", type=pathlib.Path)

    def main(config, args):
        called.append((config, args))

    module = types.SimpleNamespace(add_arguments=add_arguments, main=main)
    for verb in ("recommend", "score"):
        monkeypatch.setitem(sys.modules, f"rosepo_jax.stages.{verb}", module)
    return called


def test_a_tool_takes_the_config_of_its_workdir(here, tool, capsys):
    assert cli.main(["recommend", "--workdir=w"]) == 2
    assert "w: no config.json there; run `rosepo run --workdir=w` first" in capsys.readouterr().err
    assert cli.main(["recommend"]) == 2
    assert "--workdir=DIR" in capsys.readouterr().err
    (here / "w").mkdir()
    (here / "w" / "config.json").write_text('{"data": {"history": 3}}')
    assert cli.main(["recommend", "--workdir=w", "--config.evaluate.beams=5"]) == 0
    [(config, args)] = tool
    assert (config.data.history, config.evaluate.beams, args.workdir) == (3, 5, pathlib.Path("w"))


def test_score_takes_the_config_of_the_run_that_made_the_model(here, tool):
    (here / "w" / "align").mkdir(parents=True)
    (here / "w" / "config.json").write_text('{"data": {"template": "mine"}}')
    (here / "w" / "align" / "model.json").write_text("{}")
    assert cli.main(["score", "--model=w/align"]) == 0
    assert cli.main(["score", "--model=a-hugging-face-directory", "--config.mesh.fsdp=2"]) == 0
    assert [config.data.template for config, _ in tool] == ["mine", "titles"]
    assert tool[1][0].mesh.fsdp == 2


def test_help_and_mistakes_import_nothing_heavy(here):
    code = (
        "import sys; from rosepo_jax.__main__ import main; main(['--help']); main(['aling']); "
        "heavy = {'jax', 'flax', 'numpy', 'transformers', 'tensorflow_datasets', 'orbax'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = python("-c", code, cwd=here)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in (*STAGES, "run", "sweep", "recommend", "score", "export", "doctor"))


def test_help_of_every_stage_and_command(here, capsys):
    for verb in (*STAGES, "run", "sweep", "doctor"):
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, "--help"])
        assert ended.value.code == 0
        assert "--config.KEY=VALUE" in capsys.readouterr().out


def test_as_a_module_from_a_shell(here):
    done = python("-m", "rosepo_jax", "align", "--config.align.bta=1", cwd=here)
    assert done.returncode == 2
    assert done.stderr == "rosepo align: unknown config key align.bta; did you mean align.beta?\n"
