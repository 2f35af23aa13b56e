"""BOS, EOS, masks and boundaries for tokenizers with the shape of Llama 2, Llama 3, Qwen, Gemma and our own."""

import datetime
import functools

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_of_families import FAMILIES

from rosepo_jax.data import examples
from rosepo_jax.data.catalogue import normalise
from rosepo_jax.data.prompts import Encoder, Template
from rosepo_jax.decoding.trie import compile_trie

CASES = [(family, chat) for family in FAMILIES for chat in (False, True) if not (chat and family == "ours")]
CHATS = [family for family, chat in CASES if chat]
VARIABLES = {"date_string": "26 Jul 2024", "enable_thinking": False}
NAMES = ["<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<think>"]
TITLES = ["Argo", "Heat", "Argo Heat", "Heat Argo", "Amélie", "千と千尋", *(f"Up {name}x" for name in NAMES), *NAMES]


def letters(text):
    """Pieces of a text that a SentencePiece-type tokenizer knows as bytes only."""
    return [f"<0x{byte:02X}>" for byte in text.encode()]


DATE = list("26ĠJulĠ2024")
SYSTEM = ["<|start_header_id|>", "system", "<|end_header_id|>", "Ċ", "Ċ", *DATE, "<|eot_id|>"]
# (family, chat): the pieces before "Heat\n7\n", of it, after it; those of "Argo Heat", and what ends a response.
PIECES = {
    ("llama2", False): (["<s>"], ["▁Heat", "\n", "<0x37>", "\n"], [], ["▁Argo", "▁Heat"], "</s>"),
    ("llama2", True): (
        ["<s>", *letters("[INST]")],
        ["▁Heat", "\n", "<0x37>"],
        ["▁", *letters("[/INST]")],
        ["▁Argo", "▁Heat"],
        "</s>",
    ),
    ("llama3", False): (["<|begin_of_text|>"], ["Heat", "Ċ", "7", "Ċ"], [], ["Argo", "ĠHeat"], "<|eot_id|>"),
    ("llama3", True): (
        ["<|begin_of_text|>", *SYSTEM, "<|start_header_id|>", "user", "<|end_header_id|>", "Ċ", "Ċ"],
        ["Heat", "Ċ", "7"],
        ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "Ċ", "Ċ"],
        ["Argo", "ĠHeat"],
        "<|eot_id|>",
    ),
    ("qwen", False): ([], ["Heat", "Ċ", "7", "Ċ"], [], ["Argo", "ĠHeat"], "<|im_end|>"),
    ("qwen", True): (
        ["<|im_start|>", "user", "Ċ"],
        ["Heat", "Ċ", "7"],
        ["<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ", "<think>", "Ċ", "Ċ", "</think>", "Ċ", "Ċ"],
        ["Argo", "ĠHeat"],
        "<|im_end|>",
    ),
    ("gemma", False): (["<bos>"], ["Heat", "\n", "<0x37>", "\n"], [], ["Argo", "▁Heat"], "<eos>"),
    ("gemma", True): (
        ["<bos>", "<start_of_turn>", "user", "\n"],
        ["Heat", "\n", "<0x37>"],
        ["<end_of_turn>", "\n", "<start_of_turn>", "model", "\n"],
        ["Argo", "▁Heat"],
        "<end_of_turn>",
    ),
    ("ours", False): (["<s>"], ["Heat", "Ċ", "7", "Ċ"], [], ["ArgoĠHeat"], "</s>"),
}
BOS = {"llama2": "<s>", "llama3": "<|begin_of_text|>", "qwen": None, "gemma": "<bos>", "ours": "<s>"}
PAD = {"llama2": "</s>", "llama3": "<|eot_id|>", "qwen": "<|endoftext|>", "gemma": "<pad>", "ours": "<pad>"}
# What stands before "Argo Heat" changes its pieces.
CONTEXT = {"llama2": "\n", "llama3": " ", "qwen": " ", "gemma": " ", "ours": "Heat "}


@functools.cache
def encoder_at(folder, chat, T=256):
    return Encoder(folder, Template.load("titles"), 512, T, chat)


