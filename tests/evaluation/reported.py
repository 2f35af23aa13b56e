"""Made-up results of every kind that a report shows, and folders of runs that hold them: nothing is trained."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from rosepo_jax import config, files
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.evaluation import report, significance
from rosepo_jax.stages import runtime

HR = {"popularity": 0.38, "cooccurrence": 0.434, "oracle": 0.478, "sft": 0.407, "sft_more": 0.429, "aligned": 0.448}
TITLES = ("Heat", "Skyfall", "Argo", "HEAT", "Lincoln", "The Girl with the Dragon Tattoo", "Brave")
USERS = 40


def cell(value, n=2290, half=0.02):
    return {"value": value, "ci95": [value - half, value + half], "hits": round(value * n), "n": n}


def metrics(hit_ratio, lift):
    deciles = [{"decile": d + 1, "counts": [d, d + 1], **cell(hit_ratio + d / 100, 229)} for d in range(10)]
    lengths = [{"history": list(ends), **cell(hit_ratio + ends[0] / 99, 700)} for ends in ((3, 5), (6, 9), (10, 10))]
    return {
        "HR@1": cell(hit_ratio),
        "HR@5": cell(hit_ratio + 0.3),
        "NDCG@5": cell(hit_ratio + 0.15),
        "MRR": cell(hit_ratio + 0.1),
        "HR@1_cold": cell(0.05, 31),
        "not_in_catalogue": cell(0.0, half=0.0),
        "popularity_lift": cell(lift),
        "ARP": cell(212.5, half=9.5),
        "APLT": cell(0.21),
        "gini": {"value": 0.6, "ci95": None, "n": 2290},
        "coverage": {"value": 0.31, "ci95": None, "n": 2290},
        "MGU": cell(0.04, half=0.004),
        "DGU": cell(0.12, half=0.01),
        "semantic_error_rate": cell(0.12),
        "semantic_error_rate_random": cell(0.03),
        "novelty": cell(8.4),
        "diversity": cell(0.71),
        "ECE": cell(0.083),
        "HR@1_of_valid": {"value": None, "ci95": None, "n": 0},
        "HR@1_by_decile": deciles,
        "HR@1_by_history": lengths,
    }


def compare(metric, b, difference, p, protocol="candidates", p_holm=None, a="aligned"):
    ci95 = [difference - 0.019, difference + 0.019]
    row = {"protocol": protocol, "metric": metric, "a": a, "b": b, "difference": difference, "ci95": ci95, "p": p}
    adjusted = {"p_holm": p if p_holm is None else p_holm, "q_bh": p}
    return row | adjusted | {"test": "paired permutation", "n": 2290, "detectable": 0.027}


def free():
    found = {
        "valid_ratio": 0.97,
        "HR@1": 0.08,
        "truncated": 0.01,
        "empty": 0.0,
        "history_copy": 0.02,
        "ambiguous": 0.01,
    }
    found |= {"hallucination": 0.015, "substring_valid_ratio": 0.91, "substring_HR@1": 0.075}
    return {metric: cell(value, 1000) for metric, value in found.items()}


def results(comparisons=()):
    return {
        "protocols": {
            "candidates": {
                "hash": "c4nd",
                "n": 2290,
                "split": "test",
                "semantic_space": "5pace",
                "candidates": 20,
                "sampling": "uniform",
                "never_listed": "past",
                "models": {name: metrics(hr, 1.5) for name, hr in HR.items()},
            },
            "catalogue": {
                "hash": "c4ta",
                "n": 2290,
                "split": "test",
                "semantic_space": "5pace",
                "titles": 3706,
                "sharing_a_title": 12,
                "beams": 20,
                "budget": 2000,
                "models": {name: metrics(hr / 5, 2 - hr) | {"certified": cell(0.985)} for name, hr in HR.items()},
            },
            "generate": {
                "hash": "g3n",
                "n": 1000,
                "split": "test",
                "semantic_space": "5pace",
                "decoding": "greedy",
                "models": {name: free() for name in ("sft", "aligned")},
            },
        },
        "comparisons": list(comparisons),
    }


PUBLISHED = {
    "title": "LLaRA, LastFM",
    "n": 122,
    "how": "Free answers with the candidates in the prompt; valid: exactly one candidate's title in the answer.",
    "defects": ["The candidates were drawn unseeded.", "n = 122: one hit is .0082."],
    "rows": [
        {"model": "GRU4Rec", "source": "arXiv 2312.02445", "HR@1": {"value": 0.2616, "ci95": None, "n": None}},
        {
            "model": "LLaRA (SASRec)",
            "source": "arXiv 2312.02445",
            "HR@1": {"value": 55 / 122, "ci95": list(significance.wilson(55, 122)), "hits": 55, "n": 122},
            "valid_ratio": cell(1.0, 122, 0.0),
        },
    ],
}


def whole():
    """Results with every part that may be there."""
    tested = [
        compare("HR@1", "sft", 0.041, 2e-4, p_holm=8e-4),
        compare("HR@1", "sft_more", 0.019, 0.021, p_holm=0.11),
        compare("HR@1", "cooccurrence", 0.014, 0.21),
        compare("HR@1", "oracle", -0.03, 0.004, p_holm=0.02),
        compare("NDCG@5", "sft", 0.033, 1e-5),
        compare("popularity_lift", "sft", -0.3, 1e-5, "catalogue"),
        compare("semantic_error_rate", "sft", 0.004, 0.4, "catalogue"),
    ]
    foreign = {"HR@1": cell(0.21, 500, 0.04), "HR@1_own": cell(0.448, 500, 0.04), "popularity": cell(0.38, 500, 0.04)}
    order = {
        "HR@1": [0.448, 0.44, 0.452, 0.446],
        "changed": cell(0.31, 500, 0.04),
        "slot_share": [0.1] + [0.9 / 19] * 19,
    }
    truth = {
        "epsilon_auc": 0.7421,
        "models": {"sft": {"true_win_rate": cell(0.513)}, "aligned": {"true_win_rate": cell(0.6)}},
    }
    return results(tested) | {
        "oracle": {"tau": 1.31, "ECE": 0.021, "ECE_at_tau_1": 0.052, "pairs": 43510},
        "probes": {
            name: {"foreign_history": foreign | {"n": 500}, "order": order | {"n": 500}} for name in ("sft", "aligned")
        },
        "published": PUBLISHED,
        "defects": ["Only 122 test rows: one hit is 0.0082.", "3 of 122 test targets never occur in training."],
        "truth": truth,
    }


def catalogue(titles=TITLES):
    return Catalogue(
        tuple(f"i{place}" for place in range(len(titles))), titles, ((),) * len(titles), np.zeros(len(titles), int)
    )


def predictions(first):
    """Rows of a prediction file whose target is item 0; `first(user)` is ranked first, the target otherwise second."""
    return [
        {
            "row": user,
            "user": f"<b>{user}",
            "position": 7,
            "target": "i0",
            "history": ["i2", "i1"],
            "ranked": [None if item is None else f"i{item}" for item in dict.fromkeys([first(user), 0, 2, 4])],
            "scores": [],
        }
        for user in range(USERS)
    ]


def speeds(step):
    """Of one line of metrics.jsonl; the first says what was compiled."""
    if step == 0:
        return {"compile_seconds": 12.5, "memory/peak_bytes": 2.0**30}
    rates = {"pairs_per_second": 300.0, "tokens_per_second": 5000.0, "flops_per_second": 2e12, "mfu": 0.4}
    more = {"tokens_useful": 0.93, "input_stall": 0.0 if step % 3 else 0.03, "memory/peak_bytes": 1.5 * 2**30}
    return {key: value + 100 * (step == 7) for key, value in rates.items()} | more


def material(**changes):
    curve = [{"step": s, "loss": 1 / (s + 1), "rewards/margins": s / 9, "validation/HR@1": None} for s in range(30)]
    everything = {
        "results": whole(),
        "predictions": {
            "candidates": {"sft": predictions(lambda u: u % 2), "aligned": predictions(lambda u: u // 2 % 2)}
        },
        "catalogue": catalogue(),
        "statistics": {"users": USERS, "interactions": 98765, "repairs": {"empty titles": 2}, "gini": 0.5},
        "metrics": {"sft": curve, "align": [row | speeds(row["step"]) for row in curve]},
        "pairs": {
            "epsilon": [[0.1, 0.5], [0.2, 0.3]],
            "strategy": [["self_hard", "uniform"]] * 2,
            "flipped": [True, False],
        },
        "manifests": {"evaluate": {"code": "0.1.0+abc", "resolved_config_hash": "feed", "packages": {"jax": "0.10.2"}}},
        "config": config.default().to_dict(),
    }
    return report.Material(**everything | changes)


def run(folder, seed=0, hits=20, found=None, **settings):
    """The folder of an evaluated run: its aligned model is right on the first `hits` users of 40, SFT on ten."""
    found = {"protocols": {"candidates": results()["protocols"]["candidates"]}} if found is None else found
    resolved = config.default()
    resolved.seed = seed
    resolved.update_from_flattened_dict(settings)
    files.write_json(folder / "evaluate" / "manifest.json", {"resolved_config": runtime.plain(resolved.to_dict())})
    for model, right in (("sft", 10), ("aligned", hits)):
        rows = predictions(lambda user, right=right: 0 if user < right else 1)
        files.write_jsonl(folder / "evaluate" / "predictions" / f"candidates.{model}.jsonl", rows)
        found["protocols"]["candidates"]["models"][model] |= {"HR@1": cell(right / USERS, USERS, 0.1)}
    for model in found["protocols"]["candidates"]["models"].values():
        model["HR@1"]["n"] = USERS
    files.write_json(folder / "evaluate" / "results.json", found)
    catalogue().save(folder / "prepare" / "catalogue.jsonl")
    return folder


def write(folder, found):
    """Everything of `found` in the places of a workdir; returns the folder of `evaluate`."""
    evaluate = folder / "evaluate"
    files.write_json(evaluate / "results.json", found.results)
    found.catalogue.save(folder / "prepare" / "catalogue.jsonl")
    files.write_json(folder / "prepare" / "statistics.json", found.statistics)
    files.write_jsonl(folder / "align" / "metrics.jsonl", found.metrics["align"])
    (folder / "pairs").mkdir()
    pyarrow.parquet.write_table(pa.table(found.pairs), folder / "pairs" / "pairs.parquet")
    for model, rows in found.predictions["candidates"].items():
        files.write_jsonl(evaluate / "predictions" / f"candidates.{model}.jsonl", rows)
    for verb in ("prepare", "align", "pairs", "evaluate"):
        files.write_json(folder / verb / "manifest.json", found.manifests.get(verb, {"code": "x"}))
    return evaluate
