"""`recommend`: the k best catalogue titles for a history, with their log-probabilities."""

import argparse
import json
import pathlib

import numpy as np
from ml_collections import ConfigDict

from rosepo_jax.data import store
from rosepo_jax.data.catalogue import Catalogue, load_names
from rosepo_jax.data.examples import TitleTable
from rosepo_jax.data.rows import Rows
from rosepo_jax.decoding import rank
from rosepo_jax.errors import UserError
from rosepo_jax.training import policy, programs, sharding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Recommends catalogue titles for a history of titles (or item ids), or for a user of the log."
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--history", help='titles or item ids, oldest first: "Skyfall|Argo|Lincoln"')
    who.add_argument("--user", help="a user id of the log: the history before the user's test item")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--model", choices=("align", "sft"), default="align")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def main(config: ConfigDict, args: argparse.Namespace) -> int:
    workdir = pathlib.Path(args.workdir)
    if args.k < 1:
        raise UserError(f"--k={args.k}: must be at least 1")
    for needed in ("prepare", args.model):
        if not (workdir / needed / "manifest.json").is_file():
            raise UserError(f"{workdir}/{needed}: not there yet; run `rosepo run --workdir={workdir}` first")
    users, catalogue = load_names(workdir / "prepare")
    if args.user:
        history = user_history(workdir, args.user, users, catalogue)
    else:
        history = [find(catalogue, text) for text in args.history.split("|")]
    programs.keep(config)
    mesh = sharding.make_mesh(config.mesh)
    model = policy.load(config, workdir / args.model, mesh)
    if model.encoder.template.uses_candidates:
        raise UserError("recommend: this model's template lists candidates; it cannot rank a whole catalogue")
    ways = mesh.shape["replica"] * mesh.shape["fsdp"]
    recent = np.array([history[-config.data.history :]], np.int32)
    rows = Rows(np.zeros(1, np.int32), np.zeros(1, np.int32), recent, np.zeros(1, np.int32), np.zeros((1, 0), np.int32))
    excluded = np.array([sorted(set(history))], np.int32)
    k = min(args.k, len(catalogue))
    top = rank.catalogue_top(
        model, model.params, catalogue, TitleTable(model.encoder, catalogue.titles), rows,
        beams=max(config.evaluate.beams, 2 * k), k=k, batch_size=ways, excluded_ExX=excluded,
        budget=config.evaluate.budget,
    )  # fmt: skip
    found = [
        {"rank": number, "item": catalogue.ids[item], "title": catalogue.titles[item], "score": round(float(score), 4)}
        for number, (item, score) in enumerate(zip(top.items[0], top.scores[0]), 1)
        if item >= 0
    ]
    if args.json:
        print(json.dumps({"recommendations": found, "certified": bool(top.certified[0])}, ensure_ascii=False))
    else:
        print("after: " + " | ".join(catalogue.titles[item] for item in history))
        for row in found:
            print(f"{row['rank']:3d}  {row['score']:9.4f}  {row['title']}")
    return 0


def find(catalogue: Catalogue, text: str) -> int:
    """A title, or else a raw item id."""
    try:
        return catalogue.find_title(text)
    except UserError:
        if text.strip() in catalogue.ids:
            return catalogue.index_of_id(text.strip())
        raise


def user_history(workdir: pathlib.Path, user: str, users: list[str], catalogue: Catalogue) -> list[int]:
    if user not in users:
        raise UserError(f"--user={user}: no such user among the {len(users)} of the log")
    for split in ("test", "validation", "train"):
        rows = store.read(workdir / "prepare" / "dataset", split, users=len(users), items=len(catalogue))
        mine = np.flatnonzero(rows.user_E == users.index(user))
        if len(mine):
            last = mine[np.argmax(rows.position_E[mine])]
            history = [int(item) for item in rows.history_ExN[last] if item >= 0]
            return history if split == "test" else [*history, int(rows.target_E[last])]
    raise UserError(f"--user={user}: has no rows")
