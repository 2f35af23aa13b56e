"""Answers and rows as files: ours and those of any other system, in raw ids, so that all are scored on the same rows.

A prediction file is JSON lines, one object a row of the protocol, in any order:

    {"user": "u1", "position": 17, "ranked": ["i5", null, "i2"]}

- whose answer: `row` (its number, from 0), or `user`, with `position` where the user has several rows
- one of `ranked` (raw item ids, best first; null is an answer that is no item), `titles` (best first; a title that no
  item has is an answer too, and so is a repetition), `text` (free text; "ended": false where it was cut off)
- `scores`, as many as answers, if there are any

An empty list says that there is no answer: a miss, like any wrong one. Files that this module writes have more fields.
"""

import dataclasses
import math
import os
import pathlib
import re
import reprlib
import sys
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rosepo_jax import files
from rosepo_jax.data import tables
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.rows import Rows
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import matching
from rosepo_jax.evaluation.answers import NO_ANSWER, NOT_AN_ITEM, Answers

LIMIT = 1000  # answers to one row
KINDS = ("ranked", "titles", "text")


# Our form


def write(path: str | os.PathLike, rows: Rows, answers: Answers, users: Sequence[str], catalogue: Catalogue) -> None:
    """Writes a prediction file, which `read` reads back to the same answers.

    Beside the fields of the module's docstring it has `row`, `target`, `history`, and where there are any `certified`,
    `text` and `status`. Scores are left out of a row in which one is not finite.
    """
    files.write_jsonl(path, _lines(rows, answers, users, catalogue))


def _lines(rows: Rows, answers: Answers, users: Sequence[str], catalogue: Catalogue) -> Iterator[dict]:
    for e in range(len(rows)):
        given_K = answers.ranked_ExK[e] != NO_ANSWER
        scores = np.asarray(answers.score_ExK[e], np.float64)[given_K].tolist()
        line = {
            **_question(rows, e, users),
            "target": catalogue.ids[rows.target_E[e]],
            "history": _ids(catalogue, rows.history_ExN[e]),
            "ranked": [None if item < 0 else catalogue.ids[item] for item in answers.ranked_ExK[e][given_K]],
        }
        if all(map(math.isfinite, scores)):
            line["scores"] = scores
        if answers.certified_E is not None:
            line["certified"] = bool(answers.certified_E[e])
        if answers.text is not None and answers.status is not None:
            line |= {"text": answers.text[e], "status": answers.status[e]}
        yield line


def questions(rows: Rows, users: Sequence[str], catalogue: Catalogue) -> Iterator[dict]:
    """What another system is asked, one object a row: history (oldest first) and candidates, as ids and titles.

    It does not hold the target.
    """
    for e in range(len(rows)):
        history, candidates = rows.history_ExN[e], rows.candidates_ExC[e]
        yield {
            **_question(rows, e, users),
            "history": _ids(catalogue, history),
            "history_titles": [catalogue.titles[item] for item in history if item >= 0],
            "candidates": _ids(catalogue, candidates),
            "candidate_titles": [catalogue.titles[item] for item in candidates],
        }


def _question(rows: Rows, e: int, users: Sequence[str]) -> dict:
    return {"row": e, "user": users[rows.user_E[e]], "position": int(rows.position_E[e])}


def _ids(catalogue: Catalogue, item_N: np.ndarray) -> list[str]:
    return [catalogue.ids[item] for item in item_N if item >= 0]


# Anyone's answers


def read(
    path: str | os.PathLike, rows: Rows, users: Sequence[str], catalogue: Catalogue, depth: int = LIMIT
) -> Answers:
    """The answers of a prediction file (see the module), lists cut to `depth`; K is the length of the longest.

    full_score_ExC is there when every list ranks and scores exactly its row's candidates. In a line that `write` made
    from a free answer (it has a `status`) the text counts, and not the `ranked` that came of it.
    Errors:    UserError, with file and row (the line number): no JSON object; an unknown user, row or item id; a user
               with several rows and no position; a row answered twice; a repeated id; a wrong type; scores that are not
               finite or not as many; none or several of `ranked`, `titles`, `text`, or another one than the first line;
               more than LIMIT answers; a target that is not the row's; and rows without a line.
    """
    path = pathlib.Path(path)
    asked, index, item_of = _Asked(rows, users), matching.TitleIndex(catalogue), _numbers(catalogue.ids)
    lines: dict[int, _Line] = {}
    for number, record in tables.json_lines(path):
        where = f"{path}: row {number}"
        row = asked.row(record, path, number)
        if row in lines:
            raise UserError(f"{where} answers {asked.name(row)}, which row {lines[row].number} has answered")
        _check_target(record, catalogue.ids[rows.target_E[row]], path, number)
        line = _line(record, path, number)
        first = next(iter(lines.values()), line)
        if line.kind != first.kind:
            raise UserError(
                f"{where} has `{line.kind}`, row {first.number} `{first.kind}`; use one of them in all rows"
            )
        answers = line.answers
        if line.kind == "ranked":
            answers = _items(answers, item_of, index, path, number)
        elif line.kind == "titles":
            answers = [index.item(title) for title in answers]
        lines[row] = dataclasses.replace(line, answers=answers[:depth], scores=line.scores[:depth])
    missing = [asked.name(row) for row in range(len(rows)) if row not in lines]
    if missing:
        named = "; ".join(missing[:3])
        raise UserError(f"{path}: {len(missing)} of {len(rows)} rows have no line, first {named}; answer every row")
    return _answers([lines[row] for row in range(len(rows))], rows, catalogue, index)


