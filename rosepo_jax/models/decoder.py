"""One decoder in Flax NNX for all model families, and the pure functions the rest of the package calls.

What families differ in is data, the fields of `DecoderConfig`; `families.py` fills them from a Hugging Face config.

Parameters are one flat dict `path -> array` ("blocks/attention/query/kernel": [L, D, H*E]); the layers are stacked on
axis 0 and scanned. A batch is one prompt with R responses: the prompt is encoded once, the responses attend to its keys
and values and causally to themselves, never to each other. RoPE positions of every response restart at the prompt's
real length, and its first token is predicted from the prompt's last real position. This equals R separate sequences to
float rounding and costs P + R T tokens instead of R (P + T).
"""

import dataclasses
import functools
import math
import operator
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rosepo_jax.errors import UserError
from rosepo_jax.models import attention, quantize
from rosepo_jax.models.lora import LoRAConfig

Params = Mapping[str, jax.Array]
Turn = tuple[jax.Array, jax.Array]  # cosines and sines of rotation angles

# What the backward pass keeps of each layer; the rest it computes again. `none` keeps everything.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


# Far beyond any model; what a hostile config.json claims is compared with the weights only after shapes are computed.
MOST_LAYERS = 1 << 12
_SIZES = ("vocabulary", "width", "heads", "kv_heads", "head_dim", "mlp_width")
_MOST = {"layers": MOST_LAYERS, **dict.fromkeys(_SIZES, 1 << 28)}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of the network, and what its family does differently from Llama."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] | None = None  # sorted items of the Hugging Face dict
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = True
    max_positions: int = 4096
    family: str = "llama"  # a row of families.FAMILIES
    activation: str = "silu"  # silu | gelu_tanh, of the gate
    biases: tuple[str, ...] = ()  # linear maps that add a bias: "attention/query", ...
    query_key_norm: bool = False  # RMSNorm of every query and key head
    post_norms: bool = False  # norms also behind attention and MLP, before the residual sum
    unit_offset: bool = False  # norms multiply by 1 + scale
    scale_embeddings: bool = False  # embeddings times sqrt(width)
    query_scale: float | None = None  # of the attention scores; None = head_dim ** -0.5
    attention_cap: float = 0.0  # soft cap of the attention scores; 0 = none
    logit_cap: float = 0.0  # soft cap of the vocabulary logits; 0 = none
    window: int = 0  # positions that a sliding layer sees, its own included
    sliding: tuple[bool, ...] = ()  # which layers slide; () = none
    local_rope_theta: float | None = None  # of sliding layers, without scaling; None = as the others

    def __post_init__(self) -> None:
        for name in ("rope_scaling", "biases", "sliding"):  # JSON has no tuples
            value = getattr(self, name)
            frozen = tuple(tuple(item) if isinstance(item, list) else item for item in value or ())
            object.__setattr__(self, name, None if value is None else frozen)
        for name, most in _MOST.items():
            if not 0 < getattr(self, name) <= most:
                raise UserError(f"{name} = {getattr(self, name)}: a model has 1 to {most:,}")
        if self.sliding and (len(self.sliding) != self.layers or self.window < 1):
            raise ValueError("sliding layers need one flag a layer and a window of at least 1")

    @property
    def scores(self) -> dict[str, float]:
        """How attention turns dot products into scores."""
        return {"scale": self.query_scale or self.head_dim**-0.5, "cap": self.attention_cap}


def rope_frequencies(config: DecoderConfig) -> jax.Array:
    """Angular frequency of each rotated pair, [1, E/2] float32; [2, E/2] where sliding layers have a base of their own.

    Scaling is linear or llama3 (arXiv 2407.21783); the second row, if any (arXiv 2503.19786), is never scaled.
    """
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    scaling = dict(config.rope_scaling or ())
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        frequency = frequency / scaling["factor"]
    elif kind == "llama3":
        # Long wavelengths are stretched by `factor`, short ones are kept, those between are interpolated.
        ratio = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = jnp.clip((ratio - low) / (high - low), 0.0, 1.0)
        frequency = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
    local = [] if config.local_rope_theta is None else [1.0 / config.local_rope_theta**exponent]
    return jnp.stack([frequency, *local])


