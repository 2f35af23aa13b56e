"""Shipped templates: what each prints, whatever the number of titles; and what is no template."""

import pathlib
import re
import string

import pytest

from rosepo_jax import configuration
from rosepo_jax.data import prompts
from rosepo_jax.data.prompts import Encoder, Template
from rosepo_jax.errors import UserError

FOLDER = pathlib.Path(prompts.__file__).parent / "templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.txt"))
DOMAINS = ["books", "games", "items", "movies", "music"]
PUBLISHED = {
    "llara": ["games", "movies", "music"],
    "sdpo": ["books", "movies", "music"],
    "patchrec": ["books", "movies"],
}
CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))

# Titles hold no digit, so that every number of a prompt is the template's.
HISTORY = [f"Seen-{letter}" for letter in string.ascii_lowercase[:10]]
CANDIDATES = [f"Offered-{letter}" for letter in string.ascii_lowercase[:20]]
TITLE = re.compile("(?:Seen|Offered)-[a-z]")


def listed(template, titles):
    return (", " if "history_line" in template.slots else "\n").join(titles)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    prompts.train_tokenizer(HISTORY * 3, 320, path)
    return path


def test_every_domain_and_paper_has_its_templates():
    own = [name for domain in DOMAINS for name in (domain, f"{domain}_candidates")]
    after_papers = [f"{paper}_{domain}" for paper, domains in PUBLISHED.items() for domain in domains]
    assert sorted(["titles", *own, *after_papers]) == NAMES
    for name in NAMES:
        lists = name.endswith("_candidates") or name.startswith(("llara", "sdpo"))
        assert Template.load(name).uses_candidates == lists


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_lists_every_title_once_in_order_and_prints_real_counts(name):
    template = Template.load(name)
    assert not re.search(r"\d", template.text) and template.text.endswith("\n")
    for seen in (1, 3, 10):
        for offered in (5, 20) if template.uses_candidates else (0,):
            history, candidates = HISTORY[:seen], CANDIDATES[:offered]
            text = template.render(history, candidates)
            assert TITLE.findall(text) == history + candidates
            assert listed(template, history) in text and listed(template, candidates) in text
            counts = {"history_count": seen, "candidate_count": offered}
            assert re.findall(r"\d+", text) == [str(counts[slot]) for slot in counts if slot in template.slots]


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_candidates_form_adds_the_list_alone(domain):
    plain, full = (Template.load(name).text.splitlines() for name in (domain, f"{domain}_candidates"))
    assert full[:2] + full[4:] == plain and plain[1] == "{history}"
    assert "{candidate_count}" in full[2] and full[3] == "{candidates}"


def test_published_forms_word_for_word():
    def render(name):
        return Template.load(name).render(["Argo", "Brazil"], ["Heat", "Jaws", "Ran"])

    assert render("llara_movies") == (
        "This user has already seen Argo, Brazil. Guess which movie this user sees next. "
        "Pick it from these 3 movie titles: Heat, Jaws, Ran. Answer:\n"
    )
    assert render("sdpo_books") == (
        "A person read Argo, Brazil, in this order. Guess the book this person reads next. "
        "One of these 3 book titles is right: Heat, Jaws, Ran. Answer:\n"
    )
    assert render("patchrec_movies") == (
        "You know movies well and suggest them to others.\nSomebody has seen Argo, Brazil. "
        "Suggest the movie to see next: its title alone, with no explanation.\n"
    )


@pytest.mark.parametrize("name", NAMES)
def test_braces_in_titles_are_text(name):
    template = Template.load(name)
    odd = ["{history}", "{}", "}{", "{candidate_count.__class__}", "{{x}}", "{0!r:>9}"]
    text = template.render(odd, odd if template.uses_candidates else ())
    assert text.count(listed(template, odd)) == 1 + template.uses_candidates


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_is_too_long_drops_the_oldest_history_only(name, folder):
    template = Template.load(name)
    candidates = CANDIDATES if template.uses_candidates else []
    whole = Encoder(folder, template, 4096, 32)
    kept = template.render(HISTORY[6:], candidates)
    fits, more = map(len, whole.prompt_ids([kept, template.render(HISTORY[5:], candidates)]))
    assert fits < more
    for P in (fits, more - 1):
        assert Encoder(folder, template, P, 32).prompt_texts([HISTORY], [candidates]) == [kept]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{history} }", "Single '}' encountered"),
        ("{history", "expected '}'"),
        ("a { b {history}", "unexpected '{'"),
        ("{history} {}", r"may use .*found \['', 'history'\]"),
        ("{history} {0}", r"found \['0', 'history'\]"),
        ("{history.__class__}", r"needs the slot \{history\} or \{history_line\}.*found \['history.__class__'\]"),
        ("{history[0]}", r"found \['history\[0\]'\]"),
        ("{history!r}", r"found \['history!r'\]"),
        ("{history_count:d} {history}", r"found \['history', 'history_count:d'\]"),
        ("{history:{x}}", r"found \['history:\{x\}'\]"),
        ("{histo\nry}", r"found \['histo\\nry'\]"),
        ("{{history}}", r"needs the slot .*found \[\]"),
        ("{candidates}", "needs the slot"),
        ("{history} {history_line}", "lists the same titles in two ways"),
        ("{history} {candidates} {candidates_line}", "lists the same titles in two ways"),
        ("{history} {candidate_count}", "counts candidates but lists none"),
        ("{history} {candidate_count} {{candidates}}", "counts candidates but lists none"),
        (b"{history} \xff", "can't decode byte"),
    ],
)
def test_what_is_no_template_is_refused_in_one_line(text, message, tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        Template.load(str(path))
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_either_spelling_of_a_list_will_do(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("{history_line}|{{candidates}}", "utf-8")
    template = Template.load(str(path))
    assert not template.uses_candidates and template.render(["a", "b"]) == "a, b|{candidates}"
    path.write_text("{history}|{candidates_line}|{candidate_count}", "utf-8")
    template = Template.load(str(path))
    assert template.uses_candidates and template.render(["a", "b"], ["c", "d"]) == "a\nb|c, d|2"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_name_templates_that_exist(path):
    for variant in ("", ":smoke"):
        assert configuration.load(f"{path}{variant}").data.template in NAMES
