"""Configs: loading, types, refusals; and that every key is read by some code."""

import ast
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

import rosepo_jax
from rosepo_jax import config as defaults
from rosepo_jax import configuration
from rosepo_jax.errors import UserError

# ---- Loading ---------------------------------------------------------------------------------------------------------


def write(path, body):
    path.write_text("from ml_collections import ConfigDict\nfrom rosepo_jax import config\n" + body)
    return str(path)


def test_a_config_file_may_say_only_what_differs(tmp_path):
    spec = write(tmp_path / "c.py", "def get_config(arg=''):\n    return ConfigDict({'align': {'beta': 1}})\n")
    config = configuration.load(spec)
    assert config.align.beta == 1.0 and type(config.align.beta) is float
    config.align.beta = 0.1
    assert config == defaults.default()


def test_the_argument_reaches_get_config_and_overrides_win(tmp_path):
    body = "def get_config(arg=''):\n    c = config.default()\n    c.data.template = arg\n    return c\n"
    spec = write(tmp_path / "c.py", body)
    assert configuration.load(spec).data.template == ""
    assert configuration.load(f"{spec}:a:b").data.template == "a:b"
    assert configuration.load(f"{spec}:a", [("data.template", "x"), ("data.template", "y")]).data.template == "y"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def get_config(arg=''):\n    return {'align.beta': 1}\n", "returned dict"),
        (
            "def get_config(arg=''):\n    return ConfigDict({'aling': {'beta': 1}})\n",
            "aling.beta; did you mean align.beta",
        ),
        ("def get_config(arg=''):\n    return ConfigDict({'align': 1})\n", "config.align is a section"),
        ("def get_config(arg=''):\n    return ConfigDict({'seed': 1.5})\n", "config.seed=1.5 is not an integer"),
        ("def get_config(arg=''):\n    return ConfigDict({'seed': True})\n", "config.seed=True is not an integer"),
        ("def get_config(arg=''):\n    return 1 / 0\n", "line 4: ZeroDivisionError"),
        ("def get_config(arg='')\n", "line 3: SyntaxError"),
        ("import no_such_module\n", "line 3: ModuleNotFoundError"),
        ("", "has no get_config"),
    ],
)
def test_what_a_config_file_may_not_say(tmp_path, body, message):
    spec = write(tmp_path / "c.py", body)
    with pytest.raises(UserError) as refused:
        configuration.load(spec)
    assert message in str(refused.value) and str(tmp_path / "c.py") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_sweeps_of_a_file(tmp_path):
    body = "def get_config(arg=''):\n    return config.default()\n"
    assert configuration.get_sweep(write(tmp_path / "c.py", body)) is None
    body += "def get_sweep():\n    return [{'align.beta': b} for b in (0.1, 0.3)]\n"
    assert configuration.get_sweep(write(tmp_path / "d.py", body) + ":smoke") == [
        {"align.beta": 0.1},
        {"align.beta": 0.3},
    ]


FLAT = configuration.flatten(defaults.default())
TEXT = (
    st.text(st.characters(codec="utf-8", exclude_characters=",", exclude_categories=["Cc"]), min_size=1)
    .map(str.strip)
    .filter(bool)
)
VALUES = {
    bool: lambda key: st.booleans(),
    int: lambda key: st.integers(*configuration.limits(key, int)),
    float: lambda key: st.floats(*configuration.limits(key, float)),
    str: lambda key: TEXT,
    tuple: lambda key: st.lists(TEXT).map(tuple),
}


@given(st.data())
def test_every_key_reads_its_own_values_back_from_text(data):
    key = data.draw(st.sampled_from(sorted(FLAT)))
    value = data.draw(VALUES[type(FLAT[key])](key))
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    config = defaults.default()
    configuration.override(config, key, text)
    assert configuration.flatten(config) == {**FLAT, key: value}
    assert type(configuration.flatten(config)[key]) is type(FLAT[key])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sft.batch_size", "0"),
        ("data.candidates", "-1"),
        ("mesh.fsdp", "-2"),
        ("seed", str(2**63)),
        ("evaluate.bootstrap", str(2**31)),
        ("data.test_share", "1.5"),
        ("model.lora.dropout", "-0.1"),
        ("seed", 10**400),
        ("align.beta", 10**400),
        ("data.path", "a\0b"),
        ("data.path", "a\udcffb"),
        ("data.path", "a\nb"),
        ("evaluate.protocols", [["candidates"]]),
    ],
)
def test_values_that_nothing_works_with(key, value):
    with pytest.raises(UserError, match=rf"config.{key}=.* (must be|is not) "):
        configuration.override(defaults.default(), key, value)


