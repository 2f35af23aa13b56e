"""Every loader with valid files: `Loader.make` writes them, `Loader.call` reads them as the stages do."""

import argparse
import gzip
import json
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pyarrow as pa
import pyarrow.parquet as pq
from harness import Loader

sys.path += [str(pathlib.Path(__file__).parents[1] / room) for room in ("data", "evaluation")]
import reported
import tokenizers_of_families

from rosepo_jax import config as defaults
from rosepo_jax import configuration, files
from rosepo_jax.__main__ import split_overrides
from rosepo_jax.data import chat, pairs, prompts, sequences, sources, store
from rosepo_jax.data.catalogue import load_names
from rosepo_jax.data.prompts import Encoder, Template
from rosepo_jax.decoding.trie import compile_trie
from rosepo_jax.evaluation import plots, predictions, protocols
from rosepo_jax.models import checkpoints_hf, families, peft, sasrec
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.models.lora import LoRAConfig, is_adapter
from rosepo_jax.stages import compare, export, plan, prepare, recommend, report, runtime, score
from rosepo_jax.stages.pool import Pool
from rosepo_jax.training import policy, sharding

TINY = DecoderConfig(vocabulary=11, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp_width=6, max_positions=64)
LORA = LoRAConfig(rank=2, alpha=4.0, targets="attention/query|mlp/down")
TITLES = ("Heat", "Amélie (2001)", "Argo", "HEAT", "Lincoln, a life", "Brave", "Up", "Her", "Jaws", "Alien")
USERS = ("1", "2", "three")
LOG = [(user, f"0{item}", 100 * item, 3.5) for start, user in enumerate(USERS) for item in range(start, start + 5)]
HEADER = ("user", "item", "timestamp", "rating")


