"""One encoder for every stage: text in, token ids and masks out.

Prompt and response are tokenised apart and joined as ids: one BOS if the tokenizer itself puts one, exactly one EOS at
the end of each response. Text that comes from data never becomes a control token. Masks say which ids are real; nothing
is ever inferred from `ids != pad`. A prompt that is too long drops its oldest history items, nothing else.
"""

import dataclasses
import pathlib
import string
from collections.abc import Iterable, Sequence

import numpy as np

from rosepo_jax import files
from rosepo_jax.errors import UserError

SLOTS = {"history", "history_count", "candidates", "candidate_count"}


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt with named slots; titles stand one a line. The trailing newline is part of the prompt."""

    text: str

    @classmethod
    def load(cls, name: str) -> "Template":
        """`name` of a file in data/templates, or a path."""
        shipped = pathlib.Path(__file__).parent / "templates" / f"{name}.txt"
        path = shipped if shipped.is_file() else pathlib.Path(name)
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in shipped.parent.glob("*.txt")))
            raise UserError(f"data.template: no template {name!r}: give a path or one of {known}")
        text = path.read_text("utf-8")
        slots = {slot for _, slot, _, _ in string.Formatter().parse(text) if slot is not None}
        if "history" not in slots or slots - SLOTS:
            raise UserError(f"{path}: needs the slot {{history}} and may use {sorted(SLOTS)}, found {sorted(slots)}")
        return cls(text)

    @property
    def uses_candidates(self) -> bool:
        return "{candidates}" in self.text

    def render(self, history: Sequence[str], candidates: Sequence[str] = ()) -> str:
        return self.text.format(
            history="\n".join(history),
            history_count=len(history),
            candidates="\n".join(candidates),
            candidate_count=len(candidates),
        )


def train_tokenizer(texts: Iterable[str], vocabulary: int, directory: pathlib.Path) -> int:
    """Trains a byte-level BPE on lines as they occur and saves it as a Hugging Face tokenizer; returns its real size.

    Text is split at line ends only, never at spaces: a frequent title becomes a single token, which a small model
    learns several times faster than word pieces.
    """
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    directory.mkdir(parents=True, exist_ok=True)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)
    return tokenizer.get_vocab_size()


class Encoder:
    """Titles and prompts to ids. `prompt_length` and `response_length` are the config's P and T."""

    def __init__(self, directory, template: Template, prompt_length: int, response_length: int, chat: bool = False):
        import transformers

        self.template, self.prompt_length, self.response_length = template, prompt_length, response_length
        if not (pathlib.Path(directory) / "tokenizer.json").is_file():
            raise UserError(f"{directory}: no tokenizer.json (a fast tokenizer is needed)")
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
        if tokenizer.eos_token_id is None:
            raise UserError(f"{directory}: the tokenizer names no end-of-sequence token")
        self.eos: int = tokenizer.eos_token_id
        self.pad: int = self.eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.before: list[int] = [tokenizer.bos_token_id] if begins else []
        self.after: list[int] = []
        self._tokenizer = tokenizer.backend_tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if chat:
            if not tokenizer.chat_template:
                raise UserError(f"model.chat_template: the tokenizer in {directory} has no chat template")
            slot = "\u241fslot\u241f"  # stands for the prompt, which must be encoded apart from the control tokens
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": slot}], tokenize=False, add_generation_prompt=True
            )
            before, after = str(rendered).split(slot)
            self._tokenizer.encode_special_tokens = False
            self.before = self._tokenizer.encode(before, add_special_tokens=False).ids
            self.after = self._tokenizer.encode(after, add_special_tokens=False).ids
        self._tokenizer.encode_special_tokens = True  # a control token's text inside a title stays plain text
        self.identity = files.hash_json(
            [files.hash_tree(pathlib.Path(directory) / "tokenizer.json"), template.text, prompt_length, chat]
        )

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, without any control token."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*self.before, *ids, *self.after] for ids in self.ids(texts)]

    def prompt_texts(self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]] | None) -> list[str]:
        """Rendered prompts that fit P tokens; the oldest history items are dropped where they do not."""
        candidates = candidates if candidates is not None else [()] * len(histories)
        texts = [self.template.render(h, c) for h, c in zip(histories, candidates)]
        for index, ids in enumerate(self.prompt_ids(texts)):
            kept = list(histories[index])
            while len(ids) > self.prompt_length and len(kept) > 1:
                kept.pop(0)
                texts[index] = self.template.render(kept, candidates[index])
                ids = self.prompt_ids([texts[index]])[0]
            if len(ids) > self.prompt_length:
                raise UserError(
                    f"model.prompt_length={self.prompt_length}: a prompt of one history item has {len(ids)} tokens; "
                    "raise model.prompt_length or shorten the template"
                )
        return texts

    def response_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each response, EOS included. Empty and over-long responses are errors, never cut."""
        rows = [[*ids, self.eos] for ids in self.ids(texts)]
        for text, ids in zip(texts, rows):
            if len(ids) == 1:
                raise UserError(f"a response is empty ({text!r}): nothing to score")
            if len(ids) > self.response_length:
                raise UserError(
                    f"model.response_length={self.response_length}: {text!r} has {len(ids)} tokens with its "
                    "end-of-sequence; raise model.response_length"
                )
        return rows


def pad(rows: Sequence[Sequence[int]], length: int, value: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids [B, length] int32 and their mask."""
    tokens = np.full((len(rows), length), value, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        mask[index, : len(row)] = True
    return tokens, mask
