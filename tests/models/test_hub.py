"""Hub ids: the pinned folder in the hub's own cache, and what is said when nothing can be had."""

import huggingface_hub
import pytest
from huggingface_hub import constants

from rosepo_jax.errors import UserError
from rosepo_jax.models import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and no connection."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *words, **keys: download(*words, cache_dir=tmp_path, **keys)
    )
    return tmp_path


def fill(cache):
    folder = cache / "models--owner--model" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    refs = cache / "models--owner--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    return folder


def test_a_folder_is_its_own_answer(tmp_path, monkeypatch):
    assert hub.local(str(tmp_path)) == (tmp_path, "")
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not hub.is_id("owner/model") and hub.is_id("owner/other")
    for path in ("/abs/olute", "three/part/path", "single", "owner/na me", ""):
        assert not hub.is_id(path)


@pytest.mark.parametrize("revision", ["", "main", COMMIT])
def test_a_model_in_the_cache_is_found_by_branch_and_commit(cache, revision):
    folder = fill(cache)
    assert hub.local("owner/model", revision) == (folder, COMMIT)


@pytest.mark.parametrize(("path", "revision"), [("owner/mo--del", ""), ("owner/..", ""), ("owner/model", "../../../x")])
def test_names_that_no_hub_has(cache, path, revision):
    with pytest.raises(UserError, match=r"the hub has no such model|not the name of a branch"):
        hub.local(path, revision)


def test_offline_the_error_says_how_to_pass_a_directory(cache):
    with pytest.raises(UserError, match=r"owner/model.*hf download owner/model .*--config\.model\.path=DIR"):
        hub.local("owner/model")
    fill(cache)
    with pytest.raises(UserError, match="owner/model"):
        hub.local("owner/model", "f" * 40)