def kind(path: str | os.PathLike) -> str:
    """Which of KINDS a prediction file holds, by its first line."""
    path = pathlib.Path(path)
    return next(_line(record, path, number).kind for number, record in tables.json_lines(path))


def only_candidates(answers: Answers, rows: Rows, catalogue: Catalogue) -> bool:
    """Whether every answered item has the title of a candidate of its row."""
    group_I = catalogue.title_group_I
    return all(
        np.isin(group_I[ranked[ranked >= 0]], group_I[candidates]).all()
        for ranked, candidates in zip(answers.ranked_ExK, rows.candidates_ExC, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class _Line:
    """One row's answers. scores: as many, or none."""

    number: int
    kind: str
    answers: list
    scores: list[float]
    ended: bool
    certified: bool | None


def _line(record: dict[str, Any], path: pathlib.Path, number: int) -> _Line:
    """What a line says, its types checked; ids and titles are not looked up yet."""
    where = f"{path}: row {number}"
    there = [name for name in KINDS if record.get(name) is not None]
    if "status" in record and "text" in there:
        there = ["text"]
    if len(there) != 1:
        raise UserError(f"{where} has {' and '.join(there) or 'no answers'}; it needs one of {', '.join(KINDS)}")
    (name,) = there
    answers = [record[name]] if name == "text" else record[name]
    if not isinstance(answers, list) or (name != "ranked" and not all(map(_is_text, answers))):
        form = {"ranked": "a list of item ids", "titles": "a list of titles", "text": "text"}[name]
        raise UserError(f"{where}: {name} {_shown(record[name])} is not {form}")
    if len(answers) > LIMIT:
        raise UserError(f"{where}: {name} holds {len(answers)} answers; give at most {LIMIT}")
    for flag in ("ended", "certified"):
        if record.get(flag) is not None and type(record[flag]) is not bool:
            raise UserError(f"{where}: {flag} {_shown(record[flag])} is neither true nor false")
    return _Line(
        number=number,
        kind=name,
        answers=answers,
        scores=_scores(record.get("scores"), len(answers), where),
        ended=record.get("status") != "truncated" if record.get("ended") is None else bool(record["ended"]),
        certified=record.get("certified"),
    )


def _scores(scores: Any, count: int, where: str) -> list[float]:
    if scores is None:
        return []
    if not isinstance(scores, list) or len(scores) != count:
        raise UserError(f"{where}: scores {_shown(scores)} is not a list of {count} numbers, one for each answer")
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
            raise UserError(f"{where}: score {_shown(score)} is not a finite number")
    return [float(score) for score in scores]


def _items(
    answers: list, item_of: Mapping[str, int], index: matching.TitleIndex, path: pathlib.Path, number: int
) -> list[int]:
    """The items of raw ids, each at most once."""
    items: list[int] = []
    seen = set()
    for answer in answers:
        if answer is None:
            items.append(NOT_AN_ITEM)
            continue
        id = tables.text(answer, "item id", path, number)
        if id not in item_of:
            hint = "; titles go into `titles`" if index.item(id) >= 0 else ""
            raise UserError(f"{path}: row {number}: item id {_shown(id)} is not in the catalogue{hint}")
        if item_of[id] in seen:
            raise UserError(f"{path}: row {number}: item id {_shown(id)} stands in `ranked` twice")
        seen.add(item_of[id])
        items.append(item_of[id])
    return items


def _check_target(record: dict[str, Any], target: str, path: pathlib.Path, number: int) -> None:
    if record.get("target") is not None and tables.text(record["target"], "target", path, number) != target:
        raise UserError(f"{path}: row {number}: the target is not {_shown(record['target'])}; are these other data?")


def _answers(lines: Sequence[_Line], rows: Rows, catalogue: Catalogue, index: matching.TitleIndex) -> Answers:
    """The answers from one line a row, in order."""
    K = max(1, max(len(line.answers) for line in lines))
    score_ExK = np.array([_padded(line.scores, K, np.nan) for line in lines], np.float64)
    if lines[0].kind == "text":
        answers = matching.read([line.answers[0] for line in lines], [line.ended for line in lines], catalogue, rows)
    else:
        ranked_ExK = np.array([_padded(line.answers, K, NO_ANSWER) for line in lines], np.int64)
        answers = Answers(
            ranked_ExK, score_ExK, full_score_ExC=_full_scores(ranked_ExK, score_ExK, rows.candidates_ExC)
        )
    if lines[0].kind == "titles":
        answers = dataclasses.replace(answers, ambiguous_E=np.array(list(map(index.is_ambiguous, ranked_ExK[:, 0]))))
    certified = [line.certified for line in lines]
    certified_E = None if None in certified else np.array(certified, bool)
    return dataclasses.replace(answers, score_ExK=score_ExK, certified_E=certified_E)


def _padded(values: Sequence, size: int, fill: float) -> list:
    return [*values, *[fill] * (size - len(values))]


def _full_scores(ranked_ExK: np.ndarray, score_ExK: np.ndarray, candidates_ExC: np.ndarray) -> np.ndarray | None:
    if ranked_ExK.shape != candidates_ExC.shape or np.isnan(score_ExK).any():
        return None
    by_rank, by_slot = np.argsort(ranked_ExK, axis=1), np.argsort(candidates_ExC, axis=1)
    if (np.take_along_axis(ranked_ExK, by_rank, 1) != np.take_along_axis(candidates_ExC, by_slot, 1)).any():
        return None
    full_score_ExC = np.empty(candidates_ExC.shape)
    np.put_along_axis(full_score_ExC, by_slot, np.take_along_axis(score_ExK, by_rank, 1), axis=1)
    return full_score_ExC


def plain_name(name: str, option: str) -> str:
    """A name that is safe as that of a folder and as a word in files; UserError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"{option}: {_shown(name)} is not a plain name: letters and digits, then also . _ -")
    return name


class _Asked:
    """The rows that are asked about: which of them a line answers."""

    def __init__(self, rows: Rows, users: Sequence[str]):
        self._rows, self._users, self._user_of = rows, users, _numbers(users)
        self._rows_of_user: dict[int, list[int]] = {}
        for row, user in enumerate(rows.user_E.tolist()):
            self._rows_of_user.setdefault(user, []).append(row)

    def name(self, row: int) -> str:
        return f"user {_shown(self._users[self._rows.user_E[row]])} at position {self._rows.position_E[row]}"

    def row(self, record: dict[str, Any], path: pathlib.Path, number: int) -> int:
        """The only row that has all that a line says of it."""
        where = f"{path}: row {number}"
        given = {name: record[name] for name in ("row", "user", "position") if record.get(name) is not None}
        if not given.keys() & {"row", "user"}:
            raise UserError(f"{where} needs `user` or `row`, to say whose answer it is")
        for name in given.keys() - {"user"}:
            if type(given[name]) is not int:
                raise UserError(f"{where}: {name} {_shown(given[name])} is not a whole number")
        found: Sequence[int] = range(len(self._rows))
        if "user" in given:
            user = tables.text(given["user"], "user", path, number)
            if user not in self._user_of:
                raise UserError(f"{where}: user {_shown(user)} is not in the log")
            found = self._rows_of_user.get(self._user_of[user], [])
        if "row" in given:
            found = [given["row"]] if given["row"] in found else []
        if "position" in given:
            found = [row for row in found if self._rows.position_E[row] == given["position"]]
        named = ", ".join(f"{name} {_shown(value)}" for name, value in given.items())
        if not found:
            raise UserError(f"{where}: none of the {len(self._rows)} rows is {named}")
        if len(found) > 1:
            which = "row" if "position" in given else "position"
            raise UserError(f"{where}: {len(found)} rows are {named}; say which by `{which}`")
        return found[0]


def _numbers(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _is_text(value: Any) -> bool:
    """Half a surrogate pair, which JSON can spell, is none: it could not be written again."""
    return isinstance(value, str) and (value.isascii() or not re.search("[\ud800-\udfff]", value))


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = 60
_shown = _SHORT.repr


# The forms of other tools


def word(text: str) -> str:
    """A text as one word that every tool reads as it is; `urllib.parse.unquote` gives the text back.

    Percent-encoded are white space, control characters, quotes and "%", and the first letter of what a table reader
    takes for a missing value, and RecBole for padding ("NA", "null", "[PAD]", ...).
    """
    if re.fullmatch(r"#?N/?A|<NA>|n/a|NULL|null|None|-?nan|-?NaN|-?1\.#(IND|QNAN)|\[PAD\]", text):
        return f"%{ord(text[0]):02X}{text[1:]}"
    return re.sub(r'[\s\x00-\x1f\x7f"%]', lambda found: urllib.parse.quote(found[0], safe=""), text)


def trec_run(rows: Rows, answers: Answers, catalogue: Catalogue, tag: str) -> Iterator[str]:
    """The lines `qid Q0 docno rank score tag` of a TREC run, from which trec_eval finds our MRR and NDCG.

    qid: the row's number. docno: `word` of the item's id, of the first item where several share a title, since they are
    one answer. An answer that is no item, or that repeats one, keeps its place under a docno that no item has; so does
    the lack of any answer, since trec_eval leaves out a qid without lines.
    score: the system's own where it falls strictly in float32, by which trec_eval sorts, else K - rank.
    """
    group_I, tag = catalogue.title_group_I, word(tag)
    for e, (ranked, score_K) in enumerate(zip(answers.ranked_ExK, answers.score_ExK, strict=True)):
        given = ranked[ranked != NO_ANSWER]
        titles = [group_I[item] if item >= 0 else NOT_AN_ITEM for item in given] or [NOT_AN_ITEM]
        with np.errstate(over="ignore", invalid="ignore"):
            scores = score_K[: len(titles)].astype(np.float32)
            if not (np.isfinite(scores).all() and (np.diff(scores) < 0).all()):
                scores = len(titles) - 1.0 - np.arange(len(titles))
        for place, (title, score) in enumerate(zip(titles, scores, strict=True)):
            is_new = title >= 0 and title not in titles[:place]
            docno = word(catalogue.ids[title]) if is_new else f"%none{place + 1}"
            yield f"{e} Q0 {docno} {place + 1} {score!s} {tag}"


def trec_qrels(rows: Rows, catalogue: Catalogue) -> Iterator[str]:
    """The lines `qid 0 docno 1`: the target of every row, named as in `trec_run`."""
    for e, target in enumerate(catalogue.title_group_I[rows.target_E]):
        yield f"{e} 0 {word(catalogue.ids[target])} 1"


def recbole(
    folder: pathlib.Path, name: str, splits: Mapping[str, Rows], users: Sequence[str], catalogue: Catalogue
) -> None:
    """Writes RecBole's data set `name` into `folder`: our rows as benchmark files, the items, a YAML with settings.

    splits: "train", "valid" and "test". One line a row, in our order: user, history (oldest first), target, as `word`s.
    Titles and classes are split at white space, as RecBole wants them, and a class is one word.
    """
    ids, user_ids = list(map(word, catalogue.ids)), list(map(word, users))
    for split, rows in splits.items():
        with open(folder / f"{name}.{split}.inter", "w", encoding="utf-8", newline="\n") as file:
            file.write("user_id:token\titem_id_list:token_seq\titem_id:token\n")
            for user, history, target in zip(rows.user_E, rows.history_ExN, rows.target_E, strict=True):
                seen = " ".join(ids[item] for item in history if item >= 0)
                file.write(f"{user_ids[user]}\t{seen}\t{ids[target]}\n")
    with open(folder / f"{name}.item", "w", encoding="utf-8", newline="\n") as file:
        file.write("item_id:token\ttitle:token_seq\tclass:token_seq\n")
        for id, title, groups in zip(ids, catalogue.titles, catalogue.groups, strict=True):
            file.write(f"{id}\t{' '.join(map(word, title.split()))}\t{' '.join(map(word, groups))}\n")
    settings = [
        f"# In the folder that holds {name}/:",
        f"# run_recbole(model=..., dataset='{name}', config_file_list=['{name}/{name}.yaml'])",
        "data_path: .",
        f"benchmark_filename: [{', '.join(splits)}]",
        "alias_of_item_id: [item_id_list]",
        "load_col: {inter: [user_id, item_id_list, item_id], item: [item_id, title, class]}",
        f"MAX_ITEM_LIST_LENGTH: {next(iter(splits.values())).history_ExN.shape[1]}",
    ]
    (folder / f"{name}.yaml").write_text("\n".join([*settings, ""]), "utf-8")