@functools.cache
def reference_at(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    paths = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, path in paths.items():
        FAMILIES[family](path)
    return paths


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{'chat' if case[1] else 'plain'}")
def case(request):
    return request.param


@pytest.fixture
def encoder(folders, case):
    family, chat = case
    return encoder_at(folders[family], chat)


def id_of(folder, piece):
    id = reference_at(folder).backend_tokenizer.token_to_id(piece)
    assert id is not None, piece
    return id


def control_ids(folder):
    """All added tokens but the newline that Gemma adds as vocabulary."""
    return {id for id, token in reference_at(folder).added_tokens_decoder.items() if not token.content.isspace()}


def real_ids(tokens_Bx1xT, mask_Bx1xT):
    return [ids[mask].tolist() for ids, mask in zip(tokens_Bx1xT[:, 0], mask_Bx1xT[:, 0])]


def saved_with(folder, chat_template, tmp_path):
    """The tokenizer in `folder` with another chat template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_prompts_and_responses_are_exactly_these_pieces(folders, case, encoder):
    before, text, after, title, end = PIECES[case]
    ids = [[id_of(folders[case[0]], piece) for piece in pieces] for pieces in ([*before, *text, *after], [*title, end])]
    assert [encoder.prompt_ids(["Heat\n7\n"])[0], encoder.response_ids(["Argo Heat"])[0]] == ids
    assert encoder.eos == ids[1][-1]


def test_bos_stands_once_at_the_start_and_eos_once_at_the_end(folders, case, encoder):
    folder, bos = folders[case[0]], BOS[case[0]]
    for prompt, response in zip(encoder.prompt_ids(TITLES), encoder.response_ids(TITLES)):
        assert response.index(encoder.eos) == len(response) - 1
        if bos is not None:
            assert prompt[0] == id_of(folder, bos) and id_of(folder, bos) not in [*prompt[1:], *response]


def test_the_mask_holds_every_eos_and_no_padding(folders, case, encoder):
    assert encoder.pad == id_of(folders[case[0]], PAD[case[0]])
    tokens_BxRxT, mask_BxRxT = examples.responses(encoder, [[title] for title in TITLES])
    assert real_ids(tokens_BxRxT, mask_BxRxT) == encoder.response_ids(TITLES)
    assert (tokens_BxRxT[~mask_BxRxT] == encoder.pad).all() and not mask_BxRxT.all()


@pytest.mark.parametrize("family", CHATS)
def test_chat_prompts_are_those_of_transformers(folders, family):
    for text in ["Argo", "\n Heat\nArgo Heat\n\n7 \n", "(Amélie), 千と千尋!\n"]:
        turns = [{"role": "user", "content": text.strip()}]
        expected = reference_at(folders[family]).apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False, **VARIABLES
        )
        assert encoder_at(folders[family], True).prompt_ids([text]) == [expected]


@pytest.mark.parametrize(
    "chat_template",
    [
        "user {{ messages[0].content }}</s>model ",  # no control token before the text: it takes no blank of its own
        "<s>{{ messages[0].content }}</s>",  # right after one, where SentencePiece puts no blank
        "<s>user {{ messages[0].content }}",  # no control token behind it
        "\n{{ messages[0].content }}",
        "<s>{{ date_string }}: {{ messages[0].content }}{{ '</s>' if enable_thinking is false }}",
    ],
)
def test_text_in_a_chat_joins_what_the_template_writes_around_it(folders, tmp_path, chat_template):
    folder = saved_with(folders["llama2"], chat_template, tmp_path)
    turns = [{"role": "user", "content": "Argo"}]
    expected = reference_at(folder).apply_chat_template(turns, return_dict=False, **VARIABLES)
    encoder = encoder_at(folder, True)
    assert encoder.prompt_ids(["Argo"]) == [expected]
    assert encoder.eos == id_of(folder, "</s>")
    hostile, count = encoder.prompt_ids(["Argo <s></s>"])[0], chat_template.count("</s>")
    assert [hostile.count(id_of(folder, name)) for name in ("<s>", "</s>")] == [chat_template.count("<s>"), count]


@pytest.mark.parametrize("asks", ["through date_string", "by itself"])
def test_prompts_do_not_change_from_day_to_day(folders, tmp_path, monkeypatch, asks):
    folder = folders["llama3"]
    if asks == "by itself":
        today = "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ today() }}"
        folder = saved_with(folder, today + "{{ messages[0].content }}<|eot_id|>", tmp_path)
    seen = []
    for day in (1, 2):
        fixed = type("Fixed", (), {"now": staticmethod(lambda day=day: datetime.datetime(2025, 3, day))})
        monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", fixed)
        dated = reference_at(folder).apply_chat_template([{"role": "user", "content": "Argo"}], tokenize=False)
        encoder = Encoder(folder, Template.load("titles"), 512, 256, chat=True)
        seen.append((dated, encoder.prompt_ids(["Argo"]), encoder.identity))
    assert seen[0][0] != seen[1][0] and seen[0][1:] == seen[1][1:]
    assert "26 Jul 2024" in encoder.decode(encoder.prompt_ids(["Argo"])[0])


def test_the_identity_covers_what_the_chat_template_renders(folders, tmp_path):
    parts = ["<|im_start|>", "user ", " now", "<|endoftext|>", "<|im_end|>"]
    changed = ["<think>", "you ", " soon", "<|im_start|>", "<|endoftext|>"]
    variants = [parts, *([*parts[:i], changed[i], *parts[i + 1 :]] for i in range(len(parts)))]
    identities = {encoder_at(folders["qwen"], False).identity}
    for number, (before, lead, tail, after, end) in enumerate(variants):
        answer = f"{{% if messages[1] %}}{{{{ messages[1].content }}}}{end}{{% endif %}}"
        chat_template = f"{before}{lead}{{{{ messages[0].content }}}}{tail}{after}{answer}"
        folder = saved_with(folders["qwen"], chat_template, tmp_path / str(number))
        identities.add(encoder_at(folder, True).identity)
    assert len(identities) == 7


def test_names_of_control_tokens_stay_text(folders, case, encoder):
    control = control_ids(folders[case[0]])
    own = [reference_at(folders[case[0]]).added_tokens_decoder[id].content for id in control]
    texts = [text for name in own for text in (name, f"Up {name}", f"{name}{name} up\n")]
    for text, ids in zip(texts, encoder.ids(texts)):
        assert control.isdisjoint(ids)
        assert encoder.decode(ids) == text
    around = [*encoder.before, *encoder.after]
    for prompt in encoder.prompt_ids(texts):
        assert [id for id in prompt if id in control] == [id for id in around if id in control]


def test_a_title_has_the_same_ids_in_every_stage(folders, case, encoder):
    """As SFT target, pair response, scored text, candidate, path of the trie and generated text."""
    in_context, alone = (
        reference_at(folders[case[0]])(context + "Argo Heat")["input_ids"] for context in (CONTEXT[case[0]], "")
    )
    if BOS[case[0]]:
        alone = alone[1:]
    assert in_context[-len(alone) :] != alone
    assert encoder.ids(["Argo Heat"]) == [alone]

    table = examples.TitleTable(encoder, TITLES)
    assert table.ids == encoder.response_ids(TITLES) == [encoder.response_ids([title])[0] for title in TITLES]
    taken = table.take(np.arange(len(TITLES))[:, None])
    assert table.ids == real_ids(*taken) == real_ids(*examples.responses(encoder, [[title] for title in TITLES]))

    trie, paths, stack = compile_trie(table.ids, encoder.eos), {}, [(0, ())]
    while stack:
        node, path = stack.pop()
        if trie.item_M[node] >= 0:
            paths[int(trie.item_M[node])] = [*path, encoder.eos]
        children = range(trie.child_start_M1[node], trie.child_start_M1[node + 1])
        stack += [(child, (*path, int(trie.token_M[child]))) for child in children]
    assert paths == dict(enumerate(table.ids))

    texts = [encoder.decode(np.array(paths[item][:-1])) for item in range(len(TITLES))]
    assert texts == TITLES
    assert len(set(map(normalise, texts))) == len(TITLES)


@pytest.mark.parametrize(("family", "chat"), CASES)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1, max_size=4))
def test_any_text_is_masked_to_its_end_and_free_of_control_tokens(folders, family, chat, texts):
    encoder, control = encoder_at(folders[family], chat), control_ids(folders[family])
    rows = real_ids(*examples.responses(encoder, [[text] for text in texts]))
    for row, ids in zip(rows, encoder.ids(texts), strict=True):
        assert len(row) == len(ids) + 1 and row == [*ids, encoder.eos]
        assert ids and control.isdisjoint(ids)
