"""Small tokenizers with the shape of real model families: pre-tokenizer, special tokens, BOS rule, chat template."""

import json
import pathlib

import tokenizers
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rosepo_jax.data import prompts

WORDS = ["Argo", "Heat", "Amélie", "user", "system", "model", "assistant"]
# Each word twice alone and twice after a space, so that it becomes a piece; no two words stand side by side twice.
CORPUS = [*WORDS * 2, *(f"{a} {b}" for shift in (1, 2) for a, b in zip(WORDS, WORDS[shift:] + WORDS[:shift]))]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

LLAMA2_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_CHAT = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') if strftime_now is defined %}"
    "{% endif %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' + date_string + '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def llama2(folder: pathlib.Path) -> None:
    """SentencePiece-type: a blank put before a text, bytes for unknown letters, BOS, no pad token."""
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = _sentencepiece(["<unk>", "<s>", "</s>"], metaspace)
    tokenizer.decoder = decoders.Sequence([*_SENTENCEPIECE, decoders.Strip(" ", 1, 0)])
    _put_first(tokenizer, "<s>")
    _save(folder, tokenizer, LLAMA2_CHAT, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def llama3(folder: pathlib.Path) -> None:
    """Byte-level with the pre-split of GPT-4, BOS by the post-processor and by the chat template, a date, no pad."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = _byte_level(special, r"\p{N}{1,3}")
    _put_first(tokenizer, "<|begin_of_text|>")
    _save(folder, tokenizer, LLAMA3_CHAT, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def qwen(folder: pathlib.Path) -> None:
    """Byte-level without BOS, pad apart from EOS, thinking marks that are added but not special tokens."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], r"\p{N}")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    _save(folder, tokenizer, QWEN_CHAT, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def gemma(folder: pathlib.Path) -> None:
    """SentencePiece-type without a leading blank; the newline is an added token; EOS is not the end of a turn."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = _sentencepiece(
        special, pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")
    )
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    tokenizer.decoder = decoders.Sequence(_SENTENCEPIECE)
    _put_first(tokenizer, "<bos>")
    names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    _save(folder, tokenizer, GEMMA_CHAT, **names)


def ours(folder: pathlib.Path) -> None:
    """The tokenizer that `sft` trains."""
    prompts.train_tokenizer(CORPUS * 2, 400, folder)


FAMILIES = {build.__name__: build for build in (llama2, llama3, qwen, gemma, ours)}
_SENTENCEPIECE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def _sentencepiece(special, pre_tokenizer, normalizer=None) -> tokenizers.Tokenizer:
    """BPE with control tokens and bytes first, as in SentencePiece; only the control tokens are added tokens."""
    learned = _learn(pre_tokenizer, normalizer)
    pieces = dict.fromkeys([*special, *BYTES, "\n", *learned["vocab"]])
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: id for id, piece in enumerate(pieces)},
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def _byte_level(special, digits) -> tokenizers.Tokenizer:
    """BPE of bytes; the control tokens come after the vocabulary and are no part of it."""
    split = rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learned = _learn(pre_tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def _learn(pre_tokenizer, normalizer=None, **options) -> dict:
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer
    if normalizer:
        trained.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=2, show_progress=False, **options)
    trained.train_from_iterator(CORPUS, trainer)
    return json.loads(trained.to_str())["model"]


def _put_first(tokenizer, bos) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def _save(folder, tokenizer, chat_template, **names) -> None:
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
