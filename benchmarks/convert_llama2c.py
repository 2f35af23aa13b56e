"""Converts a llama2.c checkpoint (legacy version 0) and its tokenizer to a Hugging Face directory of llama type.

    python benchmarks/convert_llama2c.py stories260K.bin tok512.bin OUT

The file: seven int32 (width, MLP width, layers, heads, key-value heads, vocabulary, positions; a negative vocabulary
means an untied head), then float32 tensors, all layers of one tensor together, weights as [out, in]. Its RoPE rotates
the pairs (2i, 2i+1) of a head, Hugging Face rotates (i, i + E/2): the rows of query and key are permuted.
"""

import json
import pathlib
import struct
import sys
import tempfile

import numpy as np
import tokenizers

from rosepo_jax.models import checkpoints_hf
from rosepo_jax.models.decoder import DecoderConfig


def read_model(path: str) -> tuple[DecoderConfig, dict[str, np.ndarray]]:
    """Configuration and parameters, in the package's own layout."""
    content = pathlib.Path(path).read_bytes()
    width, mlp, layers, heads, kv_heads, vocabulary, positions = struct.unpack("<7i", content[:28])
    config = DecoderConfig(
        vocabulary=abs(vocabulary),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        mlp_width=mlp,
        tie_embeddings=vocabulary > 0,
        max_positions=positions,
    )
    offset = 28

    def take(*shape):
        nonlocal offset
        array = np.frombuffer(content, "<f4", int(np.prod(shape)), offset).reshape(shape)
        offset += array.nbytes
        return array

    def half_split(weight, n):  # [L, n * E, D]: rows 2i, 2i+1 of a head to rows i, i + E/2
        pairs = weight.reshape(layers, n, -1, 2, width)
        return pairs.swapaxes(2, 3).reshape(weight.shape)

    key_value = kv_heads * config.head_dim
    params = {
        "embedding": take(config.vocabulary, width),
        "blocks/attention_norm/scale": take(layers, width),
        "blocks/attention/query/kernel": half_split(take(layers, width, width), heads),
        "blocks/attention/key/kernel": half_split(take(layers, key_value, width), kv_heads),
        "blocks/attention/value/kernel": take(layers, key_value, width),
        "blocks/attention/output/kernel": take(layers, width, width),
        "blocks/mlp_norm/scale": take(layers, width),
        "blocks/mlp/gate/kernel": take(layers, mlp, width),
        "blocks/mlp/down/kernel": take(layers, width, mlp),
        "blocks/mlp/up/kernel": take(layers, mlp, width),
        "norm/scale": take(width),
    }
    take(positions, config.head_dim // 2)  # the rotary tables follow from the configuration
    take(positions, config.head_dim // 2)
    if not config.tie_embeddings:
        params["head/kernel"] = take(config.vocabulary, width)
    if offset != len(content):
        raise SystemExit(f"{path}: {len(content)} bytes, but the header asks for {offset}")
    return config, {
        name: value.swapaxes(-1, -2) if name.endswith("kernel") else value for name, value in params.items()
    }


def read_tokenizer(path: str, vocabulary: int) -> tokenizers.Tokenizer:
    """The byte-fallback BPE as a `tokenizers` tokenizer: BOS, a blank, then merges in the order of their scores."""
    content = pathlib.Path(path).read_bytes()
    offset, pieces, scores = 4, [], []
    for _ in range(vocabulary):
        score, length = struct.unpack_from("<fi", content, offset)
        pieces.append(content[offset + 8 : offset + 8 + length].decode("utf-8").replace("\n<", "<").replace(">\n", ">"))
        scores.append(score)
        offset += 8 + length
    ids = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for number in sorted(range(259, vocabulary), key=lambda number: -scores[number]):
        piece = pieces[number]  # any two neighbours that make the piece are merged
        merges += [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in ids and piece[i:] in ids]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = tokenizers.normalizers.Prepend(" ")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def main(model: str, tokenizer: str, output: str) -> None:
    config, params = read_model(model)
    with tempfile.TemporaryDirectory() as directory:
        read_tokenizer(tokenizer, config.vocabulary).save(f"{directory}/tokenizer.json")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "clean_up_tokenization_spaces": False,
        }
        pathlib.Path(directory, "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
        checkpoints_hf.write(output, config, params, directory)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