@pytest.mark.parametrize("text", ["nan", "inf", "1e999", "", "0.1.2"])
def test_a_number_is_finite(text):
    with pytest.raises(UserError, match="is not a number"):
        configuration.override(defaults.default(), "align.beta", text)


def test_names_that_users_of_trl_know():
    config = defaults.default()
    configuration.override(config, "align.label_smoothing", "0.2")
    configuration.override(config, "align.loss_type", "ipo")
    assert (config.align.smoothing.mode, config.align.smoothing.value, config.align.objective) == ("fixed", 0.2, "ipo")


# ---- Every key is read -----------------------------------------------------------------------------------------------

PACKAGE = pathlib.Path(rosepo_jax.__file__).parent
# These files hand all keys around, or show them; they honour none.
BLIND = ("config.py", "configuration.py", "stages/runtime.py", "evaluation/report.py")
PASS_ON = ("copy_and_resolve_references", "unlocked", "copy")
WHOLE = ("items", "to_dict", "values", "keys")


class Reads:
    """Follows the config through the sources of the package: which keys does some expression read?

    A variable, a parameter or an attribute called `config` is the whole config. Sections are followed through
    assignments, calls of functions of the package (by name, also through functools.partial) and fields of classes,
    until nothing new is found. Modules are not told apart, so a key may be counted as read by mistake, but only by code
    that reads a key of its name from its section.
    """

    def __init__(self, sources, flat):
        self.keys, self.read = set(flat), set()
        self.sections = (
            {""} | {key.rpartition(".")[0] for key in flat} | {key.split(".")[0] for key in flat if "." in key}
        )
        self.functions, self.fields, self.names = {}, {}, {}
        trees = [ast.parse(source) for source in sources]
        for tree in trees:
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    self.functions.setdefault(node.name, []).append(node)
                elif isinstance(node, ast.ClassDef):
                    self.fields[node.name] = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
        found = None
        while found != (found := self.count()):
            for tree in trees:
                self.visit(tree, ())

    def count(self):
        return len(self.read), sum(map(len, self.names.values()))

    def visit(self, node, scope):
        """`scope`: the functions around `node`, innermost last."""
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            scope = (*scope, node)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self.assign(target, node.value, scope)
        elif isinstance(node, ast.For | ast.comprehension):
            self.whole(node.iter, scope)
            self.assign(node.target, node.iter.elts if isinstance(node.iter, ast.Tuple) else None, scope)
        elif isinstance(node, ast.keyword) and node.arg is None:
            self.whole(node.value, scope)
        elif isinstance(node, ast.Call):
            self.call(node, scope)
            self.paths(node, scope)
        elif isinstance(node, ast.Attribute | ast.Subscript):
            self.paths(node, scope)
        for child in ast.iter_child_nodes(node):
            self.visit(child, scope)

    def assign(self, target, value, scope):
        if isinstance(value, list):
            for item in value:
                self.assign(target, item, scope)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for left, right in zip(target.elts, value.elts):
                self.assign(left, right, scope)
        elif value is not None and isinstance(target, ast.Name):
            self.bind((scope[-1:], target.id), self.paths(value, scope))
        elif value is not None and isinstance(target, ast.Attribute):
            self.bind(target.attr, self.paths(value, scope))

    def bind(self, name, paths):
        if paths:
            self.names.setdefault(name, set()).update(paths)

    def call(self, node, scope):
        name, arguments = self.name(node.func), node.args
        if name == "partial" and arguments:
            name, arguments = self.name(arguments[0]), arguments[1:]
        if name == "dict" and arguments:
            self.whole(arguments[0], scope)
        for function in self.functions.get(name, []) + (
            self.functions.get("__init__", []) if name in self.fields else []
        ):
            parameters = [a.arg for a in function.args.posonlyargs + function.args.args if a.arg not in ("self", "cls")]
            known = {*parameters, *(a.arg for a in function.args.kwonlyargs)}
            for parameter, value in [*zip(parameters, arguments), *((k.arg, k.value) for k in node.keywords)]:
                if parameter in known:
                    self.bind(((function,), parameter), self.paths(value, scope))
        for field, value in [*zip(self.fields.get(name, ()), arguments), *((k.arg, k.value) for k in node.keywords)]:
            if field in self.fields.get(name, ()):
                self.bind(field, self.paths(value, scope))

    @staticmethod
    def name(node):
        return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)

    def paths(self, node, scope):
        """The sections that an expression may be; reading a key of one is noted."""
        if isinstance(node, ast.Name):
            around = [self.names.get((scope[i : i + 1], node.id), set()) for i in range(len(scope) + 1)]
            return set().union(*around, {""} if node.id == "config" else ())
        if isinstance(node, ast.IfExp):
            return self.paths(node.body, scope) | self.paths(node.orelse, scope)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = self.paths(node.func.value, scope)
            if node.func.attr in PASS_ON:
                return owner
            if node.func.attr in WHOLE:
                self.whole(node.func.value, scope)
            if node.func.attr == "get" and node.args and isinstance(node.args[0], ast.Constant):
                return self.step(owner, node.args[0].value)
        if isinstance(node, ast.Call) and self.name(node.func) == "getattr":
            return self.step(self.paths(node.args[0], scope), getattr(node.args[1], "value", None))
        if isinstance(node, ast.Subscript):
            return self.step(self.paths(node.value, scope), getattr(node.slice, "value", None))
        if isinstance(node, ast.Attribute):
            owner = self.paths(node.value, scope)
            inside = self.step(owner, node.attr)
            return inside or self.names.get(node.attr, set()) | ({""} if node.attr == "config" else set())
        return set()

    def step(self, owner, attribute):
        """From sections to what they call `attribute` (None: whatever it is)."""
        found = set()
        for section in owner:
            below = f"{section}." if section else ""
            if attribute is None and "." in section:
                self.read |= {key for key in self.keys if key.rpartition(".")[0] == section}
            elif attribute is None and not section:
                found |= {name for name in self.sections if name and "." not in name}
            elif f"{below}{attribute}" in self.keys:
                self.read.add(f"{below}{attribute}")
            elif f"{below}{attribute}" in self.sections:
                found.add(f"{below}{attribute}")
        return found

    def whole(self, node, scope):
        """All keys of a section are taken at once; that counts for the innermost sections only."""
        for section in self.paths(node, scope):
            if "." in section:
                self.read |= {key for key in self.keys if key.rpartition(".")[0] == section}


