"""Hostile input: whatever stands in a file, its loader works or says in one line what is wrong, soon, and does nothing
else. ROSEPO_FUZZ=10000 is the number of cases a loader; the default is for every day."""

import os

import harness
import pytest
from loaders import LOADERS

CASES = int(os.environ.get("ROSEPO_FUZZ", harness.DEFAULT))


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.name)
def test_any_content(loader, tmp_path):
    folder = tmp_path / "case"
    folder.mkdir()
    loader.make(folder)
    harness.survives(loader, folder, max(int(CASES * loader.share), 3))
