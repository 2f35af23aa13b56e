"""Live comparisons run where torch is installed; ROSEPO_PARITY=1 turns its absence into an error.

At the end every kind of figure is shown with its worst share of the tolerance.
"""

import importlib.util
import os
import pathlib
import shutil

import pytest

if importlib.util.find_spec("torch") is None:
    if os.environ.get("ROSEPO_PARITY") == "1":
        raise pytest.UsageError("ROSEPO_PARITY=1, but torch is not installed: pip install -e .[parity,dev]")
    collect_ignore_glob = ["test_*.py"]
else:
    import torch

    torch.set_num_threads(1)  # these models are too small to share; waiting threads only take time from XLA
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def within(request):
    """Asserts error <= tolerance, and reports both with the test."""

    def check(kind: str, name: str, error: float, tolerance: float) -> None:
        figure = (kind, name.partition("-")[0], float(error), float(tolerance))
        request.node.user_properties.append(("error", figure))
        assert error <= tolerance, f"{kind} of {name}: {error:.3g}, allowed {tolerance:.3g}"

    return check


def pytest_terminal_summary(terminalreporter):
    """The worst share of the tolerance by kind and family."""
    worst: dict[tuple[str, str], tuple[float, float, float]] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, value in getattr(report, "user_properties", ()) if getattr(report, "when", "") == "call" else ():
            if name == "error":
                kind, family, error, tolerance = value
                worst[kind, family] = max(
                    worst.get((kind, family), (0.0, 0.0, 0.0)), (error / tolerance, error, tolerance)
                )
    if worst:
        terminalreporter.section("worst errors against torch")
    for (kind, family), (share, error, tolerance) in sorted(worst.items()):
        terminalreporter.line(f"{kind:36} {family:12} {error:9.2e} of {tolerance:9.2e} ({share:4.0%})")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> pathlib.Path:
    """A byte-level tokenizer that every vocabulary of the table holds."""
    from parity import checkpoints
    from rosepo_jax.data.prompts import train_tokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    size = train_tokenizer(checkpoints.TEXTS, checkpoints.SMALLEST_VOCABULARY - 4, directory)
    assert size < checkpoints.SMALLEST_VOCABULARY
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """name -> (directory, torch model), made once each; the directory has the tokenizer too."""
    from parity import checkpoints

    made: dict = {}

    def get(name: str, seed: int = 0):
        if (name, seed) not in made:
            directory = tmp_path_factory.mktemp(name)
            model = checkpoints.make(directory, name, seed=seed)
            shutil.copytree(tokenizer, directory, dirs_exist_ok=True)
            made[name, seed] = directory, model
        return made[name, seed]

    return get
