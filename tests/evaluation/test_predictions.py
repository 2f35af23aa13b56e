"""Anyone's answers are read strictly, ours come back as they were, and other tools find our numbers in our files."""

import csv
import json
import math
import urllib.parse

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.rows import Rows
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import matching, metrics, predictions, summary
from rosepo_jax.evaluation.answers import NO_ANSWER, NOT_AN_ITEM, Answers

IDS = ("a 1", "b/2", "c\n3", "NA", "%e", 'f"', "7", "é")
TITLES = ("Alien", "Aliens", "Heat", "HEAT ", "Up", '"Supper" Club', "None", "Café  Noir")
CATALOGUE = Catalogue(IDS, TITLES, (("Sci Fi", "Drama"), *[()] * 7), np.array([9, 5, 4, 3, 2, 1, 1, 0]))
USERS = ("u 0", "u1", "null")
# The rows of u 0 at 3 and at 5, and of u1 at 2; the third user has none.
ROWS = Rows(
    np.array([0, 0, 1]),
    np.array([3, 5, 2]),
    np.array([[4, 5], [4, -1], [6, 0]]),
    np.array([0, 2, 7]),
    np.array([[1, 0, 3], [2, 1, 0], [3, 5, 7]]),
)
GOOD = (
    {"user": "u 0", "position": 3, "ranked": ["NA", "a 1"]},
    {"user": "u 0", "position": 5, "ranked": []},
    {"user": "u1", "ranked": [None, "é", 7]},
)


@pytest.fixture
def read(tmp_path):
    """Reads lines, given as objects or as raw text, as a prediction file."""
    path = tmp_path / "p.jsonl"

    def read(*lines, **keys):
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return predictions.read(path, ROWS, USERS, CATALOGUE, **keys)

    return read


def with_(line, **fields):
    """GOOD with fields of one line replaced; None takes a field out."""
    changed = {key: value for key, value in (GOOD[line] | fields).items() if value is not None}
    return [*GOOD[:line], changed, *GOOD[line + 1 :]]


# Reading


def test_ids_are_raw_null_is_no_item_and_an_empty_list_is_no_answer(read):
    found = read(*GOOD)
    assert found.ranked_ExK.tolist() == [[3, 0, -2], [-2, -2, -2], [-1, 7, 6]]
    assert np.isnan(found.score_ExK).all() and found.score_ExK.shape == (3, 3)
    assert found.certified_E is found.full_score_ExC is found.text is found.ambiguous_E is None


def test_an_empty_list_is_a_miss(read):
    ground = summary.Ground(ROWS, CATALOGUE, None, 1)
    hits = summary.by_row(read(*with_(1, ranked=[])), ground)["HR@1"], summary.by_row(read(*GOOD), ground)["MRR"]
    assert hits[0].tolist() == [0, 0, 0] and hits[1].tolist() == [1 / 2, 0, 1 / 2]


def test_lines_may_stand_in_any_order_and_say_their_row(read):
    by_row = [{"row": row, "ranked": line["ranked"]} for row, line in enumerate(GOOD)]
    np.testing.assert_array_equal(read(*by_row[::-1]).ranked_ExK, read(*GOOD).ranked_ExK)
    both = [line | {"row": row, "target": IDS[ROWS.target_E[row]]} for row, line in enumerate(GOOD)]
    np.testing.assert_array_equal(read(both[1], "", both[2], both[0]).ranked_ExK, read(*GOOD).ranked_ExK)


def test_lists_are_cut_and_are_as_long_as_the_longest(read):
    scored = with_(2, scores=[3, 2.5, -1e300])
    assert read(*scored, depth=2).ranked_ExK.tolist() == [[3, 0], [-2, -2], [-1, 7]]
    assert read(*scored, depth=2).score_ExK[2].tolist() == [3, 2.5]
    nothing = [{"row": row, "ranked": []} for row in range(3)]
    assert read(*nothing).ranked_ExK.tolist() == [[NO_ANSWER]] * 3
    assert read(*with_(1, ranked=[None] * predictions.LIMIT)).ranked_ExK.shape == (3, 1000)


def test_titles_that_no_item_has_and_repetitions_are_answers(read):
    lists = ["alien ", "Nothing", "ALIEN"], ["heat"], ["cafe\u0301 noir\nand more", ""]
    found = read(*({"row": row, "titles": titles} for row, titles in enumerate(lists)))
    assert found.ranked_ExK.tolist() == [[0, -1, 0], [2, -2, -2], [7, -1, -2]]
    assert found.ambiguous_E.tolist() == [False, True, False]


