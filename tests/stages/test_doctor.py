"""doctor: what it says about versions, and that it works where nothing is installed."""

import os
import pathlib
import subprocess
import sys

import pytest

import rosepo_jax
from rosepo_jax import __main__ as cli
from rosepo_jax import config as defaults
from rosepo_jax import configuration
from rosepo_jax.errors import UserError
from rosepo_jax.models import families
from rosepo_jax.stages import doctor
from rosepo_jax.training import memory, sharding

CONFIGS = pathlib.Path(rosepo_jax.__file__).parent.parent / "configs"


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


# ---- Memory ----------------------------------------------------------------------------------------------------------


def table(said):
    """{row: (sft, align)} of what doctor has printed, in GiB."""
    rows = [line.rsplit(maxsplit=2) for line in said.splitlines() if line.startswith("  ")]
    return {row[0].strip(): (float(row[1]), float(row[2])) for row in rows if row[0].strip() in doctor._ROWS}


def test_a_run_that_fits(capsys):
    assert cli.main(["doctor", f"--config={CONFIGS / 'llama3_8b.py'}"]) == 0
    said = capsys.readouterr().out
    rows = table(said)
    assert set(rows) == set(doctor._ROWS)
    base, adapters = 8_030_261_248 * 2 / 2**30, 41_943_040 * 4 / 2**30
    assert rows["frozen parameters"] == pytest.approx((base, base), abs=0.006)
    assert rows["trained parameters"] == pytest.approx((adapters, adapters), abs=0.006)
    assert rows["reference"] == pytest.approx((0, adapters), abs=0.006)
    assert rows["optimizer"] == pytest.approx((2 * adapters, 2 * adapters), abs=0.006)
    assert "8,030,261,248 parameters frozen, 41,943,040 trained" in said
    assert "h100: 79.6 GiB" in said and ": fits" in said and "MEM_FRACTION" in said and "all is well" in said


def test_a_run_that_does_not_fit_says_by_how_much(capsys):
    assert cli.main(["doctor", f"--config={CONFIGS / 'llama3_8b.py'}:full,h100-1"]) == 2
    said = capsys.readouterr()
    total = table(said.out)["total"]
    usable = memory.USABLE * memory.HARDWARE["h100"] / 2**30
    for stage, needed in zip(("sft", "align"), total):
        assert f"problem: {stage} lacks {needed - usable:.1f} GiB on each device" in said.err
    assert "does not fit" in said.out and "2 to mend" in said.out and "MEM_FRACTION" not in said.out


def test_an_ordinary_run_is_counted_on_the_devices_that_are_here(capsys):
    assert cli.main(["doctor", f"--config={CONFIGS / 'demo.py'}:smoke", "--config.model.tuning=lora"]) == 0
    said = capsys.readouterr().out
    assert "one of 8 devices (1 replica x 8 fsdp x 1 tensor)" in said and "cpu: " in said and ": fits" in said


def test_which_model_is_counted(tmp_path):
    c = defaults.default()
    assert doctor.planned_model(c).config.width == c.model.width and doctor.planned_model(c).config.vocabulary == 4096
    c.model.path = "owner/name"
    with pytest.raises(UserError, match=r"owner/name.*model\.architecture"):
        doctor.planned_model(c)
    c.model.architecture = "qwen3-4b"
    assert doctor.planned_model(c).config == families.architecture("qwen3-4b")
    c.model.path = str(tmp_path)
    shipped = pathlib.Path(families.__file__).parent / "architectures" / "llama3.2-1b.json"
    (tmp_path / "config.json").write_bytes(shipped.read_bytes())
    assert doctor.planned_model(c).config == families.architecture("llama3.2-1b")
    c.model.tuning, c.model.quantize = "lora", "nf4"
    assert doctor.planned_model(c).quantize == "nf4" and doctor.planned_model(c).lora.rank == 8


def test_unknown_hardware_is_refused(capsys):
    config = f"--config={CONFIGS / 'demo.py'}"
    assert cli.main(["doctor", config, "--config.mesh.hardware=h10"]) == 2
    assert "did you mean h100" in capsys.readouterr().err
    assert cli.main(["doctor", config, "--config.mesh.fsdp=3"]) == 2
    assert "but there are 8 devices" in capsys.readouterr().err


PUBLISHED = [path.stem for path in sorted(CONFIGS.glob("*.py")) if "published_model" in path.read_text("utf-8")]


def fits(name, words):
    """Whether doctor would say so, on the rows with the longest titles."""
    c = configuration.load(f"{CONFIGS / name}.py:goodreads{words}")
    found = memory.stages(c, doctor.planned_model(c), sharding.planned_mesh(c.mesh, c.mesh.devices))
    return max(needed.total for needed in found.values()) <= memory.USABLE * memory.HARDWARE[c.mesh.hardware]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_fit_on_the_hardware_of_their_configs(name):
    """The tightest machines for all models; the others hold more, or fewer rows at a time, and are tried with one."""
    every = {"llama3_8b": defaults.MACHINES, "llama3_70b": ("h200-8", "v5p-64")}
    machines = every.get(name, ("h100-1", "v5e-16"))
    assert [hardware for hardware in machines if not fits(name, f",{hardware}")] == []
    assert fits(name, ",full")
