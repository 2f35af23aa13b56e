"""What no input may do: run code, be followed out of its folder, keep a loader waiting, show in a page as markup."""

import ast
import contextlib
import gzip
import html.parser
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import harness
import hostile
import loaders
import numpy as np
import pytest
from loaders import LOADERS, load_names, make_prepared, small_config, tokenizers_of_families

from rosepo_jax import __main__, files
from rosepo_jax.data import chat
from rosepo_jax.data.prompts import Encoder, Template
from rosepo_jax.errors import UserError
from rosepo_jax.models import checkpoints_hf, families
from rosepo_jax.stages import prepare, report, runtime

REPOSITORY = pathlib.Path(__file__).parents[2]

# ---- what stands in no source ---------------------------------------------------------------------------------------

_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "yaml.load", "pickle.load",
    "pickle.loads", "marshal.loads", "subprocess.getoutput", "subprocess.getstatusoutput", "pandas.read_pickle",
}  # fmt: skip
_ONLY_FALSE = {"trust_remote_code", "allow_pickle", "shell"}


def dangers(source: str) -> list[str]:
    """Lines of a source that could run what stands in a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [
                f"{node.lineno}: import {name.name}" for name in node.names if name.name.split(".")[0] in _MODULES
            ]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _MODULES:
            found.append(f"{node.lineno}: from {node.module} import")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in _CALLS or (called in ("np.load", "numpy.load") and "allow_pickle" not in keywords):
            found.append(f"{node.lineno}: {called}")
        found += [f"{node.lineno}: {w}={v}" for w, v in keywords.items() if w in _ONLY_FALSE and v != "False"]
    return found


SOURCES = [
    path for room in ("rosepo_jax", "launch", "benchmarks", "configs") for path in REPOSITORY.glob(f"{room}/**/*.py")
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_source_runs_what_it_reads(path):
    assert dangers(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from yaml import load", "eval('1')", "np.load(p)", "np.load(p, allow_pickle=True)",
        "f(trust_remote_code=x)", "run('ls', shell=True)", "os.system('ls')", "torch.load(p)",
    ],
)  # fmt: skip
def test_the_guard_sees(line):
    assert dangers(line)


def test_scripts_evaluate_no_text():
    for path in REPOSITORY.glob("launch/*.sh"):
        words = path.read_text("utf-8").split()
        assert "eval" not in words, path


# ---- code in files --------------------------------------------------------------------------------------------------


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_pickles_in_arrays_are_refused_and_do_not_run(tmp_path):
    touched = tmp_path / "touched"
    payload = np.array([Payload(touched)], object)
    np.save(tmp_path / "a.npy", payload, allow_pickle=True)
    np.savez(tmp_path / "b.npz", indptr=payload, items=payload)
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npy").read_bytes()[128:])  # the bare pickle
    for call in (
        lambda: files.read_npy(tmp_path / "a.npy"),
        lambda: files.read_npz(tmp_path / "b.npz", "indptr"),
        lambda: files.read_npz(tmp_path / "c.npz", "indptr"),
    ):
        with pytest.raises(UserError, match="damaged"):
            call()
    np.load(tmp_path / "a.npy", allow_pickle=True)  # it would have worked
    assert touched.exists()


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(1_000_000))
        archive.writestr("items.npy", buffer.getvalue())
    with pytest.raises(UserError, match="unpacks to more than its size"):
        files.read_npz(tmp_path / "a.npz", "items")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl"])
def test_pickled_weights_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(hostile.PICKLE)
    with harness.watched(tmp_path) as events, pytest.raises(UserError, match="pickle format are refused"):
        checkpoints_hf.read(tmp_path, loaders.TINY)
    assert not events


def test_code_beside_a_model_does_not_run(tmp_path):
    """`auto_map` names classes of Python files in the model's folder; trust_remote_code would import them."""
    folder, touched = tmp_path / "model", tmp_path / "touched"
    tokenizers_of_families.qwen(folder)
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(touched)!r}).touch()\nclass T: pass\n")
    remote = {"AutoTokenizer": ["evil.T", "evil.T"], "AutoConfig": "evil.T", "AutoModelForCausalLM": "evil.T"}
    config = families.config_json(loaders.TINY, "float32", {}) | {"auto_map": remote}
    for name, more in (("config.json", config), ("tokenizer_config.json", {"auto_map": remote})):
        path = folder / name
        files.write_json(path, (files.read_json(path) if path.exists() else {}) | more)
    for tokenizer_class in ("PreTrainedTokenizerFast", "T"):
        settings = files.read_json(folder / "tokenizer_config.json")
        files.write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": tokenizer_class})
        with contextlib.suppress(UserError):
            Encoder(folder, Template.load("titles"), 64, 32)
        assert checkpoints_hf.read_config(folder) == loaders.TINY
    assert not touched.exists()