def test_texts_are_matched_as_those_of_our_models(read):
    texts, ended = ["Alien", "Heat", "Up"], [True, False, True]
    lines = [{"row": row, "text": text} | ({} if ends else {"ended": False}) for row, (text, ends) in
             enumerate(zip(texts, ended))]  # fmt: skip
    found, expected = read(*lines), matching.read(texts, ended, CATALOGUE, ROWS)
    assert found.status == expected.status == ["candidate", "truncated", "not_a_candidate"]
    np.testing.assert_equal(vars(found), vars(expected))


def test_scores_of_exactly_the_candidates_are_scores_of_the_list(read):
    ranked = [["a 1", "NA", "b/2"], ["a 1", "b/2", "c\n3"], ["é", "NA", 'f"']]
    lines = [{"row": row, "ranked": items, "scores": [3, 2, row]} for row, items in enumerate(ranked)]
    assert read(*lines).full_score_ExC.tolist() == [[0, 3, 2], [1, 2, 3], [2, 2, 3]]
    assert read(lines[0], lines[1], lines[2] | {"scores": None}).full_score_ExC is None
    assert read(lines[0], lines[1], lines[2] | {"ranked": ["é", "NA", "a 1"]}).full_score_ExC is None


def test_what_kind_of_file_it_is(tmp_path, read):
    read(*GOOD)
    assert predictions.kind(tmp_path / "p.jsonl") == "ranked"
    candidates = read({"row": 0, "titles": ["heat", "?"]}, {"row": 1, "titles": []}, {"row": 2, "titles": ["Heat"]})
    assert predictions.only_candidates(candidates, ROWS, CATALOGUE)  # by title: 3 is listed, the answer is 2
    assert not predictions.only_candidates(read(*GOOD), ROWS, CATALOGUE)


