"""Templates, tokenizers and the encoder: exact ids, control tokens, truncation."""

import functools
import json

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from rosepo_jax.data import examples, prompts
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.prompts import Encoder, Template
from rosepo_jax.decoding.trie import compile_trie
from rosepo_jax.errors import UserError

TITLES = ["Skyfall (2012)", "Argo (2012)", "Lincoln (2012)", "Amélie", "<s> of </s>", "<pad>", "<|user|>", "千と千尋"]
CHAT = "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tokenizer as `sft` trains it."""
    path = tmp_path_factory.mktemp("tokenizer")
    prompts.train_tokenizer(TITLES * 3, 320, path)
    return path


@functools.cache
def encoder_at(folder, template="titles", P=64, T=32, chat=False):
    return Encoder(folder, Template.load(template), P, T, chat)


@pytest.fixture
def encoder(folder):
    return encoder_at(folder)


def saved(tmp_path, *, bos=True, pad="<pad>", chat=None, special=()):
    """A tokenizer of another kind: with or without BOS, pad or chat template."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>", *special],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TITLES, trainer)
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token=pad
    )
    if chat:
        fast.chat_template = chat
    fast.save_pretrained(tmp_path)
    return tmp_path


def special(folder):
    found = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    return {token["content"]: token["id"] for token in found if token["special"]}


def test_a_prompt_begins_with_one_bos_and_a_response_ends_with_one_eos(folder, encoder):
    bos, eos = special(folder)["<s>"], special(folder)["</s>"]
    for text in TITLES:
        [prompt] = encoder.prompt_ids([text])
        [response] = encoder.response_ids([text])
        assert prompt == [bos, *encoder.ids([text])[0]]
        assert response == [*encoder.ids([text])[0], eos]
        assert prompt.count(bos) == 1 and eos not in prompt
        assert response.count(eos) == 1 and bos not in response


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
def test_text_never_becomes_a_control_token_and_comes_back(folder, text):
    encoder = encoder_at(folder)
    [ids] = encoder.ids([text])
    assert not set(ids) & set(special(folder).values())
    assert encoder.decode(ids) == text


def test_names_of_control_tokens_stay_text(tmp_path):
    folder = saved(tmp_path, special=["<|user|>"])
    encoder = Encoder(folder, Template.load("titles"), 64, 64)
    for name in special(folder):
        text = f"The {name} story"
        [ids] = encoder.ids([text])
        assert not set(ids) & set(special(folder).values())
        assert encoder.decode(ids) == text


def test_a_control_token_that_was_merged_from_text_is_spelled_out(tmp_path):
    """BPE gives a merge whose letters make "</s>" the id of the control token itself."""
    titles = ["</s>", "The </s>", "<pad>", "Argo"]
    prompts.train_tokenizer(titles * 9, 300, tmp_path)
    merged = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).model.tokenize("</s>")
    assert [token.id for token in merged] == [special(tmp_path)["</s>"]]
    encoder = Encoder(tmp_path, Template.load("titles"), 64, 32)
    for title, ids in zip(titles, encoder.ids(titles)):
        assert not set(ids) & set(special(tmp_path).values())
        assert encoder.decode(ids) == title
    assert not set(encoder.prompt_ids(["</s>"])[0][1:]) & set(special(tmp_path).values())


def test_unknown_letters_keep_the_token_of_the_unknown(tmp_path):
    pieces = {piece: id for id, piece in enumerate(["<unk>", "</s>", *"<unk>", "a"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [], unk_token="<unk>"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    encoder = Encoder(tmp_path, Template.load("titles"), 64, 32)
    assert encoder.response_ids(["aéa"]) == [[pieces["a"], pieces["<unk>"], pieces["a"], pieces["</s>"]]]


def test_settings_that_were_saved_with_a_tokenizer_do_not_matter(tmp_path):
    folder, texts = (
        saved(tmp_path, chat=CHAT, special=["<|user|>", "<|end|>", "<|assistant|>"]),
        ["a <|end|> b", "Argo"],
    )
    plain = Encoder(folder, Template.load("titles"), 64, 32, chat=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    tokenizer.backend_tokenizer.enable_truncation(1)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.save_pretrained(folder)
    encoder = Encoder(folder, Template.load("titles"), 64, 32, chat=True)
    assert encoder.prompt_ids(texts) == plain.prompt_ids(texts)
    assert encoder.response_ids(texts) == plain.response_ids(texts)


def test_added_tokens_are_vocabulary_unless_the_chat_template_writes_them(tmp_path):
    folder = saved(tmp_path, chat="{{ messages[0].content }}<think>")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<a_1>", "<b_2>", tokenizers.AddedToken("<think>", lstrip=True, rstrip=True)])
    tokenizer.save_pretrained(folder)
    encoder = Encoder(folder, Template.load("titles"), 64, 32)
    texts = ["<a_1><b_2>", "I <think> so"]
    [item, thought] = encoder.ids(texts)
    assert item == tokenizer.convert_tokens_to_ids(["<a_1>", "<b_2>"])
    assert tokenizer.convert_tokens_to_ids("<think>") not in thought
    assert [encoder.decode(item), encoder.decode(thought)] == texts


def test_without_bos_none_is_added(tmp_path):
    encoder = Encoder(saved(tmp_path, bos=False), Template.load("titles"), 64, 32)
    assert encoder.before == []
    assert encoder.prompt_ids(["Argo"]) == encoder.ids(["Argo"])


def test_pad_may_be_eos(tmp_path):
    """The mask, not `ids != pad`, says what is real: the EOS of a response stays in."""
    encoder = Encoder(saved(tmp_path, pad=None), Template.load("titles"), 64, 32)
    assert encoder.pad == encoder.eos
    texts = ["Argo (2012)", "Amélie and Lincoln (2012)"]
    tokens_BxRxT, mask_BxRxT = examples.responses(encoder, [[text] for text in texts])
    for ids, mask, text in zip(tokens_BxRxT[:, 0], mask_BxRxT[:, 0], ["Argo (2012)", None]):
        real = ids[mask]
        assert real[-1] == encoder.eos and (real[:-1] != encoder.eos).all()
        assert text is None or encoder.decode(real) == text


def test_frequent_titles_are_one_token_and_lines_stay_apart(folder, encoder):
    assert [len(ids) for ids in encoder.ids(["Skyfall (2012)", "Argo (2012)"])] == [1, 1]
    [ids] = encoder.ids(["Skyfall (2012)\nArgo (2012)"])
    assert len(ids) == 3


def test_truncation_drops_the_oldest_history_only(folder):
    history = [f"film {n}" for n in range(20)]
    candidates = ["Skyfall (2012)", "Argo (2012)"]
    template = "movies_candidates"
    whole = encoder_at(folder, template, P=4096)
    [longest] = whole.prompt_ids([whole.template.render(history, candidates)])
    for P in (len(longest), len(longest) - 1, len(longest) // 2 + 60):
        encoder = encoder_at(folder, template, P=P)
        [text] = encoder.prompt_texts([history], [candidates])
        kept = next(n for n in range(21) if text == encoder.template.render(history[20 - n :], candidates))
        assert len(encoder.prompt_ids([text])[0]) <= P
        if kept < 20:
            more = encoder.template.render(history[19 - kept :], candidates)
            assert len(encoder.prompt_ids([more])[0]) > P
    assert whole.prompt_texts([history], [candidates]) == [whole.template.render(history, candidates)]


def test_what_cannot_fit_is_an_error(folder):
    with pytest.raises(UserError, match=r"model.prompt_length=4.*one history item has \d+ tokens"):
        encoder_at(folder, P=4).prompt_texts([["a long title", "no frequent title at all"]], None)
    with pytest.raises(UserError, match=r"model.response_length=3: 'unheard of' has \d+ tokens"):
        encoder_at(folder, T=3).response_ids(["unheard of"])
    with pytest.raises(UserError, match="response is empty"):
        encoder_at(folder).response_ids([""])


def test_slots(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("{history_count} then {candidate_count}:\n{history}\n{candidates}\nNext: {{x}}\n", "utf-8")
    template = Template.load(str(path))
    assert template.uses_candidates
    assert template.render(["a {b}", "c"], ["d"]) == "2 then 1:\na {b}\nc\nd\nNext: {x}\n"
    path.write_text("{histroy}", "utf-8")
    with pytest.raises(UserError, match=r"needs the slot \{history\}.*histroy"):
        Template.load(str(path))
    with pytest.raises(UserError, match=r"no template 'moviez'.*movies, "):
        Template.load("moviez")


@pytest.mark.parametrize("name", ["titles", "movies", "movies_candidates", "music"])
def test_shipped_templates(name):
    template = Template.load(name)
    text = template.render(["Argo", "Skyfall"], ["Lincoln"])
    assert "Argo\nSkyfall\n" in text and text.endswith("\n")
    assert template.uses_candidates == ("Lincoln" in text)


def test_chat_template(tmp_path):
    folder = saved(tmp_path, chat=CHAT, special=["<|user|>", "<|end|>", "<|assistant|>"])
    control = special(folder)
    encoder = Encoder(folder, Template.load("titles"), 64, 32, chat=True)
    [ids] = encoder.prompt_ids(["a <|end|> b"])
    before, after = [control["<s>"], control["<|user|>"]], [control["<|end|>"], control["<|assistant|>"]]
    assert ids == [*before, *encoder.ids(["a <|end|> b"])[0], *after]
    assert sum(i in control.values() for i in ids) == 4  # none of them comes from the text
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "Argo"}]
    rendered = reference.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert encoder.prompt_ids(["Argo"]) == [rendered]
    assert encoder.response_ids(["Argo"])[0][-1] == encoder.eos == control["<|end|>"]
    with pytest.raises(UserError, match="no chat template"):
        Encoder(saved(tmp_path / "plain"), Template.load("titles"), 64, 32, chat=True)
    for count in (0, 2):
        folder = saved(tmp_path / str(count), chat="{{ bos_token }}" + "{{ messages[0].content }}" * count)
        with pytest.raises(UserError, match=f"must write the user's text once, not {count} times"):
            Encoder(folder, Template.load("titles"), 64, 32, chat=True)


def test_not_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json.*save_pretrained"):
        Encoder(tmp_path, Template.load("titles"), 64, 32)
    (tmp_path / "x").mkdir()
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "x" / "tokenizer.json"))
    with pytest.raises(UserError, match="end-of-sequence"):
        Encoder(tmp_path / "x", Template.load("titles"), 64, 32)


def test_one_encoder_gives_the_same_ids_everywhere(encoder):
    """Titles as SFT targets, as pair responses, as scored texts and as edges of the trie."""
    catalogue = Catalogue(tuple(map(str, range(8))), tuple(TITLES), ((),) * 8, np.zeros(8, np.int64))
    table = examples.TitleTable(encoder, TITLES)
    items = np.array([[0, 4], [3, 7]])
    taken = table.take(items)
    written = examples.responses(encoder, [[TITLES[i] for i in row] for row in items])
    trie = compile_trie(table.ids, encoder.eos)
    for (b, r), item in np.ndenumerate(items):
        real = [tokens_BxRxT[b, r][mask_BxRxT[b, r]].tolist() for tokens_BxRxT, mask_BxRxT in (taken, written)]
        assert real[0] == real[1] == encoder.response_ids([TITLES[item]])[0]
        node = 0
        for token in real[0][:-1]:
            children = range(trie.child_start_M1[node], trie.child_start_M1[node + 1])
            [node] = [child for child in children if trie.token_M[child] == token]
        assert trie.item_M[node] == item
    texts = examples.prompt_texts(encoder, catalogue, np.array([[1, 2, -1]]), np.zeros((1, 0), int))
    assert texts == ["Argo (2012)\nLincoln (2012)\n"]
    batch = examples.prompts(encoder, texts)
    assert batch["prompt_BxP"][batch["prompt_mask_BxP"]].tolist() == encoder.prompt_ids(texts)[0]


def test_a_tokenizer_of_a_gigabyte_is_not_read(tmp_path):
    folder = saved(tmp_path)
    with open(folder / "tokenizer.json", "r+b") as file:
        file.truncate(1 << 30)  # takes no space
    with pytest.raises(UserError, match=r"tokenizer.json: larger than"):
        Encoder(folder, Template.load("titles"), 64, 32)
