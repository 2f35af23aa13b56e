"""SASRec: a causal transformer over item ids that scores every catalogue item as the next one (arXiv 1808.09781).

Pre-normalised blocks; the item embeddings are also the output matrix. A history is left-aligned: position 0 holds its
oldest item, unused positions at the end hold -1. Causal attention alone keeps them out of every real position, so
scores do not depend on the padded width. A history without items is scored from position 0 and a zero embedding.
"""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
import safetensors
import safetensors.numpy
from flax import nnx, traverse_util

from rosepo_jax import files, forms
from rosepo_jax.errors import UserError

Params = dict[str, Any]
_ARCHITECTURE = {"items": int, "positions": int, "width": int, "layers": int, "heads": int, "dropout": float}
FORM = {"architecture": _ARCHITECTURE, "tau?": float}  # of config.json


@dataclasses.dataclass(frozen=True)
class SASRecConfig:
    items: int  # I
    positions: int  # N: the longest history
    width: int = 64  # D
    layers: int = 2
    heads: int = 2
    dropout: float = 0.2  # of embeddings and of every block's two updates, in training only; to 1/256

    def __post_init__(self) -> None:
        if min(self.items, self.positions, self.width, self.layers, self.heads) < 1:
            raise UserError("oracle: items, positions, width, layers and heads must be at least 1")
        if self.width % self.heads:
            raise UserError(f"oracle.width={self.width}: must be a multiple of oracle.heads={self.heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"oracle.dropout={self.dropout}: must be at least 0 and below 1")


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on the flat positions of a batch.

    Flat: where products sum over two axes, XLA on CPUs transposes all activations for the weights' gradients.
    """

    def __init__(self, config: SASRecConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs)
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.qkv = linear(config.width, 3 * config.width)
        self.out = linear(config.width, config.width)
        self.mlp_norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.up = linear(config.width, config.width)
        self.down = linear(config.width, config.width)

    def __call__(self, x_BNxD: jax.Array, length: int, place_BxM: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """States of B rows of `length` positions, or of M positions of each; dropout where a key is given."""
        keys = (None, None) if key is None else jax.random.split(key)
        normed_BNxD, width = self.attention_norm(x_BNxD), x_BNxD.shape[1]
        if place_BxM is None:
            place_BxM = jnp.arange(length)[None]
            q, k, v = jnp.split(self.qkv(normed_BNxD), 3, axis=1)
        else:
            kernel_Dx3D, bias_3D = (jnp.asarray(x) for x in (self.qkv.kernel, self.qkv.bias))
            q = _at(normed_BNxD, length, place_BxM) @ kernel_Dx3D[:, :width] + bias_3D[None, :width]
            k, v = jnp.split(normed_BNxD @ kernel_Dx3D[:, width:] + bias_3D[None, width:], 2, axis=1)
            x_BNxD = _at(x_BNxD, length, place_BxM)
        update = self.out(self.attend(q, k, v, length, place_BxM))
        x = x_BNxD + _drop(update, self.dropout, keys[0])
        update = self.down(nnx.relu(self.up(self.mlp_norm(x))))
        return x + _drop(update, self.dropout, keys[1])

    def attend(self, q_BMxD, k_BNxD, v_BNxD, length: int, place_BxM: jax.Array) -> jax.Array:
        B, width = len(k_BNxD) // length, k_BNxD.shape[1]
        q, k, v = (x.reshape(B, -1, self.heads, width // self.heads) for x in (q_BMxD, k_BNxD, v_BNxD))
        seen_BxMxN = place_BxM[:, :, None] >= jnp.arange(length)[None, None]
        logits_BxHxMxN = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        weight_BxHxMxN = jax.nn.softmax(jnp.where(seen_BxMxN[:, None], logits_BxHxMxN, -jnp.inf), axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", weight_BxHxMxN, v).reshape(q_BMxD.shape)


def _at(x_BNxD: jax.Array, length: int, place_BxM: jax.Array) -> jax.Array:
    """Some positions of each row, flat [B * M, D]."""
    row_Bx1 = length * jnp.arange(len(place_BxM))[:, None]
    return x_BNxD[(row_Bx1 + place_BxM).reshape(-1)]


def _drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Dropout by 8 random bits an element, since drawing them is most of its cost: the rate is rounded to 1/256."""
    if key is None or not rate:
        return x
    limit = min(round(rate * 2**8), 2**8 - 1)
    bits = jax.lax.bitcast_convert_type(jax.random.bits(key, ((x.size + 3) // 4,)), jnp.uint8)
    return jnp.where(bits.reshape(-1)[: x.size].reshape(x.shape) >= limit, x * (2**8 / (2**8 - limit)), 0)


class SASRec(nnx.Module):
    """History [B, N] -> hidden states of all positions [B, N, D], or of M [B, M, D]; a key switches dropout on."""

    def __init__(self, config: SASRecConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.item = nnx.Param(normal(rngs.params(), (config.items, config.width), jnp.float32))
        self.position = nnx.Param(normal(rngs.params(), (config.positions, config.width), jnp.float32))
        self.blocks = [f"block_{layer}" for layer in range(config.layers)]
        for name in self.blocks:
            setattr(self, name, Block(config, rngs=rngs))
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.dropout = config.dropout

    def __call__(self, history_BxN: jax.Array, place_BxM: jax.Array | None, key: jax.Array | None) -> jax.Array:
        (B, length), width = history_BxN.shape, self.item.shape[1]
        first, *keys = [None] * (1 + len(self.blocks)) if key is None else jax.random.split(key, 1 + len(self.blocks))
        real_BxNx1 = (history_BxN >= 0)[:, :, None]
        item_BxNxD = jnp.where(real_BxNx1, self.item[...][jnp.maximum(history_BxN, 0)], 0)
        x_BxNxD = item_BxNxD * width**0.5 + self.position[None, :length]
        x = _drop(x_BxNxD.reshape(-1, width), self.dropout, first)
        for name, block_key in zip(self.blocks, keys):
            # What the last block makes of other positions nobody reads.
            x = getattr(self, name)(x, length, place_BxM if name == self.blocks[-1] else None, block_key)
        return self.norm(x).reshape(B, -1, width)


def init(config: SASRecConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters, a nested dict."""
    return nnx.to_pure_dict(nnx.state(SASRec(config, rngs=nnx.Rngs(params=key)), nnx.Param))


@functools.cache
def _graph(config: SASRecConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: SASRec(config, rngs=nnx.Rngs(0))))


def hidden(
    config: SASRecConfig,
    params: Params,
    history_BxN: jax.Array,
    place_BxM: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Hidden states [B, N, D] of a history of at most `config.positions` items, or [B, M, D] of some positions.

    Dropout only where a key is given.
    """
    if history_BxN.shape[1] > config.positions:
        raise ValueError(f"history of width {history_BxN.shape[1]} for {config.positions} positions")
    return nnx.merge(_graph(config), params)(history_BxN, place_BxM, key)


def last(history_BxN: jax.Array) -> jax.Array:
    """The last real position of each row [B, 1]."""
    return jnp.maximum(jnp.sum(history_BxN >= 0, axis=1, keepdims=True) - 1, 0)


def scores(config: SASRecConfig, params: Params, history_BxN: jax.Array) -> jax.Array:
    """Scores [B, I] of every item as the one that follows the history: logits of a softmax, float32, no unit."""
    return hidden(config, params, history_BxN, last(history_BxN))[:, 0] @ params["item"].T


def item_scores(config: SASRecConfig, params: Params, history_BxN: jax.Array, item_BxR: jax.Array) -> jax.Array:
    """Scores [B, R] of some items only: the columns `item_BxR` of `scores`, without the other columns' cost."""
    state_BxD = hidden(config, params, history_BxN, last(history_BxN))[:, 0]
    return jnp.einsum("bd,brd->br", state_BxD, params["item"][item_BxR])


def next_items(history_BxN: jax.Array, target_B: jax.Array, positions: str) -> tuple[jax.Array | None, jax.Array]:
    """What is predicted where: (place_BxM, next_BxM), positions of the history and the items that follow them.

    positions: all (every position, for which place is None; next is -1 behind the end) | last (the target only, M = 1).
    """
    if positions == "last":
        return last(history_BxN), target_B[:, None]
    batch = len(history_BxN)
    following_BxN = jnp.concatenate([history_BxN[:, 1:], jnp.full((batch, 1), -1, history_BxN.dtype)], axis=1)
    return None, following_BxN.at[jnp.arange(batch), last(history_BxN)[:, 0]].set(target_B)


def cross_entropy(
    config: SASRecConfig, params: Params, history_BxN: jax.Array, place_BxM, next_BxM, key: jax.Array | None
) -> jax.Array:
    """Mean over predicted positions of the softmax cross-entropy over the whole catalogue, nats."""
    state_BMxD = hidden(config, params, history_BxN, place_BxM, key).reshape(-1, config.width)
    next_BM = next_BxM.reshape(-1)
    losses_BM = optax.softmax_cross_entropy_with_integer_labels(state_BMxD @ params["item"].T, jnp.maximum(next_BM, 0))
    return _mean(losses_BM, next_BM >= 0)


def binary_cross_entropy(
    config: SASRecConfig, params: Params, history_BxN: jax.Array, place_BxM, next_BxM, key: jax.Array
) -> jax.Array:
    """Mean over predicted positions of softplus(-s_next) + softplus(s_other), one uniform other item per position."""
    dropout_key, negative_key = jax.random.split(key)
    state_BMxD = hidden(config, params, history_BxN, place_BxM, dropout_key).reshape(-1, config.width)
    next_BM = next_BxM.reshape(-1)
    shift_BM = jax.random.randint(negative_key, next_BM.shape, 1, max(config.items, 2))  # never the next item itself
    positive_BM = jnp.maximum(next_BM, 0)
    negative_BM = (positive_BM + shift_BM) % config.items
    score = lambda item_BM: jnp.einsum("md,md->m", state_BMxD, params["item"][item_BM])  # noqa: E731
    losses_BM = jax.nn.softplus(-score(positive_BM)) + jax.nn.softplus(score(negative_BM))
    return _mean(losses_BM, next_BM >= 0)


def _mean(values: jax.Array, real: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(real, values, 0)) / jnp.maximum(jnp.sum(real), 1)


def save(directory: str | os.PathLike, config: SASRecConfig, params: Params, **facts: Any) -> None:
    """Writes model.safetensors and config.json (the architecture, and `facts` beside it)."""
    directory = pathlib.Path(directory)
    tensors = {name: jax.device_get(value) for name, value in traverse_util.flatten_dict(params, sep=".").items()}
    files.write_bytes(directory / "model.safetensors", safetensors.numpy.save(tensors))
    files.write_json(directory / "config.json", {"architecture": dataclasses.asdict(config), **facts})


def load(directory: str | os.PathLike) -> tuple[SASRecConfig, Params, dict[str, Any]]:
    """The architecture, parameters and facts that `save` wrote.

    Raises:
      UserError: files are missing, damaged, or the tensors do not fit the architecture.
    """
    directory = pathlib.Path(directory)
    settings, path = directory / "config.json", directory / "model.safetensors"
    facts = files.read_json(settings)
    if forms.misfit(facts, FORM):
        raise UserError(f"{settings}: not an oracle's config ({forms.misfit(facts, FORM)}); run `rosepo oracle` again")
    try:
        config = SASRecConfig(**facts.pop("architecture"))
    except (TypeError, UserError) as error:  # TypeError: a field that there is not
        raise UserError(f"{settings}: not an oracle's config ({error}); run `rosepo oracle` again") from None
    try:
        with files.open_file(path):
            tensors = safetensors.numpy.load_file(path)
    except (OSError, KeyError, safetensors.SafetensorError) as error:  # KeyError: a type that numpy has not
        raise UserError(f"{path}: cannot be read ({error}); run `rosepo oracle` again") from None
    if config.layers > len(tensors) or _described(tensors) != _expected(config):
        raise UserError(f"{path}: tensors do not fit {settings}; run `rosepo oracle` again")
    params = traverse_util.unflatten_dict({name: jnp.asarray(value) for name, value in tensors.items()}, sep=".")
    return config, params, facts


def _described(tensors: dict[str, Any]) -> dict[str, tuple]:
    return {name: (value.shape, str(value.dtype)) for name, value in tensors.items()}


@functools.cache
def _expected(config: SASRecConfig) -> dict[str, tuple]:
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    return _described(traverse_util.flatten_dict(params, sep="."))