DEEP = "[" * 100_000
HALF = '{"row": 0, "text": "\\ud800"}'
MISTAKES = {
    "row 1 is not valid JSON": ["{"],
    "row 2 is not valid JSON": [GOOD[0], '{"row": 1, "ranked": ' + DEEP],
    "row 3 is not a JSON object": [*GOOD[:2], "[1]"],
    "row 1 is longer than 1048576 bytes": ['{"row": 0, "text": "' + "x" * (1 << 20)],
    "row 1 is not utf-8": ['{"row": 0, "text": "\ud800"}'],
    "the file is empty": [],
    "row 1 needs `user` or `row`": [{"position": 3, "ranked": []}],
    "row 2: user 'u9' is not in the log": with_(1, user="u9"),
    "row 3: none of the 3 rows is user 'null'": with_(2, user="null"),
    "row 2: none of the 3 rows is user 'u 0', position 4": with_(1, position=4),
    "row 2: none of the 3 rows is user 'u 0', position 1000": with_(1, position=10**400),
    "row 2: none of the 3 rows is row 3": with_(1, row=3, user=None, position=None),
    "row 2: none of the 3 rows is row -1": with_(1, row=-1, user=None, position=None),
    "row 2: none of the 3 rows is row 2, user 'u 0'": with_(1, row=2, position=None),
    "row 2: row True is not a whole number": with_(1, row=True),
    "row 2: row 1.0 is not a whole number": with_(1, row=1.0),
    "row 2: position '5' is not a whole number": with_(1, position="5"),
    "row 2: user '[1]' is neither text nor a whole number": with_(1, user=[1]),
    "row 1: 2 rows are user 'u 0'; say which by `position`": with_(0, position=None),
    "row 2 answers user 'u 0' at position 3, which row 1 has answered": with_(1, position=3),
    "row 1: item id 'a 1' stands in `ranked` twice": with_(0, ranked=["a 1", None, None, "a 1"]),
    "row 3: item id 'z' is not in the catalogue": with_(2, ranked=["é", "z"]),
    "row 3: item id 'alien' is not in the catalogue; titles go into `titles`": with_(2, ranked=["alien"]),
    "row 3: item id '1.5' is neither text nor a whole number": with_(2, ranked=[1.5]),
    "row 3: item id 'True' is neither": with_(2, ranked=[True]),
    "row 3: item id '{}' is neither": with_(2, ranked=[{}]),
    "row 3: ranked 'é' is not a list of item ids": with_(2, ranked="é"),
    "row 3: ranked {'é': 1} is not a list": with_(2, ranked={"é": 1}),
    "row 1: titles 'Up' is not a list of titles": with_(0, ranked=None, titles="Up"),
    "row 1: titles [None] is not a list of titles": with_(0, ranked=None, titles=[None]),
    "row 1: text ['Up'] is not text": with_(0, ranked=None, text=["Up"]),
    "row 1: text '\\ud800' is not text": [HALF],
    "row 1: ended 1 is neither true nor false": with_(0, ranked=None, text="Up", ended=1),
    "row 1: certified 'yes' is neither true nor false": with_(0, certified="yes"),
    "row 2 has no answers; it needs one of ranked, titles, text": with_(1, ranked=None),
    "row 2 has ranked and text; it needs one of": with_(1, text="Up"),
    "row 2 has `titles`, row 1 `ranked`; use one of them in all rows": with_(1, ranked=None, titles=[]),
    "row 3: ranked holds 1001 answers; give at most 1000": with_(2, ranked=[None] * 1001),
    "row 1: scores [1] is not a list of 2 numbers": with_(0, scores=[1]),
    "row 1: scores 7 is not a list of 2 numbers": with_(0, scores=7),
    "row 1 is not valid JSON (NaN is not a finite number)": with_(0, scores=[1, math.nan]),
    "row 1 is not valid JSON (-Infinity is not a finite number)": with_(0, scores=[1, -math.inf]),
    "row 1: score '2' is not a finite number": with_(0, scores=["2", 1]),
    "row 1: score True is not a finite number": with_(0, scores=[True, 1]),
    "row 1: score 1000": with_(0, scores=[10**400, 1]),
    "row 1 is not valid JSON (Exceeds": ['{"row": 0, "scores": [' + "9" * 5000 + '], "ranked": [null]}'],
    "row 3: the target is not 'a 1'; are these other data?": with_(2, target="a 1"),
    "2 of 3 rows have no line, first user 'u 0' at position 3; user 'u1' at position 2; answer every row": [GOOD[1]],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_line_with_file_and_row(read, tmp_path, message):
    with pytest.raises(UserError) as error:
        read(*MISTAKES[message])
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'p.jsonl'}: {message}"), said
    assert said.isprintable() and len(said) < len(str(tmp_path)) + 250


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        predictions.read(tmp_path / "p.jsonl", ROWS, USERS, CATALOGUE)


@pytest.mark.parametrize("name", ["user", "row", "target", "ranked", "scores", "ended"])
def test_nesting_is_a_mistake_at_any_depth(tmp_path, name):
    path = tmp_path / "p.jsonl"
    for depth in range(5, 1001, 45):
        path.write_text(json.dumps({"row": 0})[:-1] + f', "{name}": [' + "[" * depth + "]" * depth + "]}")
        with pytest.raises(UserError, match="row 1"):
            predictions.read(path, ROWS, USERS, CATALOGUE)


# Writing


@st.composite
def given_answers(draw):
    """Answers of any protocol but that of free text, as our models give them."""
    K = draw(st.integers(1, 6))
    lists = []
    for _ in range(len(ROWS)):
        items = draw(st.lists(st.integers(0, len(IDS) - 1), unique=True, max_size=K))
        gaps = draw(st.integers(0, K - len(items)))
        items = draw(st.permutations([*items, *[NOT_AN_ITEM] * gaps]))
        lists.append([*items, *[NO_ANSWER] * (K - len(items))])
    ranked_ExK = np.array(lists)
    score = st.floats(allow_nan=False, allow_infinity=False, width=draw(st.sampled_from([32, 64])))
    score_ExK = np.array(draw(st.lists(st.lists(score, min_size=K, max_size=K), min_size=3, max_size=3)))
    score_ExK[ranked_ExK == NO_ANSWER] = -np.inf
    certified_E = draw(st.none() | st.lists(st.booleans(), min_size=3, max_size=3).map(np.array))
    return Answers(ranked_ExK, score_ExK, certified_E)


