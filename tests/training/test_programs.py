"""Compiled programs that outlive the process."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from rosepo_jax import config as defaults
from rosepo_jax.errors import UserError
from rosepo_jax.training import programs


def keep(folder):
    config = defaults.default()
    config.log.compilation_cache = folder
    programs.keep(config)


@pytest.fixture
def no_cache():
    """No folder of compiled programs, before and after the test."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("no_cache")
def test_they_are_kept_and_taken_again(tmp_path, monkeypatch):
    def cached():
        return sorted(path.name for path in tmp_path.rglob("*-cache"))

    def compute():
        jax.clear_caches()
        return float(jax.jit(lambda x: x * 3 + 1)(2.0))

    keep("")
    assert jax.config.jax_compilation_cache_dir is None
    keep(str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    assert compute() == 7 and (kept := cached())
    monkeypatch.setattr("jax._src.compiler.backend_compile_and_load", None)  # nothing is compiled
    assert compute() == 7 and cached() == kept


@pytest.mark.usefixtures("no_cache")
def test_where_they_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    keep("auto")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    (tmp_path / "rosepo_jax").touch()  # no folder can be made there
    keep("auto")
    assert jax.config.jax_compilation_cache_dir is None
    with pytest.raises(UserError, match=r"log\.compilation_cache"):
        keep(str(tmp_path / "rosepo_jax"))
    (tmp_path / "rosepo_jax").unlink()
    keep("auto")
    assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / "rosepo_jax"))
    chosen = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    keep("auto")
    assert jax.config.jax_compilation_cache_dir == chosen
