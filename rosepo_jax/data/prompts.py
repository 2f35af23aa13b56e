"""One encoder for every stage: text in, token ids and masks out.

Prompt and response are tokenised apart and joined as ids: one BOS if the tokenizer itself puts one, exactly one EOS at
the end of each response. Text that comes from data never becomes a control token. Masks say which ids are real; nothing
is ever inferred from `ids != pad`. A prompt that is too long drops its oldest history items, nothing else.
"""

import contextlib
import dataclasses
import pathlib
import string
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from rosepo_jax import files
from rosepo_jax.data import chat as chats
from rosepo_jax.errors import UserError

HISTORY = {"history", "history_line"}
CANDIDATES = {"candidates", "candidates_line"}
SLOTS = {*HISTORY, "history_count", *CANDIDATES, "candidate_count"}
LARGEST = 1 << 20  # bytes of a template


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt with named slots. The trailing newline is part of the prompt.

    `{history}` and `{candidates}` list titles one a line, `{history_line}` and `{candidates_line}` the same titles
    joined by ", "; `{history_count}` and `{candidate_count}` are the numbers of titles really listed.
    Origins of the shipped files: data/templates/README.md.
    """

    text: str

    @classmethod
    def load(cls, name: str) -> "Template":
        """`name` of a file in data/templates, or a path."""
        shipped = pathlib.Path(__file__).parent / "templates" / f"{name}.txt"
        path = shipped if shipped.is_file() else pathlib.Path(name)
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in shipped.parent.glob("*.txt")))
            raise UserError(f"data.template: no template {name!r}: give a path or one of {known}")
        template = cls(files.read_text(path, LARGEST))
        try:
            slots = template.slots
        except ValueError as error:
            raise UserError(f"{path}: {error}; write {{{{ or }}}} for a brace that is no slot's") from None
        if not slots & HISTORY or slots - SLOTS:
            raise UserError(
                f"{path}: needs the slot {{history}} or {{history_line}} and may use {sorted(SLOTS)}, "
                f"found {sorted(slots)}"
            )
        if slots >= HISTORY or slots >= CANDIDATES:
            raise UserError(f"{path}: lists the same titles in two ways, found {sorted(slots)}; keep one of them")
        if "candidate_count" in slots and not template.uses_candidates:
            raise UserError(f"{path}: counts candidates but lists none; add {{candidates}} or drop {{candidate_count}}")
        return template

    @property
    def slots(self) -> set[str]:
        """Slots as written, with any format or conversion: `{history!r}` is "history!r" and so no slot of SLOTS."""
        return {
            name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            for _, name, spec, conversion in string.Formatter().parse(self.text)
            if name is not None
        }

    @property
    def uses_candidates(self) -> bool:
        return bool(self.slots & CANDIDATES)

    def render(self, history: Sequence[str], candidates: Sequence[str] = ()) -> str:
        return self.text.format(
            history="\n".join(history),
            history_line=", ".join(history),
            history_count=len(history),
            candidates="\n".join(candidates),
            candidates_line=", ".join(candidates),
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
    """Titles and prompts to ids. `prompt_length` and `response_length` are the config's P and T.

    eos: ends every response. In a chat it is the control token that the chat template puts after an assistant's message
    (<|eot_id|>, <|im_end|>, <end_of_turn>), which is where serving stacks stop; otherwise the tokenizer's own.
    before, after: the ids around every prompt's text.

    Control tokens are those marked special and those that the chat template writes. Other added tokens are vocabulary.
    """

    def __init__(self, directory, template: Template, prompt_length: int, response_length: int, chat: bool = False):
        self.template, self.prompt_length, self.response_length = template, prompt_length, response_length
        if not (pathlib.Path(directory) / "tokenizer.json").is_file():
            raise UserError(
                f"{directory}: no tokenizer.json; transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) "
                "writes one"
            )
        if large := [
            file
            for file in pathlib.Path(directory).glob("*.json")
            if file.is_file() and file.stat().st_size > files.LARGEST
        ]:
            raise UserError(f"{large[0]}: larger than {files.LARGEST:,} bytes, which no tokenizer needs")
        self._where, self._chat, self._lead, self._tail = directory, chat, "", ""
        with _one_line(directory):
            self._open(directory)
        self.identity = files.hash_json(
            [
                files.hash_tree(pathlib.Path(directory) / "tokenizer.json"),
                *(template.text, prompt_length, chat),
                *(self.before, self._lead, self._tail, self.after, self.eos),
            ]
        )

    def _open(self, directory) -> None:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
        if tokenizer.eos_token_id is None:
            raise UserError(f"{directory}: the tokenizer names no end-of-sequence token")
        if self._chat and not tokenizer.chat_template:
            raise UserError(f"model.chat_template: the tokenizer in {directory} has no chat template")
        self.eos: int = tokenizer.eos_token_id
        self.pad: int = self.eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.before: list[int] = [tokenizer.bos_token_id] if begins else []
        self.after: list[int] = []
        written = str(tokenizer.chat_template or "")
        self._control = {
            id: token.content
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content in written and not token.content.isspace())
        }
        self._unknown = tokenizer.unk_token_id
        self._tokenizer = self._prompt_tokenizer = tokenizer.backend_tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if self._chat:
            self._enter_chat(*chats.around(tokenizer.get_chat_template(), tokenizer.special_tokens_map))
        for each in (self._tokenizer, self._prompt_tokenizer):
            each.add_special_tokens(list(self._control.values()))  # adds none: it makes them count as special
            each.encode_special_tokens = True  # a control token's text inside a title stays plain text

    def _enter_chat(self, before: str, after: str, ending: str) -> None:
        """Takes over what the chat template writes before and after a prompt's text, and after a response.

        What stands between the text and the nearest control tokens is encoded with the text, as one piece: so prompts
        have the ids that chat users' prompts have, also where a tokenizer merges across that boundary.
        """
        self._tokenizer.encode_special_tokens = False
        first, last, end = (self._tokenizer.encode(text, add_special_tokens=False) for text in (before, after, ending))
        start = max((place + 1 for place, id in enumerate(first.ids) if id in self._control), default=0)
        stop = next((place for place, id in enumerate(last.ids) if id in self._control), len(last.ids))
        self.before, self._lead = first.ids[:start], before[first.offsets[start - 1][1] if start else 0 :]
        self.after, self._tail = last.ids[stop:], after[: last.offsets[stop][0] if stop < len(last.ids) else len(after)]
        if end.ids and end.ids[0] in self._control:
            self.eos = end.ids[0]
        if self.before:  # SentencePiece's leading blank belongs to the beginning of a text only
            state = self._tokenizer.to_str().replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
            self._prompt_tokenizer = type(self._tokenizer).from_str(state)

    def _encode(self, tokenizer, texts: Sequence[str]) -> list[list[int]]:
        """Ids without any control token, not even one that the tokenizer has learned to merge from its letters."""
        with _one_line(self._where):
            rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        return [
            ids if self._control.keys().isdisjoint(ids) else [piece for id in ids for piece in self._spell(id)]
            for ids in rows
        ]

    def _spell(self, id: int) -> list[int]:
        if id not in self._control or id == self._unknown:
            return [id]
        return [piece.id for letter in self._control[id] for piece in self._tokenizer.model.tokenize(letter)]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, without any control token."""
        return self._encode(self._tokenizer, texts)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt. In a chat, white space around the text is dropped, as chat templates do."""
        if self._chat:
            texts = [self._lead + text.strip() + self._tail for text in texts]
        return [[*self.before, *ids, *self.after] for ids in self._encode(self._prompt_tokenizer, texts)]

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


@contextlib.contextmanager
def _one_line(directory) -> Iterator[None]:
    """What the libraries make of damaged or hostile tokenizer files: any error, even the end of a thread of Rust."""
    try:
        yield
    except UserError as error:
        raise error if str(directory) in str(error) else UserError(f"{directory}: {error}") from None
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"{directory}: its tokenizer cannot be used ({said}); fetch or convert it again") from None


def pad(rows: Sequence[Sequence[int]], length: int, value: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids [B, length] int32 and their mask."""
    tokens = np.full((len(rows), length), value, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        mask[index, : len(row)] = True
    return tokens, mask