@settings(max_examples=100, deadline=None)
@given(given_answers())
def test_answers_come_back_as_they_were(tmp_path_factory, answers):
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    predictions.write(path, ROWS, answers, USERS, CATALOGUE)
    again = predictions.read(path, ROWS, USERS, CATALOGUE)
    K = max(1, int((answers.ranked_ExK != NO_ANSWER).sum(axis=1).max()))
    np.testing.assert_array_equal(again.ranked_ExK, answers.ranked_ExK[:, :K])
    given_ExK = answers.ranked_ExK[:, :K] != NO_ANSWER
    np.testing.assert_array_equal(again.score_ExK[given_ExK], answers.score_ExK[:, :K][given_ExK])
    assert np.isnan(again.score_ExK[~given_ExK]).all()
    np.testing.assert_equal(again.certified_E, answers.certified_E)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(TITLES) | st.text(st.characters(codec="utf-8"), max_size=8), min_size=3, max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_free_answers_come_back_as_they_were(tmp_path_factory, texts, ended):
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    answers = matching.read(texts, ended, CATALOGUE, ROWS)
    predictions.write(path, ROWS, answers, USERS, CATALOGUE)
    assert predictions.kind(path) == "text"
    np.testing.assert_equal(vars(predictions.read(path, ROWS, USERS, CATALOGUE)), vars(answers))


def test_a_file_of_ours_measures_the_same(tmp_path):
    score_ExC = np.random.default_rng(0).standard_normal(ROWS.candidates_ExC.shape).astype(np.float32) - 9
    ranked = metrics.ranking(score_ExC, ROWS.candidates_ExC)
    answers = Answers(ranked, -np.sort(-score_ExC, axis=1), full_score_ExC=score_ExC)
    predictions.write(tmp_path / "p.jsonl", ROWS, answers, USERS, CATALOGUE)
    again = predictions.read(tmp_path / "p.jsonl", ROWS, USERS, CATALOGUE)
    np.testing.assert_array_equal(again.full_score_ExC, score_ExC)
    ground = summary.Ground(ROWS, CATALOGUE, np.eye(len(IDS)), 2)
    M, again_M = (summary.describe(a, ground, 50)[0] for a in (answers, again))
    assert "ECE" in M
    np.testing.assert_equal(again_M, M)


def test_the_form_of_a_line(tmp_path):
    answers = Answers(np.array([[3, -1], [2, -2], [7, 0]]), np.array([[2.5, 1], [0, np.nan], [np.nan, 1]]))
    predictions.write(tmp_path / "p.jsonl", ROWS, answers, USERS, CATALOGUE)
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text("utf-8").splitlines()]
    asked = {"row": 0, "user": "u 0", "position": 3, "target": "a 1", "history": ["%e", 'f"']}
    assert lines[0] == asked | {"ranked": ["NA", None], "scores": [2.5, 1.0]}
    assert lines[1]["history"] == ["%e"] and lines[1]["ranked"] == ["c\n3"] and lines[1]["scores"] == [0.0]
    assert lines[2].keys() == asked.keys() | {"ranked"}


def test_questions_do_not_hold_the_target():
    asked = list(predictions.questions(ROWS, USERS, CATALOGUE))
    assert asked[1] == {
        "row": 1, "user": "u 0", "position": 5, "history": ["%e"], "history_titles": ["Up"],
        "candidates": ["c\n3", "b/2", "a 1"], "candidate_titles": ["Heat", "Aliens", "Alien"],
    }  # fmt: skip


# TREC


