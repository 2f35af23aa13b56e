"""Launchers run against stand-ins for what they call."""

import os
import pathlib

import pytest
from stand_ins import StandIns

EXPECTED = pathlib.Path(__file__).parent / "expected"


@pytest.fixture
def stand_ins(tmp_path) -> StandIns:
    return StandIns(tmp_path)


@pytest.fixture
def same_as_printed(stand_ins):
    """Runs what a dry run printed as a script: it must call what the launcher itself had called."""

    def check(printed: str) -> None:
        calls = stand_ins.calls()
        stand_ins.forget()
        done = stand_ins.run("bash", "-euc", printed)
        assert done.returncode == 0, done.stderr
        assert stand_ins.calls() == calls

    return check


@pytest.fixture
def as_expected():
    """Compares with a file in expected/; ROSEPO_UPDATE=1 writes it."""

    def check(name: str, text: str) -> None:
        path = EXPECTED / name
        if os.environ.get("ROSEPO_UPDATE"):
            path.write_text(text)
        assert text == path.read_text()

    return check