LORA = ("rank", "alpha", "targets", "dropout", "rslora")


def unread(sources, flat):
    return sorted(set(flat) - Reads(sources, flat).read)


def package_sources():
    return [p.read_text("utf-8") for p in PACKAGE.rglob("*.py") if str(p.relative_to(PACKAGE)) not in BLIND]


def test_every_key_is_read():
    assert unread(package_sources(), FLAT) == []


def test_a_key_that_nobody_reads_is_found():
    extra = {"align.tau_schedule": 1, "model.lora.bias": 0.0, "sft.aggregator": "lse", "extra": 0}
    assert set(extra) <= set(unread(package_sources(), FLAT | extra))


@pytest.mark.parametrize(
    ("source", "read"),
    [
        ("config.align.beta", {"align.beta"}),
        ("config.beta", set()),
        (
            "def f(config):\n    a = config.align\n    return a.beta, a.smoothing.cap",
            {"align.beta", "align.smoothing.cap"},
        ),
        ("def f(settings):\n    settings.length\nf(config.sft)", {"sft.length"}),
        ("def f(*, settings):\n    settings.length\ng = partial(f, settings=config.align)", {"align.length"}),
        (
            "class A:\n    config: dict\n    def f(self):\n        e = self.config.evaluate\n        e.top",
            {"evaluate.top"},
        ),
        ("class A:\n    s: dict\n    def f(self):\n        self.s.top\nA(config.evaluate)", {"evaluate.top"}),
        ("rows, e = 1, config.evaluate\ne.top", {"evaluate.top"}),
        ("def f():\n    e = config.evaluate\ndef g(e):\n    e.top", set()),
        ("f(**config.model.lora)", {f"model.lora.{k}" for k in LORA}),
        ("config.to_dict(); config.align.to_dict(); f(**config.align)", set()),
        ("config.sft.get('patience', 0)", {"sft.patience"}),
        (
            "def f(c):\n    def g(r):\n        c[r]\nf(config.mesh); f(config.model.lora)",
            {f"model.lora.{k}" for k in LORA},
        ),
    ],
)
def test_what_counts_as_reading(source, read):
    assert Reads([source], FLAT).read == read


def test_the_config_is_what_the_documentation_says():
    assert isinstance(defaults.default(), ConfigDict)
    assert {type(value) for value in FLAT.values()} == {bool, int, float, str, tuple}
    assert set(defaults.default()) == {
        *("data", "model", "oracle", "sft", "pairs", "align", "evaluate", "mesh", "checkpoint", "log", "seed"),
    }