def evaluated(run, qrels):
    """qid -> (NDCG@5, MRR), as trec_eval finds them: by float32 score, the ranks in the file ignored."""
    relevant = {qid: docno for qid, _, docno, _ in map(str.split, qrels)}
    lists = {}
    for qid, q0, docno, _, score, tag in map(str.split, run):
        assert q0 == "Q0" and tag == "my%20model"
        lists.setdefault(qid, []).append((np.float32(score), docno))
    found = {}
    assert list(lists) == list(relevant)
    for qid, docno in relevant.items():
        scores = [score for score, _ in lists[qid]]
        order = [name for _, name in sorted(lists[qid], reverse=True)]
        assert len(set(scores)) == len(scores) and len(set(order)) == len(order)
        place = order.index(docno) + 1 if docno in order else math.inf
        found[qid] = (1 / math.log2(place + 1) if place <= 5 else 0.0, 1 / place)
    return found


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(NOT_AN_ITEM, len(IDS) - 1), min_size=6, max_size=6), min_size=len(ROWS), max_size=len(ROWS)
    ),
    st.lists(st.integers(0, 6), min_size=len(ROWS), max_size=len(ROWS)),
    st.sampled_from([1.0, 1e-3, 1e-12, 1e39, 0.0, math.nan]),
)
def test_trec_metrics_are_ours(items, lengths, step):
    """With repetitions, twins, answers that are no item, short lists, and scores that float32 cannot tell apart."""
    ranked_ExK = np.where(np.arange(6) < np.array(lengths)[:, None], items, NO_ANSWER)
    with np.errstate(invalid="ignore"):
        answers = Answers(ranked_ExK, np.broadcast_to(-5 - step * np.arange(6), ranked_ExK.shape))
    run = list(predictions.trec_run(ROWS, answers, CATALOGUE, "my model"))
    found = evaluated(run, predictions.trec_qrels(ROWS, CATALOGUE))
    rank_E = metrics.target_rank(ranked_ExK, ROWS.target_E, CATALOGUE.title_group_I)
    expected = zip(metrics.ndcg(rank_E, 5), metrics.reciprocal_rank(rank_E))
    assert found == {str(e): pytest.approx(pair, rel=1e-12) for e, pair in enumerate(expected)}


def test_a_trec_run_keeps_the_scores_that_fall():
    score_ExK = np.array([[-1.5, -2.0], [3, 3], [np.nan, np.nan]])
    answers = Answers(np.array([[3, 0], [2, -1], [-2, -2]]), score_ExK)
    assert list(predictions.trec_run(ROWS, answers, CATALOGUE, "m")) == [
        "0 Q0 c%0A3 1 -1.5 m",  # the item shares its title with an earlier one
        "0 Q0 a%201 2 -2.0 m",
        "1 Q0 c%0A3 1 1.0 m",
        "1 Q0 %none2 2 0.0 m",
        "2 Q0 %none1 1 0.0 m",  # no answer
    ]
    assert list(predictions.trec_qrels(ROWS, CATALOGUE)) == ["0 0 a%201 1", "1 0 c%0A3 1", "2 0 é 1"]


# RecBole


@given(st.text(st.characters(codec="utf-8"), min_size=1) | st.sampled_from(["NA", "#N/A", "nan", "-1.#IND", "[PAD]"]))
def test_a_word_is_one_word_and_can_be_read_back(text):
    word = predictions.word(text)
    assert word.split() == [word]
    assert urllib.parse.unquote(word) == text
    assert not any(mark in word for mark in '"\t\n\r') and word not in ("NA", "#N/A", "nan", "-1.#IND", "[PAD]")


def test_recbole_files(tmp_path):
    predictions.recbole(tmp_path, "mt", {"train": ROWS, "valid": ROWS.take([2]), "test": ROWS}, USERS, CATALOGUE)
    names = ["mt.item", "mt.test.inter", "mt.train.inter", "mt.valid.inter", "mt.yaml"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    table = list(csv.reader((tmp_path / "mt.test.inter").open(encoding="utf-8"), delimiter="\t"))
    assert table[0] == ["user_id:token", "item_id_list:token_seq", "item_id:token"]
    for e, (user, history, target) in enumerate(table[1:]):
        assert urllib.parse.unquote(user) == USERS[ROWS.user_E[e]]
        assert urllib.parse.unquote(target) == IDS[ROWS.target_E[e]]
        items = [IDS.index(urllib.parse.unquote(word)) for word in history.split(" ")]
        assert items == [item for item in ROWS.history_ExN[e] if item >= 0]
    assert (tmp_path / "mt.valid.inter").read_text("utf-8").splitlines()[1:] == ["u1\t7 a%201\té"]
    items = (tmp_path / "mt.item").read_text("utf-8").splitlines()
    assert items[0] == "item_id:token\ttitle:token_seq\tclass:token_seq"
    assert items[1] == "a%201\tAlien\tSci%20Fi Drama" and items[4] == "%4EA\tHEAT\t"
    assert items[6:] == ["f%22\t%22Supper%22 Club\t", "7\t%4Eone\t", "é\tCafé Noir\t"]
    settings = (tmp_path / "mt.yaml").read_text("utf-8").splitlines()
    assert "benchmark_filename: [train, valid, test]" in settings and "MAX_ITEM_LIST_LENGTH: 2" in settings
