"""The decoding benchmark at a tiny size, our half of it: figures are there, and its problem is worth measuring."""

import dataclasses
import importlib.util
import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


def load(name):
    specification = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


decode = load("decode")
TINY = dataclasses.replace(
    decode.DECODER, vocabulary=512, width=64, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_width=16
)
SIZES = dict(users=4, P=10, items=60, T=5)


def test_completed_lists_are_the_best_of_all_candidates():
    """Scoring and searching answer alike, for prompts and titles of unequal lengths."""
    problem = decode.make_problem(TINY, **SIZES, candidates=60)
    ours = decode.Ours(problem, beams=3, k=3, budget=200)
    scores_UxI, catalogue, completed = ours.candidates(), ours.catalogue(), ours.completed()
    place_UxI = np.argsort(-scores_UxI, axis=1)[:, :3]
    assert completed.certified_U.all() and not catalogue.certified_U.all()
    np.testing.assert_array_equal(completed.items_Uxk, np.take_along_axis(problem.candidates_UxC, place_UxI, axis=1))
    best = np.take_along_axis(scores_UxI, place_UxI, axis=1)
    np.testing.assert_allclose(completed.scores_Uxk, best, rtol=1e-5, atol=1e-5)


def test_a_better_list_than_a_proved_one_is_a_failure():
    scores, same = np.array([[-1.0, -2.0], [-1.0, -2.0]]), np.array([[0, 1], [2, 3]])

    def verdict(theirs):
        answers = {("candidates", name): scores for name in ("ours", "transformers")}
        for figure in ("catalogue", "completed"):
            answers[figure, "ours"] = decode.Top(same, scores, np.array([True, False]))
        answers["catalogue", "transformers"] = decode.Top(same, theirs, np.zeros(2, bool))
        return all(row["value"] <= row.get("at most", row["value"]) for row in decode.agreement(answers))

    assert verdict(scores)
    assert verdict(scores + np.array([[-0.5], [0.5]]))  # worse than a proof, better than no proof
    assert not verdict(scores + np.array([[0.5], [0.0]]))


def test_every_figure_is_there(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(decode, "DECODER", TINY)
    append = decode.record.append
    monkeypatch.setattr(decode.record, "append", lambda command, rows: append(command, rows, tmp_path / "R.md"))
    sizes = ["--users=4", "--P=10", "--items=60", "--T=5", "--candidates=60", "--beams=3", "--k=3", "--budget=200"]
    assert decode.main([*sizes, "--repeats=2", "--alone", "--record"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["figure"] for row in rows if row.get("unit") == "users/s"] == ["candidates", "catalogue", "completed"]
    assert {row["figure"]: row["value"] for row in rows}["completed: certified"] == 1.0
    for row in rows:
        assert row.get("low", row["value"]) <= row["value"] <= row.get("high", row["value"])
    assert "`python benchmarks/decode.py --users=4 " in (tmp_path / "R.md").read_text("utf-8")
