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

from rosepo_jax import files
from rosepo_jax.errors import UserError

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SASRecConfig:
    items: int  # I
    positions: int  # N: the longest history
    width: int = 64  # D
    layers: int = 2
    heads: int = 2
    dropout: float = 0.2  # of embeddings and of every block's two updates, in training only

    def __post_init__(self) -> None:
        if min(self.items, self.positions, self.width, self.layers, self.heads) < 1:
            raise UserError("oracle: items, positions, width, layers and heads must be at least 1")
        if self.width % self.heads:
            raise UserError(f"oracle.width={self.width}: must be a multiple of oracle.heads={self.heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"oracle.dropout={self.dropout}: must be at least 0 and below 1")


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: SASRecConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs)
        self.heads = config.heads
        self.attention_norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.qkv = linear(config.width, 3 * config.width)
        self.out = linear(config.width, config.width)
        self.mlp_norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.up = linear(config.width, config.width)
        self.down = linear(config.width, config.width)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x_BxNxD: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        still = rngs is None
        update_BxNxD = self.out(self.attend(self.qkv(self.attention_norm(x_BxNxD))))
        x_BxNxD = x_BxNxD + self.dropout(update_BxNxD, deterministic=still, rngs=rngs)
        update_BxNxD = self.down(nnx.relu(self.up(self.mlp_norm(x_BxNxD))))
        return x_BxNxD + self.dropout(update_BxNxD, deterministic=still, rngs=rngs)

    def attend(self, qkv_BxNx3D: jax.Array) -> jax.Array:
        batch, length, width = qkv_BxNx3D.shape
        q, k, v = jnp.moveaxis(qkv_BxNx3D.reshape(batch, length, 3, self.heads, -1), 2, 0)  # each [B, N, H, D/H]
        causal = jnp.tri(length, dtype=bool)
        logits_BxHxNxN = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        weight_BxHxNxN = jax.nn.softmax(jnp.where(causal[None, None], logits_BxHxNxN, -jnp.inf), axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", weight_BxHxNxN, v).reshape(batch, length, width // 3)


class SASRec(nnx.Module):
    """History [B, N] -> hidden state of every position [B, N, D]; `rngs` switches dropout on."""

    def __init__(self, config: SASRecConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.item = nnx.Param(normal(rngs.params(), (config.items, config.width), jnp.float32))
        self.position = nnx.Param(normal(rngs.params(), (config.positions, config.width), jnp.float32))
        self.blocks = [f"block_{layer}" for layer in range(config.layers)]
        for name in self.blocks:
            setattr(self, name, Block(config, rngs=rngs))
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, history_BxN: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        real_BxNx1 = (history_BxN >= 0)[:, :, None]
        item_BxNxD = jnp.where(real_BxNx1, self.item[...][jnp.maximum(history_BxN, 0)], 0)
        x_BxNxD = item_BxNxD * self.item.shape[1] ** 0.5 + self.position[None, : history_BxN.shape[1]]
        x_BxNxD = self.dropout(x_BxNxD, deterministic=rngs is None, rngs=rngs)
        for name in self.blocks:
            x_BxNxD = getattr(self, name)(x_BxNxD, rngs)
        return self.norm(x_BxNxD)


def init(config: SASRecConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters, a nested dict."""
    return nnx.to_pure_dict(nnx.state(SASRec(config, rngs=nnx.Rngs(params=key)), nnx.Param))


@functools.cache
def _graph(config: SASRecConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: SASRec(config, rngs=nnx.Rngs(0))))


def hidden(config: SASRecConfig, params: Params, history_BxN: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Hidden states [B, N, D] of a history of at most `config.positions` items; dropout only where a key is given."""
    if history_BxN.shape[1] > config.positions:
        raise ValueError(f"history of width {history_BxN.shape[1]} for {config.positions} positions")
    return nnx.merge(_graph(config), params)(history_BxN, None if key is None else nnx.Rngs(dropout=key))


def last_hidden(config: SASRecConfig, params: Params, history_BxN: jax.Array) -> jax.Array:
    """Hidden state [B, D] of the last real position."""
    last_B = jnp.maximum(jnp.sum(history_BxN >= 0, axis=1) - 1, 0)
    return hidden(config, params, history_BxN)[jnp.arange(len(history_BxN)), last_B]


def scores(config: SASRecConfig, params: Params, history_BxN: jax.Array) -> jax.Array:
    """Scores [B, I] of every item as the one that follows the history: logits of a softmax, float32, no unit."""
    return last_hidden(config, params, history_BxN) @ params["item"].T


def item_scores(config: SASRecConfig, params: Params, history_BxN: jax.Array, item_BxR: jax.Array) -> jax.Array:
    """Scores [B, R] of some items only: the columns `item_BxR` of `scores`, without the other columns' cost."""
    return jnp.einsum("bd,brd->br", last_hidden(config, params, history_BxN), params["item"][item_BxR])


def all_position_logits(
    config: SASRecConfig, params: Params, history_BxN: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """Logits [B, N, I] of the item after every position, for training."""
    return hidden(config, params, history_BxN, key) @ params["item"].T


def next_items(history_BxN: jax.Array, target_B: jax.Array, positions: str) -> jax.Array:
    """The item that follows each position [B, N], -1 where none is to be predicted.

    positions: all (every history item and the target) | last (the target only).
    """
    batch, width = history_BxN.shape
    last_B = jnp.maximum(jnp.sum(history_BxN >= 0, axis=1) - 1, 0)
    following_BxN = jnp.concatenate([history_BxN[:, 1:], jnp.full((batch, 1), -1, history_BxN.dtype)], axis=1)
    if positions == "last":
        following_BxN = jnp.full((batch, width), -1, history_BxN.dtype)
    return following_BxN.at[jnp.arange(batch), last_B].set(target_B)


def cross_entropy(
    config: SASRecConfig, params: Params, history_BxN: jax.Array, next_BxN: jax.Array, key: jax.Array | None
) -> jax.Array:
    """Mean over predicted positions of the softmax cross-entropy over the whole catalogue, nats."""
    logits_BxNxI = all_position_logits(config, params, history_BxN, key)
    losses_BxN = optax.softmax_cross_entropy_with_integer_labels(logits_BxNxI, jnp.maximum(next_BxN, 0))
    return _mean(losses_BxN, next_BxN >= 0)


def binary_cross_entropy(
    config: SASRecConfig, params: Params, history_BxN: jax.Array, next_BxN: jax.Array, key: jax.Array
) -> jax.Array:
    """Mean over predicted positions of softplus(-s_next) + softplus(s_other), one uniform other item per position."""
    dropout_key, negative_key = jax.random.split(key)
    hidden_BxNxD = hidden(config, params, history_BxN, dropout_key)
    shift_BxN = jax.random.randint(negative_key, next_BxN.shape, 1, max(config.items, 2))  # never the next item itself
    positive_BxN = jnp.maximum(next_BxN, 0)
    negative_BxN = (positive_BxN + shift_BxN) % config.items
    score = lambda item_BxN: jnp.einsum("bnd,bnd->bn", hidden_BxNxD, params["item"][item_BxN])  # noqa: E731
    losses_BxN = jax.nn.softplus(-score(positive_BxN)) + jax.nn.softplus(score(negative_BxN))
    return _mean(losses_BxN, next_BxN >= 0)


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
    facts = files.read_json(directory / "config.json")
    path = directory / "model.safetensors"
    try:
        config = SASRecConfig(**facts.pop("architecture"))
        tensors = safetensors.numpy.load_file(path)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{directory / 'config.json'}: not an oracle's config; run `rosepo oracle` again") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run `rosepo oracle` again") from None
    params = traverse_util.unflatten_dict({name: jnp.asarray(value) for name, value in tensors.items()}, sep=".")
    expected = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, expected):
        raise UserError(f"{path}: tensors do not fit {directory / 'config.json'}; run `rosepo oracle` again")
    return config, params, facts
