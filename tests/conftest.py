"""Test-wide settings: eight emulated CPU devices, exact matmuls, no silent rank promotion; where the real logs lie."""

import os
import pathlib

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Timing decides no test.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
DATA = pathlib.Path(os.environ.get("ROSEPO_DATA", REPOSITORY.parent / "shared" / "data"))


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory) -> None:
    """The commands that tests start, in whichever worker, take compiled programs from each other; this process, where
    JAX has read its settings already, does not."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(shared / "programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder of real logs. Missing in CI is a failure; elsewhere the test is skipped with the reason."""
    if not DATA.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{DATA}: no such folder (set ROSEPO_DATA)")
        pytest.skip(f"real logs not found at {DATA} (set ROSEPO_DATA)")
    return DATA
