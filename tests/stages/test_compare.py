"""`rosepo report RUN RUN`: from folders to comparison.html and comparison.json."""

import pathlib
import re
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "evaluation"))
import reported

from rosepo_jax import files
from rosepo_jax.__main__ import main


def test_runs_are_compared_by_the_command_line(tmp_path, capsys):
    for name, seed, hits, beta in (("a", 0, 20, 0.1), ("b", 1, 26, 0.1), ("c", 0, 30, 0.3)):
        reported.run(tmp_path / "runs" / name, seed, hits, **{"align.beta": beta})
    folders = [str(tmp_path / "runs" / name) for name in "abc"]
    assert main(["report", *folders]) == 0
    output = tmp_path / "runs" / "comparison"
    found = files.read_json(output / "comparison.json")
    assert [group["runs"] for group in found["groups"]] == [["a", "b"], ["c"]]
    first = next(row for row in found["comparisons"] if row["a"] == "aligned [beta=0.3]")
    assert first["difference"] == pytest.approx((30 - 23) / 40)
    assert first["n"] == 40
    page = (output / "comparison.html").read_text("utf-8")
    assert (
        re.search(r"0\.575 ± 0\.106 <small>\[0\.4\d\d, 0\.\d{3}\]</small> <small>0\.500 · 0\.650</small>", page)
        and page.count("<svg") == 2
    )
    printed = capsys.readouterr().out
    assert "aligned [beta=0.3] - aligned [beta=0.1], HR@1 (candidates): +0.175" in printed
    assert printed.endswith(f"\n{output / 'comparison.html'}\n")

    elsewhere = tmp_path / "elsewhere"
    assert main(["report", *folders[1:], f"--output={elsewhere}", "--protocols=candidates"]) == 0
    assert {path.name for path in elsewhere.iterdir()} == {"comparison.html", "comparison.json"}


def test_an_equal_title_is_a_hit(tmp_path):
    """As it was when the run was evaluated: Heat and HEAT are one answer."""
    from rosepo_jax.stages import compare

    rows = [{"row": 0, "user": "u", "position": 7, "target": "i0", "ranked": [None, "i2", "i3"]}]
    folder = reported.run(tmp_path / "a")
    files.write_jsonl(folder / "evaluate" / "predictions" / "candidates.aligned.jsonl", rows)
    (run,) = compare.read([folder])
    assert run.rank["candidates", "aligned"] == {(0, "u", 7, "i0"): 3.0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "at least two runs; the report of one: rosepo report --workdir="),
        (["a", "a/../a"], "at least two runs"),
        (["a", "empty"], "empty: no complete evaluation there; run `rosepo run"),
        (["a", "b", "--protocols=candidate"], "--protocols=candidate: no run has it; there are candidates"),
        (["a", "b", "--workdir=x"], "takes the folders of runs alone"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        reported.run(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "comparison").exists()
