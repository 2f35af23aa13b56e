"""doctor: what it says about versions, and that it works where nothing is installed."""

import os
import pathlib
import subprocess
import sys

import pytest

import rosepo_jax
from rosepo_jax import __main__ as cli
from rosepo_jax.stages import doctor


@pytest.mark.parametrize(
    ("jax", "flax", "bad"),
    [
        ("0.11.1", "0.12.8", True),
        ("0.12.0.1", "0.12.7", True),
        ("0.12.0", "0.9", True),
        ("0.11.1", "0.12.9", False),
        ("0.11.0", "0.12.8", False),
        ("0.10.2", "0.12.8", False),
        ("0.12.0.1", "0.12.12", False),
    ],
)
def test_known_bad_pairs(jax, flax, bad):
    reason = doctor.known_bad(jax, flax)
    assert (reason is not None) == bad
    if reason:
        assert jax in reason and flax in reason and "MutableHiType" in reason


def test_every_verb_refuses_a_known_bad_pair(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "version", {"jax": "0.11.1", "flax": "0.12.8"}.get)
    assert cli.main(["prepare"]) == 2
    assert "MutableHiType" in capsys.readouterr().err


def test_all_is_well_here(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "all is well" in said and "devices: 8 x cpu" in said
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in said


def test_a_missing_and_an_old_package_are_named(monkeypatch, capsys):
    installed = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: {"grain": None, "numpy": "1.0"}.get(name, installed(name)))
    assert cli.main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert "grain is missing" in error and "numpy 1.0" in error and "pip install" in error


def test_doctor_works_where_nothing_is_installed():
    """-S: no site-packages, as in an environment that has only the package itself."""
    root = pathlib.Path(rosepo_jax.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-S", "-m", "rosepo_jax", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=root.parent)
    assert done.returncode == 2
    assert "is missing" in done.stderr and "Traceback" not in done.stderr
