"""RecBole's SASRec, an epoch for every request: `python recbole_sasrec.py SETTINGS.json`, asked by oracle.py.

The data set is the folder that `rosepo export --format=recbole` would write. An epoch is RecBole's own `_train_epoch`.
"""

import json
import logging
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed
from worker import Clock, requests


@torch.no_grad()
def ranks(model: SASRec, data) -> list[int]:
    """The target's place, from 1, among all items, for every row in order; the padding item is none."""
    model.eval()
    found = []
    for batch in torch.arange(len(data)).split(512):
        rows = data[batch]
        score_BxI = model.full_sort_predict(rows)[:, 1:]
        target_Bx1 = rows["item_id"][:, None] - 1
        found += (1 + (score_BxI > score_BxI.gather(1, target_Bx1)).sum(dim=1)).tolist()
    return found


def main() -> None:
    asked, answer = requests()
    s = json.loads(pathlib.Path(sys.argv[1]).read_text())
    sys.argv = sys.argv[:1]  # RecBole reads the command line too
    os.chdir(s["data"])  # and leaves logs where it is started
    if hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    settings = dict(
        data_path=s["data"], hidden_size=s["width"], n_layers=s["layers"], n_heads=s["heads"], inner_size=s["width"],
        hidden_act="relu", hidden_dropout_prob=s["dropout"], attn_dropout_prob=0.0, loss_type="CE",
        train_neg_sample_args=None, train_batch_size=s["batch"], learner="adam", learning_rate=s["learning_rate"],
        weight_decay=0.0, seed=s["seed"], reproducibility=False, use_gpu=False, show_progress=False, state="ERROR",
        checkpoint_dir=s["data"],
    )  # fmt: skip
    yaml = pathlib.Path(s["data"], s["name"], f"{s['name']}.yaml")
    config = Config(model="SASRec", dataset=s["name"], config_file_list=[str(yaml)], config_dict=settings)
    logging.getLogger().setLevel(logging.ERROR)
    init_seed(s["seed"], False)
    train, valid, test = data_preparation(config, create_dataset(config))
    model = SASRec(config, train.dataset)
    trainer = Trainer(config, model)
    for number, request in enumerate(asked):
        if request["do"] == "epoch":
            clock = Clock()
            loss = trainer._train_epoch(train, number)
            answer(**clock.stop(), loss=loss / len(train))
        else:
            answer(**{name: ranks(model, data.dataset.inter_feat) for name, data in (("valid", valid), ("test", test))})


if __name__ == "__main__":
    main()