def test_a_data_set_names_no_module_to_import(tmp_path):
    """TFDS imports the module that features.json names; ours does not ask it."""
    make_prepared(tmp_path)
    path = tmp_path / "prepare" / "dataset" / "features.json"
    path.write_text(path.read_text().replace("tensorflow_datasets.core.features.tensor_feature", "antigravity"))
    loaders.read_store(tmp_path, path)
    assert "antigravity" not in sys.modules


# ---- templates and expressions that never end -----------------------------------------------------------------------

ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "memory": "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "output": "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_chat_template_has_limits(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(chat, "SECONDS", 4)
    tokenizers_of_families.qwen(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(ENDLESS[kind] + tokenizers_of_families.QWEN_CHAT)
    with pytest.raises(UserError, match=r"the chat template (does not come to an end|cannot be rendered)") as refused:
        Encoder(tmp_path, Template.load("titles"), 64, 32, chat=True)
    assert str(tmp_path) in str(refused.value)


def test_an_expression_that_backtracks_ends(tmp_path):
    tokenizers_of_families.qwen(tmp_path)
    settings = files.read_json(tmp_path / "tokenizer.json")
    split = {"type": "Split", "pattern": {"Regex": r"(a|aa|a+)+$"}, "behavior": "Isolated", "invert": False}
    files.write_json(tmp_path / "tokenizer.json", settings | {"pre_tokenizer": split})
    with harness.deadline(60), contextlib.suppress(UserError):
        Encoder(tmp_path, Template.load("titles"), 64, 64).ids(["a" * 40 + "b"])


# ---- places that are no files ---------------------------------------------------------------------------------------

PLACES = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "endless": lambda path: path.symlink_to("/dev/zero"),
}
_SLOW = {"page", "report", "model"}


@pytest.mark.parametrize("loader", [each for each in LOADERS if each.name not in _SLOW], ids=lambda loader: loader.name)
def test_what_is_no_file(loader, tmp_path):
    folder = tmp_path / "case"
    folder.mkdir()
    loader.make(folder)
    for path in loader.files(folder):
        content = path.read_bytes()
        loader.call(folder, path)  # so that all is imported
        for place in PLACES.values():
            path.unlink()
            place(path)
            harness.once(loader, folder, path)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            path.write_bytes(content)


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prepare").symlink_to(tmp_path / "elsewhere")
    out = runtime.execute(prepare, small_config(), tmp_path / "run")
    assert (out / "manifest.json").exists() and not out.is_symlink()
    assert list((tmp_path / "elsewhere").iterdir()) == []


# ---- the command line -----------------------------------------------------------------------------------------------

BAD = {"bytes": b"\xff\xfe\x00\x80", "nothing": b"", "deep": b"[" * 100_000, "other": b'{"a": [1, "\\ud800", 1e999]}\n'}
CONFIG = ["--config", "{base}/config.json", "--workdir", "{base}/w"]
SOURCE = [*CONFIG, "--config.data.path", "{folder}", "--config.data.source"]


def words(verb: str, *rest: str) -> list[str]:
    return [verb, *rest]


# loader -> the file that is damaged, and the command that reads it
COMMANDS = {
    "movielens": (
        "dat/ratings.dat",
        words("prepare", *CONFIG, "--config.data.path={folder}/dat", "--config.data.source=movielens"),
    ),
    "table": (
        "log.jsonl",
        words("prepare", *CONFIG, "--config.data.path={folder}/log.jsonl", "--config.data.source=table"),
    ),
    "recbole": ("a.item", words("prepare", *SOURCE, "recbole")),
    "amazon": (
        "new/meta.jsonl",
        words("prepare", *CONFIG, "--config.data.path={folder}/new", "--config.data.source=amazon"),
    ),
    "published": (
        "llara/sessions.tsv",
        words("prepare", *CONFIG, "--config.data.path={folder}/llara", "--config.data.source=llara"),
    ),
    "config": ("config.json", words("prepare", "--config={folder}/config.json", "--workdir={base}/w")),
    "hf_config": ("llama.json", words("doctor", *CONFIG, "--config.model.architecture={folder}/llama.json")),
    "template": (
        "movies.txt",
        words(
            "score",
            "--config.data.template={folder}/movies.txt",
            "--model={base}/hf",
            "--input={base}/in.jsonl",
            "--output={base}/out.jsonl",
        ),
    ),
    "score": (
        "rows.jsonl",
        words("score", "--model={base}/hf", "--input={folder}/rows.jsonl", "--output={base}/out.jsonl"),
    ),
    "peft": (
        "adapter/adapter_config.json",
        words(
            "score",
            "--model={folder}/adapter",
            "--config.model.path={base}/hf",
            "--input={base}/in.jsonl",
            "--output={base}/out.jsonl",
        ),
    ),
    "hf_weights": (
        "one/model.safetensors",
        words("score", "--model={folder}/one", "--input={base}/in.jsonl", "--output={base}/out.jsonl"),
    ),
    "tokenizer": (
        "llama3/tokenizer.json",
        words("score", "--model={folder}/llama3", "--input={base}/in.jsonl", "--output={base}/out.jsonl"),
    ),
    "predictions": ("ranked.jsonl", words("evaluate", "--workdir={folder}", "--predictions={folder}/ranked.jsonl")),
    "prepared": (
        "prepare/catalogue.jsonl",
        words("export", "--workdir={folder}", "--format=rows", "--output={base}/rows"),
    ),
    "manifests": ("prepare/manifest.json", words("prepare", "--workdir={folder}")),
    "runs": ("a/evaluate/results.json", words("report", "{folder}/a", "{folder}/b", "--output={base}/comparison")),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What commands need beside the damaged file: a config, a model, rows to score."""
    base = tmp_path_factory.mktemp("base")
    files.write_json(base / "config.json", runtime.plain(small_config().to_dict()))
    files.write_jsonl(base / "in.jsonl", [{"prompt": "p", "response": "r"}])
    write_model(base / "hf")
    return base


def write_model(folder: pathlib.Path) -> None:
    checkpoints_hf.write(folder, loaders.TINY, loaders.random_params(loaders.TINY), None)
    tokenizers_of_families.qwen(folder)


def tree(*folders: pathlib.Path) -> list[tuple[str, float]]:
    return sorted((str(p), p.stat().st_mtime) for folder in folders for p in folder.rglob("*") if p.is_file())


def prepared_command(name: str, base: pathlib.Path, folder: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    loader = next(each for each in LOADERS if each.name == name)
    folder.mkdir()
    loader.make(folder)
    if name in ("hf_weights", "tokenizer"):
        model = folder / ("one" if name == "hf_weights" else "llama3")
        shutil.copytree(
            base / "hf",
            model,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("tokenizer*" if name == "tokenizer" else "x"),
        )
    damaged, command = COMMANDS[name]
    return folder / damaged, [word.format(base=base, folder=folder) for word in command]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_it_in_one_line(name, base, tmp_path, capsys):
    path, command = prepared_command(name, base, tmp_path / "case")
    for content in BAD.values():
        if name in ("template", "score") and not content:  # without rows there is nothing to do, and that is done
            continue
        path.write_bytes(content)
        before = tree(base, tmp_path)
        assert __main__.main(command) == 2, content[:20]
        said = capsys.readouterr().err
        assert said.startswith(f"rosepo {command[0]}: ") and len(said.splitlines()) == 1, said
        assert tree(base, tmp_path) == before


@pytest.mark.parametrize("name", COMMANDS if "ROSEPO_FUZZ" in os.environ else ["config", "table", "runs"])
def test_a_process_ends_with_status_2(name, base, tmp_path):
    path, command = prepared_command(name, base, tmp_path / "case")
    path.write_bytes(BAD["bytes"])
    done = subprocess.run([sys.executable, "-m", "rosepo_jax", *command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr


def test_messages_are_one_printable_line():
    said = str(UserError("a\nb\x1b[31m\u2028\u202e\ud800" + "x" * 10_000))
    assert said.splitlines() == [said] and said.startswith(r"a\nb\x1b[31m\u2028\u202e\ud800x") and len(said) < 2100
    said.encode("utf-8")


# ---- secrets --------------------------------------------------------------------------------------------------------

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY")


def test_secrets_of_the_environment_show_nowhere(tmp_path):
    secret = "s3cr3t" * 5
    environment = {**os.environ, **dict.fromkeys(SECRETS, secret)}
    config = REPOSITORY / "configs" / "demo.py"
    for command in (["prepare", f"--config={config}:smoke", "--workdir=w"], ["doctor", "--workdir=w"]):
        done = subprocess.run(
            [sys.executable, "-m", "rosepo_jax", *command],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        assert secret not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (tmp_path / "w" / "prepare" / "manifest.json") in written
    assert not any(secret.encode() in path.read_bytes() for path in written)


# ---- titles as markup -----------------------------------------------------------------------------------------------

MARKUP = '"><script>alert(1)</script><img src=x onerror=alert(2)>../../x\u2028'


class Tags(html.parser.HTMLParser):
    """All tags of a page, and their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.found: dict[str, set[str]] = {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.setdefault(tag, set()).update(name for name, _ in attributes)


def marked(value):
    """The value with markup in every text but hashes and names that the page knows."""
    if isinstance(value, dict):
        return {key: marked(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [marked(inner) for inner in value]
    return value + MARKUP if isinstance(value, str) and not value.isalnum() else value


def test_no_text_of_a_run_becomes_markup(tmp_path):
    """Titles, ids, names of models, defects, settings and versions, from files to the page."""
    loaders.make_report(tmp_path)
    for path in tmp_path.rglob("*.json"):
        files.write_json(path, marked(files.read_json(path)))
    results = files.read_json(tmp_path / "evaluate" / "results.json")
    results["protocols"]["candidates"]["models"][MARKUP] = results["protocols"]["candidates"]["models"]["sft"]
    files.write_json(tmp_path / "evaluate" / "results.json", results)
    for name in (
        "prepare/catalogue.jsonl",
        *(f"evaluate/predictions/candidates.{m}.jsonl" for m in ("sft", "aligned")),
    ):
        rows = [
            {k: v + MARKUP if k in ("title", "user") else v for k, v in row.items()}
            for row in files.read_jsonl(tmp_path / name)
        ]
        files.write_jsonl(tmp_path / name, rows)
    config = small_config()
    config.data.path = "/x/" + MARKUP.replace("\u2028", "")
    report.write(report.material(config, tmp_path), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "alert(1)" in page  # as text
    found = Tags(page).found
    assert not found.keys() & {"script", "img", "iframe", "object", "embed", "form", "link", "base"}
    assert not any(attribute.startswith("on") for names in found.values() for attribute in names)
    hrefs = [part.split('"')[0] for part in page.split('href="')[1:]]
    assert all(href.startswith("#") for href in hrefs)


def test_ids_with_separators_stay_in_the_folder(tmp_path):
    """User and item ids are text in files, never names of files."""
    taken = {"a": range(5), "b": range(3, 8), "c": range(5, 10)}
    rows = [(f"../{u}", f"/etc/{item}", item, f"{MARKUP}{item}") for u, items in taken.items() for item in items]
    log = tmp_path / "in" / "log.jsonl"
    files.write_jsonl(log, [dict(zip(("user", "item", "timestamp", "title"), row)) for row in rows])
    config = small_config()
    config.data.update(
        {"source": "table", "path": str(log), "min_history": 1, "candidates": 2, "windows": False, "core_user": 1}
    )
    with harness.watched(tmp_path / "run") as events:
        runtime.execute(prepare, config, tmp_path / "run")
    assert not events
    users, catalogue = load_names(tmp_path / "run" / "prepare")
    assert users == ["../a", "../b", "../c"] and catalogue.ids[0] == "/etc/0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "run"]
    assert json.dumps(catalogue.titles)  # and can be written


@pytest.mark.parametrize(
    ("line", "message"), [(b"\n", "blank lines"), (b"1,2,3\n", "unpacks to over 50 times its size")]
)
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, line, message):
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(line * (80_000_000 // len(line)), 1))
    read = 0
    with pytest.raises(UserError, match=message):
        for _, text in files.lines(tmp_path / "log.csv.gz"):
            read += len(text)
    assert read < 51 * (tmp_path / "log.csv.gz").stat().st_size