def write(folder: pathlib.Path, **contents: str | bytes) -> None:
    """Files by name, `__` standing for a dot and `_in_` for a folder."""
    for name, content in contents.items():
        path = folder / name.replace("_in_", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def lines(rows, separator: str) -> str:
    return "".join(separator.join(map(str, row)) + "\n" for row in rows)


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(path: pathlib.Path, columns: dict) -> None:
    pq.write_table(pa.table(columns), path)


# ---- logs and titles ------------------------------------------------------------------------------------------------


def read_log(source: str, path: pathlib.Path, scratch: pathlib.Path, **settings) -> None:
    """As `prepare` reads it, down to what it writes."""
    data = defaults.default().data
    data.update({"source": source, "path": str(path), "core_user": 1, "core_item": 1, "min_history": 1} | settings)
    data.candidates, data.split = (3, "given") if source in ("llara", "sequences") else (2, "leave_one_out")
    prepared = sequences.build(sources.read(data, 0), data, 0)
    prepared.catalogue.save(scratch / "catalogue.jsonl")
    files.write_json(scratch / "users.json", list(prepared.users))
    prepare.table(prepared.statistics)


def make_movielens(folder: pathlib.Path) -> None:
    flags = "|".join(["0", "1", *["0"] * 17])
    write(
        folder,
        old_in_u__data=lines([(u, i, 4, t) for u, i, t, _ in LOG], "\t"),
        old_in_u__item=lines([(f"0{i}", t, "", "", "", flags) for i, t in enumerate(TITLES)], "|").encode("latin-1"),
        dat_in_ratings__dat=lines([(u, i, 4, t) for u, i, t, _ in LOG], "::"),
        dat_in_movies__dat=lines([(f"0{i}", t, "War|Art") for i, t in enumerate(TITLES)], "::"),
        csv_in_ratings__csv="userId,movieId,rating,timestamp\n" + lines([(u, i, 4, t) for u, i, t, _ in LOG], ","),
        csv_in_movies__csv="movieId,title,genres\n"
        + lines([(f"0{i}", f'"{t}"', "War") for i, t in enumerate(TITLES)], ","),
    )


def make_table(folder: pathlib.Path) -> None:
    records = [dict(zip(HEADER, row)) for row in LOG]
    titles = [{"item": f"0{i}", "title": t, "genre": ["War", "Art"]} for i, t in enumerate(TITLES)]
    write(
        folder,
        log__csv=lines([HEADER, *LOG], ","),
        log__tsv=lines([HEADER, *LOG], "\t"),
        log__csv__gz=gzip.compress(lines([HEADER, *LOG], ",").encode(), mtime=0),
        log__jsonl=jsonl(records),
        titles__jsonl=jsonl(titles),
    )
    parquet(folder / "log.parquet", {name: [record[name] for record in records] for name in HEADER})
    parquet(folder / "titles.parquet", {name: [row[name] for row in titles] for name in titles[0]})


def read_table(folder: pathlib.Path, path: pathlib.Path) -> None:
    columns = {"rating": "rating", "groups": "genre"}
    if path.name.startswith("titles"):
        logs = [(folder / "log.csv", path), (folder / "log.parquet", path)]
    else:
        logs = [(path, folder / "titles.jsonl")]
    for log, titles in logs:
        read_log("table", log, folder, titles=str(titles), columns=columns)


def make_recbole(folder: pathlib.Path) -> None:
    header = "user_id:token\titem_id:token\ttimestamp:float\trating:float\n"
    titles = "item_id:token\ttitle:token_seq\tclass:token_seq\n"
    write(
        folder,
        a__inter=header + lines(LOG, "\t"),
        a__item=titles + lines([(f"0{i}", t, "War Art") for i, t in enumerate(TITLES)], "\t"),
    )


def make_amazon(folder: pathlib.Path) -> None:
    new = [{"user_id": u, "parent_asin": i, "timestamp": t, "rating": r} for u, i, t, r in LOG]
    old = [{"reviewerID": u, "asin": i, "unixReviewTime": t, "overall": r} for u, i, t, r in LOG]
    meta = [{"parent_asin": f"0{i}", "asin": f"0{i}", "title": t, "categories": ["A"]} for i, t in enumerate(TITLES)]
    write(
        folder,
        new_in_reviews__jsonl=jsonl(new),
        new_in_meta__jsonl=jsonl(meta),
        old_in_reviews__json__gz=gzip.compress(jsonl(old).encode(), mtime=0),
        old_in_meta__json__gz=gzip.compress(jsonl(meta).encode(), mtime=0),
    )


def make_published(folder: pathlib.Path) -> None:
    names = lines([(f"{i}", f"Name {i}") for i in range(9)], "::")
    sessions = [("train", "a", "0 1 2 3 4"), ("val", "b", "1 2 3 5"), ("test", "c", "2 3 4 6")]
    ranges = [("a", "1,2", "3,3", "4,4", "0 1 2 3 4"), ("b", "1,1", "", "2,3", "5 6 7 8")]
    frame = {"historyList": "Name 1::Name 2", "itemList": ["Name 3", "Name 5", "Name 6"], "trueSelection": "Name 5"}
    write(
        folder,
        llara_in_id2name__txt=names,
        llara_in_sessions__tsv="split\tuser\titems\n" + lines(sessions, "\t"),
        llara_in_val__jsonl=jsonl([{"seq": ["1", "2"], "next": "3"}] * 2),
        llara_in_test__jsonl=jsonl([{"seq": [2, 3, 99], "next": 4, "user": "c"}] * 2),
        sdpo_in_id2name__txt=names,
        sdpo_in_sessions__tsv="split\tuser\titems\n" + lines(sessions, "\t"),
        sdpo_in_x_test__json=json.dumps([frame, frame]),
        sequences_in_id2title__tsv="item\ttitle\n" + lines([(i, f"Name {i}") for i in range(9)], "\t"),
        sequences_in_sequences__tsv="user\ttrain_idx\tval_idx\ttest_idx\titems\n" + lines(ranges, "\t"),
    )
    (folder / "sdpo" / "x_test.json").rename(folder / "sdpo" / "x-test.json")


def read_published(folder: pathlib.Path, path: pathlib.Path) -> None:
    read_log("sequences" if path.parent.name == "sequences" else "llara", path.parent, folder)


# ---- configs --------------------------------------------------------------------------------------------------------

CONFIG = """
from rosepo_jax import config

def get_config(arg=""):
    c = config.default()
    c.seed = 3
    c.align.beta = 0.5
    c.evaluate.protocols = ("candidates",)
    return c

def get_sweep():
    return [{"align.beta": 0.1}, {"seed": 1}]
"""
FLAGS = ["seed=3", "align.beta=0.5", "evaluate.protocols=candidates,windows", "log.tensorboard=false", "data.path=x"]


def make_config(folder: pathlib.Path) -> None:
    write(folder, config__py=CONFIG, flags__txt="\n".join(FLAGS))
    files.write_json(folder / "config.json", runtime.plain(defaults.default().to_dict()))


def read_config(folder: pathlib.Path, path: pathlib.Path) -> None:
    """A config, or the words of a command line that override one and sweep over others."""
    if path.suffix != ".txt":
        configuration.load(str(path))
        configuration.get_sweep(str(path))
        return
    if not path.is_file():  # no loader reads this one
        return
    flags = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")  # as Python reads a command line
    _, overrides = split_overrides([f"--config.{flag}" for flag in flags])
    configuration.load(None, overrides)
    config = configuration.load(None)
    for run in plan.planned(config, plan.product(plan.parse(config, flags))):
        assert pathlib.PurePath(run.name).name == run.name and len(run.name) <= 255 and run.name.isprintable()


# ---- models ---------------------------------------------------------------------------------------------------------


def random_params(config: DecoderConfig, lora: LoRAConfig | None = None) -> dict:
    shapes = jax.eval_shape(LanguageModel(config, lora).init, jax.random.key(0))
    return {path: jnp.ones(value.shape, value.dtype) for path, value in shapes.items()}


def make_hf_config(folder: pathlib.Path) -> None:
    for family in families.FAMILIES:
        raw = families.config_json(TINY, "float32", {}) | {
            "model_type": family, "architectures": [families.FAMILIES[family].architecture], "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "max_window_layers": 1,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 64},
        }  # fmt: skip
        if family.startswith("gemma"):
            raw |= {"hidden_activation": "gelu_pytorch_tanh", "sliding_window_pattern": 2}
        files.write_json(folder / f"{family}.json", raw)


def make_weights(folder: pathlib.Path) -> None:
    params = random_params(TINY)
    checkpoints_hf.write(folder / "one", TINY, params, None)
    checkpoints_hf.write(folder / "shards", TINY, params, None, shard_bytes=900)
    for path in folder.glob("*/config.json"):
        path.unlink()


def make_peft(folder: pathlib.Path) -> None:
    params = random_params(TINY, LORA)
    peft.write(folder / "adapter", TINY, LORA, {p: v for p, v in params.items() if is_adapter(p)}, base="owner/model")


def read_peft(folder: pathlib.Path, path: pathlib.Path) -> None:
    peft.base_name(path.parent)
    peft.read(path.parent, TINY, peft.read_config(path.parent))


def make_tokenizer(folder: pathlib.Path) -> None:
    for family in (tokenizers_of_families.llama3, tokenizers_of_families.gemma):
        family(folder / family.__name__)
        for template in (folder / family.__name__).glob("chat_template.jinja"):
            template.unlink()


def read_tokenizer(folder: pathlib.Path, path: pathlib.Path) -> None:
    encoder = Encoder(path.parent, Template.load("titles"), 64, 32)
    for texts in (encoder.prompt_ids(["Argo\nHeat 1995\n"]), encoder.response_ids(["Amélie", "\ue000 x" * 3])):
        encoder.decode(texts[0])


def make_chat(folder: pathlib.Path) -> None:
    write(folder, llama__jinja=tokenizers_of_families.LLAMA3_CHAT, qwen__jinja=tokenizers_of_families.QWEN_CHAT)


def make_templates(folder: pathlib.Path) -> None:
    shipped = pathlib.Path(prompts.__file__).parent / "templates"
    for name in ("movies", "movies_candidates"):
        (folder / f"{name}.txt").write_bytes((shipped / f"{name}.txt").read_bytes())


def read_template(folder: pathlib.Path, path: pathlib.Path) -> None:
    Template.load(str(path)).render(["{x}", "a"], ["b"])


def make_oracle(folder: pathlib.Path) -> None:
    config = sasrec.SASRecConfig(items=6, positions=4, width=4, layers=1, heads=1)
    sasrec.save(folder / "oracle", config, sasrec.init(config, jax.random.key(0)), tau=1.0)


# ---- what stages left -----------------------------------------------------------------------------------------------


def small_config():
    c = defaults.default()
    c.data.world.update({"users": 30, "titles": 30, "series": 6, "genres": 4, "length": 8})
    c.data.core_item, c.data.windows, c.data.candidates = 1, True, 4
    c.model.update({"vocabulary": 270, "width": 8, "layers": 1, "heads": 2, "kv_heads": 1, "mlp_width": 6})
    c.evaluate.update({"bootstrap": 20, "max_generate": 4})
    c.log.compilation_cache = ""
    return c


def make_prepared(folder: pathlib.Path) -> None:
    """A workdir in which `prepare` is complete."""
    runtime.execute(prepare, small_config(), folder)


def read_store(folder: pathlib.Path, path: pathlib.Path) -> None:
    for split in ("train", "test", "windows"):
        store.read(folder / "prepare" / "dataset", split)


def read_prepared(folder: pathlib.Path, path: pathlib.Path) -> None:
    """As `export`, `recommend`, `pairs` and `evaluate` read what `prepare` left, and the trie of its titles."""
    config, prepared = small_config(), folder / "prepare"
    users, catalogue = load_names(prepared)
    store.train_items(prepared, len(catalogue))
    protocols.Truth.load(prepared)
    rows = protocols.rows_of(config, prepared, "candidates", len(users), len(catalogue))
    list(predictions.questions(rows, users, catalogue))
    recommend.user_history(folder, users[0], users, catalogue)
    compile_trie([[*map(ord, title), 0] for title in catalogue.titles if "\0" not in title], 0)


def make_pairs(folder: pathlib.Path) -> None:
    turns = [{"role": "user", "content": "a"}]
    rows = [
        {"prompt": "p", "chosen": "c", "rejected": ["r", "s"], "epsilon": [0.1, 0.2]},
        {"prompt": turns, "chosen": turns, "rejected": ["r", "s"], "epsilon": 0.3},
    ]
    write(folder, rows__jsonl=jsonl(rows))
    columns = {"prompt": ["p", "q"], "chosen": ["c", "d"], "rejected": [["r"], ["s"]], "epsilon": [0.1, 0.2]}
    parquet(folder / "rows.parquet", columns)
    pairs.write(folder / "pairs.parquet", pairs.import_rows(folder / "rows.jsonl"))


def read_pairs(folder: pathlib.Path, path: pathlib.Path) -> None:
    found = pairs.read(path) if path.name == "pairs.parquet" else pairs.import_rows(path)
    pairs.write(folder / "out.parquet", found)
    pairs.write_trl(folder / "out.jsonl", found)


def make_score(folder: pathlib.Path) -> None:
    write(folder, rows__jsonl=jsonl([{"prompt": "p", "response": "r", "more": {"a": 1.5}}] * 3))


def read_score(folder: pathlib.Path, path: pathlib.Path) -> None:
    files.write_jsonl(folder / "out.jsonl", [{**row, "logp": -1.0} for row in score.read(path)])


def make_predictions(folder: pathlib.Path) -> None:
    make_prepared(folder)
    users, catalogue = load_names(folder / "prepare")
    rows = protocols.rows_of(small_config(), folder / "prepare", "candidates")
    asked = list(predictions.questions(rows, users, catalogue))
    who = [{"user": row["user"], "position": row["position"]} for row in asked]
    scores = [-1.0, -2.5, -3.0, -4.0]
    ranked = [w | {"ranked": row["candidates"], "scores": scores} for w, row in zip(who, asked)]
    titles = [w | {"titles": row["candidate_titles"]} for w, row in zip(who, asked)]
    texts = [w | {"text": row["candidate_titles"][0], "ended": True} for w, row in zip(who, asked)]
    write(folder, ranked__jsonl=jsonl(ranked), titles__jsonl=jsonl(titles), texts__jsonl=jsonl(texts))
    (folder / "ranked.jsonl.gz").write_bytes(gzip.compress(jsonl(ranked).encode(), mtime=0))


def reads_predictions() -> Callable:
    asked: dict = {}

    def read(folder: pathlib.Path, path: pathlib.Path) -> None:
        if folder not in asked:
            users, catalogue = load_names(folder / "prepare")
            asked[folder] = protocols.rows_of(small_config(), folder / "prepare", "candidates"), users, catalogue
        predictions.kind(path)
        answers = predictions.read(path, *asked[folder])
        rows, users, catalogue = asked[folder]
        predictions.only_candidates(answers, rows, catalogue)
        predictions.write(folder / "out.jsonl", rows, answers, users, catalogue)

    return read


def make_model(folder: pathlib.Path) -> None:
    """A model folder as `sft` leaves it."""
    config, mesh = small_config(), sharding.make_mesh(small_config().mesh)
    made = policy.create(config, folder / "sft", mesh, TITLES)
    policy.checkpoint.save_params(folder / "sft" / "model", made.trainable)


def read_model(folder: pathlib.Path, path: pathlib.Path) -> None:
    config = small_config()
    policy.load(config, folder / "sft", sharding.make_mesh(config.mesh))


# ---- run folders ----------------------------------------------------------------------------------------------------


def make_runs(folder: pathlib.Path) -> None:
    reported.run(folder / "a", 0, 20, reported.whole() | {"published": None})
    reported.run(folder / "b", 1, 25, reported.whole() | {"published": None})
    for path in folder.glob("*/evaluate/predictions/*.jsonl"):
        path.write_text(path.read_text().replace("<b>", "u"))


class Air:
    """An axis that takes any paint."""

    def __getattr__(self, name: str) -> "Air":
        return self

    def __call__(self, *arguments, **options) -> "Air":
        return self


def drawn_without_ink(function: Callable) -> Callable:
    """Calls with plots that are painted on air: matplotlib takes a hundred times as long."""

    def call(folder: pathlib.Path, path: pathlib.Path) -> None:
        whole = plots._draw
        plots._draw = lambda description, paint, *size: paint(Air()) or ""
        try:
            function(folder, path)
        finally:
            plots._draw = whole

    return call


def read_runs(folder: pathlib.Path, path: pathlib.Path) -> None:
    arguments = argparse.Namespace(runs=[folder / "a", folder / "b"], output=folder / "out", protocols="")
    compare.main(None, arguments)


def make_report(folder: pathlib.Path) -> None:
    reported.write(folder, reported.material())
    other = {"protocols": {"candidates": {"hash": "c4nd", "models": {"mine": {"HR@1": reported.cell(0.3)}}}}}
    files.write_json(folder / "others" / "mine" / "candidates.results.json", other)
    whole = {
        "stage": "evaluate", "identity": "1", "config": {"seed": 0}, "config_hash": "2", "inputs": {"align": "3"},
        "code": "c", "resolved_config": runtime.plain(defaults.default().to_dict()), "resolved_config_hash": "4",
        "packages": {"jax": "1"}, "python": "3", "platform": "p", "started": "2026-01-01", "seconds": 1.5,
        "device": {"kind": "cpu", "backend": "cpu", "count": 1, "processes": 1}, "seeds": {"seed": 0}, "result": {},
    }  # fmt: skip
    for verb in ("prepare", "sft", "align", "pairs", "evaluate"):
        files.write_json(folder / verb / "manifest.json", whole | {"identity": {"align": "3"}.get(verb, "1")})


def read_report(folder: pathlib.Path, path: pathlib.Path) -> None:
    """The page of a run, its summary, its model card."""
    found = report.material(defaults.default(), folder)
    out = folder / "out"
    report.write(found, out)
    files.write_text(out / "card.md", export.card(folder, "align"))


def make_manifests(folder: pathlib.Path) -> None:
    make_prepared(folder)


def read_manifests(folder: pathlib.Path, path: pathlib.Path) -> None:
    """Whether a stage is up to date, and what a sweep shares."""
    runtime.execute(prepare, small_config(), folder)
    runtime.identity(folder / "prepare")
    Pool(folder).find("of no stage")


LOADERS = [
    Loader("movielens", make_movielens, lambda f, p: read_log("movielens", p.parent, f), ("old/*", "dat/*", "csv/*")),
    Loader("table", make_table, read_table, ("log*", "titles*")),
    Loader("recbole", make_recbole, lambda f, p: read_log("recbole", f, f), ("*.inter", "*.item")),
    Loader("amazon", make_amazon, lambda f, p: read_log("amazon", p.parent, f), ("*/*",)),
    Loader("published", make_published, read_published, ("*/*",)),
    Loader("config", make_config, read_config, ("*",)),
    Loader("hf_config", make_hf_config, lambda f, p: families.read_config(p), ("*",)),
    Loader(
        "hf_weights",
        make_weights,
        lambda f, p: checkpoints_hf.read(p.parent, TINY),
        ("*/*.safetensors", "*/*.index.json"),
    ),
    Loader("peft", make_peft, read_peft, ("*/*",)),
    Loader("tokenizer", make_tokenizer, read_tokenizer, ("*/*.json",)),
    Loader("chat", make_chat, lambda f, p: chat.render(files.read_text(p), {"bos_token": "<s>"}), ("*",)),
    Loader("template", make_templates, read_template, ("*",)),
    Loader("oracle", make_oracle, lambda f, p: sasrec.load(p.parent), ("*/*",)),
    Loader("store", make_prepared, read_store, ("prepare/dataset/*",)),
    Loader("prepared", make_prepared, read_prepared, ("prepare/*.json*", "prepare/*.npz", "prepare/dataset/*test*")),
    Loader("pairs", make_pairs, read_pairs, ("rows.*", "pairs.*")),
    Loader("score", make_score, read_score, ("rows.jsonl",)),
    Loader("predictions", make_predictions, reads_predictions(), ("ranked*", "titles*", "texts*")),
    Loader("model", make_model, read_model, ("sft/**/*",), share=0.1),
    Loader("manifests", make_manifests, read_manifests, ("prepare/manifest.json",)),
    Loader("runs", make_runs, drawn_without_ink(read_runs), ("*/evaluate/**/*.json*", "*/prepare/*")),
    Loader("report", make_report, drawn_without_ink(read_report), ("**/*.json*", "**/*.parquet")),
    Loader("page", make_report, read_report, ("evaluate/results.json", "align/metrics.jsonl"), share=0.01, seconds=50),
]