def rotate(x_BxSxHxE: jax.Array, turn_BxSxF: Turn) -> jax.Array:
    """Rotates the pairs (i, i + E/2) of every head by angles given as (cosine, sine); float32 inside."""
    cos, sin = (x[:, :, None] for x in turn_BxSxF)
    first, second = jnp.split(x_BxSxHxE.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxSxHxE.dtype)


@dataclasses.dataclass(frozen=True)
class Storage:
    """How parameters are kept and adapted: what a model is built with beside its architecture."""

    dtype: Any
    lora: LoRAConfig | None
    quantize: str


class Linear(nnx.Module):
    """x W, plus a bias if the family has one; with an adapter, plus scale (x A) B."""

    def __init__(self, path: str, inputs: int, outputs: int, c: DecoderConfig, storage: Storage, rngs: nnx.Rngs):
        lora = storage.lora if storage.lora and storage.lora.matches(path) else None
        self.path, self.lora, self.quantize = path, lora, storage.quantize
        kernel = _normal(rngs, (inputs, outputs), inputs**-0.5, storage.dtype)
        if self.quantize != "none":
            kernel, scale = quantize.quantize(kernel, self.quantize)
            self.kernel_scale = nnx.Param(scale)
        self.kernel = nnx.Param(kernel)
        if path in c.biases:
            self.bias = nnx.Param(jnp.zeros((outputs,), storage.dtype))
        if lora is not None:
            # Always float32: updates of an adapter would vanish in the rounding of a bfloat16 base.
            self.lora_a = nnx.Param(_normal(rngs, (inputs, lora.rank), inputs**-0.5, jnp.float32))
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, outputs), jnp.float32))

    def __call__(self, x: jax.Array, drop_BxS: jax.Array | None = None) -> jax.Array:
        kernel = self.kernel[...]
        if self.quantize != "none":
            kernel = quantize.dequantize(kernel, self.kernel_scale[...], self.quantize)
        y = x @ kernel.astype(x.dtype)
        if hasattr(self, "bias"):
            y += self.bias[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        if self.lora is not None:
            if drop_BxS is not None and self.lora.dropout:
                x = _drop(x, drop_BxS, self.lora.dropout, self.path)
            # Flat: with two axes to sum over, XLA on CPUs transposes all activations for the adapters' gradients.
            flat = x.reshape(-1, x.shape[-1])
            low_rank = self.lora.scale * (flat @ self.lora_a[...].astype(x.dtype)) @ self.lora_b[...].astype(x.dtype)
            y += low_rank.reshape(y.shape)
        return y


class Norm(nnx.Module):
    """RMSNorm (arXiv 1910.07467), float32 inside."""

    def __init__(self, width: int, c: DecoderConfig, storage: Storage):
        self.offset, self.epsilon = float(c.unit_offset), c.norm_epsilon
        self.scale = nnx.Param(jnp.full((width,), 1 - self.offset, storage.dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        scale = self.offset + self.scale[...].astype(jnp.float32)
        return (x32 * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, c: DecoderConfig, storage: Storage, rngs: nnx.Rngs):
        self.head_dim = c.head_dim
        linear = functools.partial(Linear, c=c, storage=storage, rngs=rngs)
        self.query = linear("attention/query", c.width, c.heads * c.head_dim)
        self.key = linear("attention/key", c.width, c.kv_heads * c.head_dim)
        self.value = linear("attention/value", c.width, c.kv_heads * c.head_dim)
        self.output = linear("attention/output", c.heads * c.head_dim, c.width)
        if c.query_key_norm:
            self.query_norm = Norm(c.head_dim, c, storage)
            self.key_norm = Norm(c.head_dim, c, storage)

    def __call__(self, x_BxSxD: jax.Array, turn_BxSxF: Turn, attend: Callable, drop_BxS) -> tuple[jax.Array, Any]:
        query, key, value = (
            linear(x_BxSxD, drop_BxS).reshape(*x_BxSxD.shape[:2], -1, self.head_dim)
            for linear in (self.query, self.key, self.value)
        )
        if hasattr(self, "query_norm"):
            query, key = self.query_norm(query), self.key_norm(key)
        mixed, kept = attend(rotate(query, turn_BxSxF), rotate(key, turn_BxSxF), value)
        return self.output(mixed.reshape(*x_BxSxD.shape[:2], -1), drop_BxS), kept


class MLP(nnx.Module):
    """A gated MLP: SwiGLU or GeGLU (arXiv 2002.05202)."""

    def __init__(self, c: DecoderConfig, storage: Storage, rngs: nnx.Rngs):
        linear = functools.partial(Linear, c=c, storage=storage, rngs=rngs)
        self.activation = c.activation
        self.gate = linear("mlp/gate", c.width, c.mlp_width)
        self.up = linear("mlp/up", c.width, c.mlp_width)
        self.down = linear("mlp/down", c.mlp_width, c.width)

    def __call__(self, x: jax.Array, drop_BxS) -> jax.Array:
        activate = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}[self.activation]  # jax's default is the tanh form
        return self.down(activate(self.gate(x, drop_BxS)) * self.up(x, drop_BxS), drop_BxS)


class Block(nnx.Module):
    """Pre-norm transformer block. `attend(query, key, value) -> (mixed, kept)` decides who sees whom."""

    def __init__(self, c: DecoderConfig, storage: Storage, rngs: nnx.Rngs):
        self.attention_norm = Norm(c.width, c, storage)
        self.attention = Attention(c, storage, rngs)
        self.mlp_norm = Norm(c.width, c, storage)
        self.mlp = MLP(c, storage, rngs)
        if c.post_norms:
            self.attention_post_norm = Norm(c.width, c, storage)
            self.mlp_post_norm = Norm(c.width, c, storage)

    def __call__(self, x_BxSxD: jax.Array, turn_BxSxF: Turn, attend: Callable, drop_BxS) -> tuple[jax.Array, Any]:
        post = hasattr(self, "attention_post_norm")
        update_BxSxD, kept = self.attention(self.attention_norm(x_BxSxD), turn_BxSxF, attend, drop_BxS)
        x_BxSxD = x_BxSxD + (self.attention_post_norm(update_BxSxD) if post else update_BxSxD)
        update_BxSxD = self.mlp(self.mlp_norm(x_BxSxD), drop_BxS)
        return x_BxSxD + (self.mlp_post_norm(update_BxSxD) if post else update_BxSxD), kept


class Decoder(nnx.Module):
    """Embedding, stacked blocks, final norm, head (the transposed embedding when tied)."""

    def __init__(self, c: DecoderConfig, storage: Storage, rngs: nnx.Rngs):
        self.config = c
        self.embedding = nnx.Param(_normal(rngs, (c.vocabulary, c.width), c.width**-0.5, storage.dtype))

        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Block(c, storage, rngs)

        self.blocks = stack(rngs.fork(split=c.layers))
        self.norm = Norm(c.width, c, storage)
        if not c.tie_embeddings:
            plain = dataclasses.replace(storage, lora=None, quantize="none")
            self.head = Linear("head", c.width, c.vocabulary, c, plain, rngs)

    def embed(self, tokens_BxS: jax.Array, dtype: str) -> jax.Array:
        x_BxSxD = self.embedding[...][tokens_BxS].astype(dtype)
        # The factor is rounded to the compute dtype first, as in the models' own code.
        return x_BxSxD * jnp.asarray(self.config.width**0.5, dtype) if self.config.scale_embeddings else x_BxSxD

    def layers(
        self,
        x_BxSxD,
        position_BxS,
        attend: Callable,
        caches: Any = None,
        remat: str = "none",
        drop_B=None,
        unrolled=False,
    ) -> tuple[jax.Array, Any]:
        """Runs all blocks; `attend(window, cache, query, key, value)` gets each layer's window and part of `caches`.

        `drop_B`, a key per row, switches the adapters' dropout on. `unrolled` writes the layers out instead of a loop;
        what layers get and keep is then a tuple with an entry per layer, otherwise stacked on axis 0.
        """
        c = self.config
        graph, stacked = nnx.split(self.blocks)
        everything = jnp.iinfo(jnp.int32).max
        window_L = jnp.where(jnp.array(c.sliding), c.window, everything) if any(c.sliding) else None

        # The same in all layers of a kind, so computed once.
        angle_NxBxSxF = position_BxS[None, ..., None] * rope_frequencies(c)[:, None, None]
        turns_NxBxSxF = jnp.cos(angle_NxBxSxF), jnp.sin(angle_NxBxSxF)
        kind_L = jnp.array(c.sliding, int) if len(angle_NxBxSxF) > 1 else jnp.zeros(c.layers, int)

        def layer(x, inputs):
            block, kind, window, number, cache = inputs
            turn_BxSxF = tuple(x[kind] for x in turns_NxBxSxF)
            drop_BxS = None if drop_B is None else _keys(drop_B, number, position_BxS)
            return nnx.merge(graph, block)(x, turn_BxSxF, functools.partial(attend, window, cache), drop_BxS)

        if remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)
            unrolled = False  # the loop is what keeps the second forward pass apart from the first
        inputs = (stacked, kind_L, window_L, jnp.arange(c.layers))
        if not unrolled:
            return jax.lax.scan(layer, x_BxSxD, (*inputs, caches))
        kept = []
        for number in range(c.layers):
            here = jax.tree.map(operator.itemgetter(number), inputs)
            x_BxSxD, kept_here = layer(x_BxSxD, (*here, caches and caches[number]))
            kept.append(kept_here)
        return x_BxSxD, tuple(kept)

    def logits(self, x: jax.Array) -> jax.Array:
        """Vocabulary logits in float32 for already normed hidden states."""
        kernel = self.head.kernel[...] if hasattr(self, "head") else self.embedding[...].T
        logits = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        return attention.soft_cap(logits, self.config.logit_cap)


def _normal(rngs: nnx.Rngs, shape, scale, dtype) -> jax.Array:
    return (scale * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


def _keys(key_B: jax.Array, layer: jax.Array, position_BxS: jax.Array) -> jax.Array:
    """A key per token of each row: by layer and position, so that padding changes none."""
    in_row = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(lambda key, position_S: in_row(jax.random.fold_in(key, layer), position_S))(key_B, position_BxS)


def _drop(x_BxSxI: jax.Array, key_BxS: jax.Array, rate: float, path: str) -> jax.Array:
    """Dropout by a key per token, so that it depends on neither batch nor padding; each map draws its own."""
    number, width = zlib.crc32(path.encode()), x_BxSxI.shape[2:]

    def draw(key):
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, width)

    kept_BxSxI = jax.vmap(jax.vmap(draw))(key_BxS)
    return jnp.where(kept_BxSxI, x_BxSxI / (1 - rate), 0).astype(x_BxSxI.dtype)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The decoder as pure functions over flat parameters. Prompts are right-padded; every prompt has a real token."""

    config: DecoderConfig
    lora: LoRAConfig | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    quantize: str = "none"
    attention: str = "xla"  # of the prompt: a back end of models/attention.py
    logits_chunk: int = 0  # response positions of a prompt whose logits exist at a time; 0 = all
    unrolled: bool = False  # layers one after the other instead of a loop over them: faster on CPUs, a longer program
    rows: jax.sharding.NamedSharding | None = None  # how the rows of a batch are split over devices

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise UserError(f"model.remat={self.remat!r}: choose one of {', '.join(REMAT)}")
        if self.quantize not in quantize.FORMATS:
            raise UserError(f"model.quantize={self.quantize!r}: choose one of {', '.join(quantize.FORMATS)}")

    @property
    def shares(self) -> int:
        """In how many equal parts the rows of a batch are split over devices."""
        return 1 if self.rows is None else math.prod(self.rows.mesh.shape[axis] for axis in self.rows.spec[0])

    @functools.cached_property
    def _graph(self):
        return nnx.split(nnx.eval_shape(lambda: self._build(jax.random.key(0))))[0]

    def _build(self, key: jax.Array) -> Decoder:
        storage = Storage(jnp.dtype(self.param_dtype), self.lora, self.quantize)
        return Decoder(self.config, storage, nnx.Rngs(params=key))

    def _module(self, params: Params) -> Decoder:
        return nnx.merge(self._graph, nnx.from_flat_state([(tuple(p.split("/")), v) for p, v in params.items()]))

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        """New parameters: normal with standard deviation 1/sqrt(fan in), adapters at zero effect."""
        state = nnx.state(self._build(key))
        return {"/".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(state)}

    def _embed(self, module: Decoder, tokens_BxS: jax.Array) -> jax.Array:
        """Embeddings whose rows stay on their devices.

        Embeddings are split over the width too. Without the constraint XLA keeps that split for the activations and the
        whole batch on every device: per layer an all-reduce of activations, twice the temporary memory.
        """
        x_BxSxD = module.embed(tokens_BxS, self.dtype)
        return x_BxSxD if self.rows is None else jax.lax.with_sharding_constraint(x_BxSxD, self.rows)

    def hidden(self, params: Params, prompt_BxP, prompt_mask_BxP, response_BxRxT) -> jax.Array:
        """Normed hidden states [B, R, T, D] that predict each response token."""
        first_BxD, later_BxQxD = self.states(params, prompt_BxP, prompt_mask_BxP, response_BxRxT)
        B, R, T = response_BxRxT.shape
        first_BxRx1xD = jnp.broadcast_to(first_BxD[:, None, None], (B, R, 1, first_BxD.shape[1]))
        return jnp.concatenate([first_BxRx1xD, later_BxQxD.reshape(B, R, T - 1, -1)], axis=2)

    def states(
        self,
        params: Params,
        prompt_BxP,
        prompt_mask_BxP,
        response_BxRxT,
        fed_BxQ: jax.Array | None = None,
        drop_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """One pass over prompts and responses: the normed hidden states that predict response tokens.

        Returns first_BxD, which predicts the first token of all R responses of a prompt, and later_BxQxD: entry q
        predicts what follows the response token `fed_BxQ[q]`. The last token of a response is never fed: nothing is
        predicted from it. `fed_BxQ` names tokens as r (T - 1) + t, in rising order; R (T - 1) is padding. None is all
        R (T - 1) of them. `drop_B` (a key per prompt) switches the adapters' dropout on.
        """
        module = self._module(params)
        B, P = prompt_BxP.shape
        length_B = prompt_mask_BxP.sum(axis=1)
        fed_BxQ = all_fed(response_BxRxT) if fed_BxQ is None else fed_BxQ
        longest = max(response_BxRxT.shape[2] - 1, 1)
        which_BxQ, step_BxQ = jnp.divmod(fed_BxQ, longest)
        tokens = jnp.concatenate([prompt_BxP, take_fed(response_BxRxT[:, :, :-1], fed_BxQ)], axis=1)
        position_BxP = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
        position = jnp.concatenate([position_BxP, length_B[:, None] + step_BxQ], axis=1)

        def attend(window, _, query, key, value):
            prompt_key, prompt_value = key[:, :P], value[:, :P]
            prompt = self._causal(query[:, :P], prompt_key, prompt_value, window)
            response = attention.responses(
                query[:, P:],
                prompt_key,
                prompt_value,
                prompt_mask_BxP,
                key[:, P:],
                value[:, P:],
                which_BxQ,
                step_BxQ,
                longest=longest,
                window=window,
                **self.config.scores,
            )
            return jnp.concatenate([prompt, response], axis=1), None

        x, _ = module.layers(
            self._embed(module, tokens), position, attend, remat=self.remat, drop_B=drop_B, unrolled=self.unrolled
        )
        last_BxD = jnp.take_along_axis(x[:, :P], (length_B - 1)[:, None, None], axis=1)[:, 0]
        return module.norm(last_BxD), module.norm(x[:, P:])

    def _causal(self, query, key, value, window) -> jax.Array:
        mesh = None if self.rows is None else self.rows.mesh
        # Nothing of a short prompt is out of sight, and kernels know no window.
        wide = query.shape[1] <= self.config.window
        return attention.causal(
            query, key, value, **self.config.scores, window=None if wide else window,
            implementation=self.attention, mesh=mesh,
        )  # fmt: skip

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Vocabulary logits in float32 for normed hidden states."""
        return self._module(params).logits(hidden)

    def prefill(self, params: Params, prompt_BxP, prompt_mask_BxP) -> tuple[jax.Array, Any]:
        """Logits [B, V] of the first response token, and the prompt's cache: each layer's keys and values [B, K, P, E],
        and the mask."""
        module = self._module(params)
        B, P = prompt_BxP.shape

        def attend(window, _, query, key, value):
            return self._causal(query, key, value, window), (jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))

        position_BxP = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
        x, keys_values = module.layers(self._embed(module, prompt_BxP), position_BxP, attend, unrolled=self.unrolled)
        last = jnp.take_along_axis(x, (prompt_mask_BxP.sum(axis=1) - 1)[:, None, None], axis=1)[:, 0]
        return module.logits(module.norm(last)), (keys_values, prompt_mask_BxP)

    def empty_suffix(self, B: int, W: int, T: int) -> Any:
        """Room for what W partial responses feed in T steps: each layer's keys and values [B, K, T * W, E]."""
        c = self.config
        shape = (B, c.kv_heads, T * W, c.head_dim)
        if self.unrolled:
            return tuple((jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(c.layers))
        return jnp.zeros((c.layers, *shape), self.dtype), jnp.zeros((c.layers, *shape), self.dtype)

    def extend(
        self, params: Params, prompt_cache, suffix_cache, token_BxW, depth, line_BxWxT: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Feeds token number `depth` (from 0) of W partial responses; logits [B, W, V] of the next, and the cache.

        `line_BxWxT[b, w, t]` is the place, of W, at which token number t of response w was fed. What was fed once stays
        where it is, for all responses that begin with it. None: always at the response's own place.
        """
        module = self._module(params)
        keys_values, prompt_mask_BxP = prompt_cache
        B, W = token_BxW.shape
        T = jax.tree.leaves(suffix_cache)[0].shape[-2] // W
        if line_BxWxT is None:
            line_BxWxT = jnp.broadcast_to(jnp.arange(W)[None, :, None], (B, W, T))
        position = jnp.broadcast_to((prompt_mask_BxP.sum(axis=1) + depth)[:, None], (B, W))

        def write(cache, new):
            return jax.lax.dynamic_update_slice_in_dim(cache, new, depth * W, axis=cache.ndim - 2)

        def attend(window, caches, query, key, value):
            (prompt_key, prompt_value), own = caches
            new = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
            own_key, own_value = jax.tree.map(write, own, new)
            mixed = attention.beams(
                query,
                prompt_key,
                prompt_value,
                prompt_mask_BxP,
                own_key,
                own_value,
                line_BxWxT,
                depth,
                **self.config.scores,
                window=window,
            )
            return mixed, new

        caches = tuple(zip(keys_values, suffix_cache)) if self.unrolled else (keys_values, suffix_cache)
        x, new = module.layers(self._embed(module, token_BxW), position, attend, caches, unrolled=self.unrolled)
        return module.logits(module.norm(x)), jax.tree.map(write, suffix_cache, new)

    def prompt_states(self, params: Params, tokens_BxP, mask_BxP) -> jax.Array:
        """Mean of the normed last-layer states over real tokens [B, D]: a text's vector by the model itself."""
        module = self._module(params)
        B, P = tokens_BxP.shape

        def attend(window, _, query, key, value):
            return self._causal(query, key, value, window), None

        position_BxP = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
        x, _ = module.layers(self._embed(module, tokens_BxP), position_BxP, attend, unrolled=self.unrolled)
        x = jnp.where(mask_BxP[..., None], module.norm(x).astype(jnp.float32), 0.0)
        return x.sum(axis=1) / mask_BxP.sum(axis=1, keepdims=True)


def all_fed(response_BxRxT: jax.Array) -> jax.Array:
    """Every response token that can be fed, response by response."""
    B, R, T = response_BxRxT.shape
    return jnp.broadcast_to(jnp.arange(R * (T - 1))[None], (B, R * (T - 1)))


def take_fed(x_BxRxS: jax.Array, fed_BxQ: jax.Array) -> jax.Array:
    """The entries [B, Q] of x_BxRxS that `fed_BxQ` names; any value for padding."""
    return jnp.take_along_axis(x_BxRxS.reshape(len(x_BxRxS), -1), fed_BxQ, axis=1, mode="clip")
