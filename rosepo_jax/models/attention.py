"""Attention over a prompt, over responses that share it, and over one decoding step. One softmax each, in float32.

Grouped-query heads: query head h = k * G + g reads key-value head k, G = H / K. Head axes stay split as [K, G] inside.
`scale` multiplies the dot products; `cap` > 0 bounds them smoothly, cap * tanh(score / cap) (arXiv 2408.00118). Where
`window` is given, a query sees the last `window` positions only, its own included; it may be a traced number.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from rosepo_jax.errors import UserError
from rosepo_jax.models import flash

_MASKED = -1e30  # finite, so that a row without any visible key gives finite (unused) values and gradients


def choose(
    requested: str, platform: str, *, dtype: str, head_dim: int, prompt_length: int, cap: float, sliding: bool
) -> str:
    """The back end of `causal`: `requested` (model.attention), or where that is auto, the kernel of the platform if it
    can do the case, else xla.

    `sliding`: some layer's window is narrower than `prompt_length`. Prompts below 128 tokens are left to xla on TPUs:
    splash would pad them to 128.

    Raises:
        UserError: the requested kernel cannot do the case.
    """
    if requested not in ("auto", "xla", "cudnn", "splash"):
        raise UserError(f"model.attention={requested!r}: choose one of auto, xla, cudnn, splash")

    def unfit(kernel: str) -> str:
        return flash.unfit(kernel, platform, dtype=dtype, head_dim=head_dim, cap=cap, sliding=sliding)

    if requested == "auto":
        kernels = ("cudnn", "splash") if prompt_length >= flash.LANES else ("cudnn",)
        return next((kernel for kernel in kernels if not unfit(kernel)), "xla")
    if requested != "xla" and (reason := unfit(requested)):
        raise UserError(f"model.attention={requested!r} {reason}; use model.attention=auto")
    return requested


def causal(
    query_BxPxHxE: jax.Array,
    key_BxPxKxE: jax.Array,
    value_BxPxKxE: jax.Array,
    *,
    scale: float,
    cap: float = 0.0,
    window: jax.Array | int | None = None,
    implementation: str = "xla",
    mesh: Mesh | AbstractMesh | None = None,
) -> jax.Array:
    """The prompt attends causally to itself. Prompts are right-padded, so real positions never see padding.

    `implementation` is what `choose` returned: xla, or a kernel (`flash.py`), which needs `mesh` where arrays are split
    over devices. What a kernel does not know, a window or in cuDNN a cap, is computed by xla. Any P will do.
    """
    if implementation != "xla" and window is None and not (cap and implementation == "cudnn"):
        return flash.causal(
            query_BxPxHxE, key_BxPxKxE, value_BxPxKxE, scale=scale, cap=cap, implementation=implementation, mesh=mesh
        )
    B, P, H, E = query_BxPxHxE.shape
    K = key_BxPxKxE.shape[2]
    grouped = query_BxPxHxE.reshape(B, P, K, H // K, E)
    # A quarter of the queries at a time, against the keys up to theirs: 5/8 of the scores, and half of the time on a
    # CPU. Fewer than 64 queries are not worth products of their own.
    block = max(64, -(-P // 32) * 8)
    mixed = []
    for start in range(0, P, block):
        end = min(start + block, P)
        key_BxUxKxE, value_BxUxKxE = key_BxPxKxE[:, :end], value_BxPxKxE[:, :end]
        scores = jnp.einsum("bskge,buke->bkgsu", grouped[:, start:end], key_BxUxKxE, preferred_element_type=jnp.float32)
        visible_SxU = _within(jnp.arange(start, end)[:, None] - jnp.arange(end)[None], window)
        scores = jnp.where(visible_SxU[None, None, None], _bounded(scores, scale, cap), _MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(value_BxPxKxE.dtype)
        mixed.append(jnp.einsum("bkgsu,buke->bskge", weights, value_BxUxKxE))
    return jnp.concatenate(mixed, axis=1).reshape(B, P, H, E)


def responses(
    query_BxQxHxE: jax.Array,
    prompt_key_BxPxKxE: jax.Array,
    prompt_value_BxPxKxE: jax.Array,
    prompt_mask_BxP: jax.Array,
    key_BxQxKxE: jax.Array,
    value_BxQxKxE: jax.Array,
    which_BxQ: jax.Array,
    step_BxQ: jax.Array,
    *,
    longest: int,
    scale: float,
    cap: float = 0.0,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """Packed responses attend to their prompt and causally to themselves, never to each other.

    Entry q is token `step_BxQ[q]` of response `which_BxQ[q]`, so it stands that many positions behind the prompt's end.
    Responses stand one after the other, their tokens in order, at most `longest` each.
    """
    B, Q, H, E = query_BxQxHxE.shape
    K = key_BxQxKxE.shape[2]
    grouped = query_BxQxHxE.reshape(B, Q, K, H // K, E)
    # A quarter of the queries at a time: their own keys stand among theirs and the `longest` - 1 before them.
    block = max(64, longest, -(-Q // 4))
    mixed = []
    for start in range(0, max(Q, 1), block):  # responses of one token feed none
        end = min(start + block, Q)
        own = slice(max(start - longest + 1, 0), end)
        query, step_BxS, which_BxS = grouped[:, start:end], step_BxQ[:, start:end], which_BxQ[:, start:end]
        to_prompt = jnp.einsum("bskge,bpke->bkgsp", query, prompt_key_BxPxKxE, preferred_element_type=jnp.float32)
        to_self = jnp.einsum("bskge,buke->bkgsu", query, key_BxQxKxE[:, own], preferred_element_type=jnp.float32)
        visible_BxSxP = _prompt_visible(prompt_mask_BxP, step_BxS, window)
        distance_BxSxU = step_BxS[:, :, None] - step_BxQ[:, None, own]
        visible_BxSxU = (which_BxS[:, :, None] == which_BxQ[:, None, own]) & _within(distance_BxSxU, window)
        to_prompt = jnp.where(visible_BxSxP[:, None, None], _bounded(to_prompt, scale, cap), _MASKED)
        to_self = jnp.where(visible_BxSxU[:, None, None], _bounded(to_self, scale, cap), _MASKED)
        from_prompt, from_self = _softmax(to_prompt, to_self, value_BxQxKxE.dtype)
        values = jnp.einsum("bkgsp,bpke->bskge", from_prompt, prompt_value_BxPxKxE)
        mixed.append(values + jnp.einsum("bkgsu,buke->bskge", from_self, value_BxQxKxE[:, own]))
    return jnp.concatenate(mixed, axis=1).reshape(B, Q, H, E)


def beams(
    query_BxWxHxE: jax.Array,
    prompt_key_BxKxPxE: jax.Array,
    prompt_value_BxKxPxE: jax.Array,
    prompt_mask_BxP: jax.Array,
    key_BxKxUxE: jax.Array,
    value_BxKxUxE: jax.Array,
    line_BxWxT: jax.Array,
    depth: jax.Array,
    *,
    scale: float,
    cap: float = 0.0,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """One decoding step: token number `depth` of W partial responses attends to their prompt and to their own tokens.

    Entry t W + w of the U = T W keys was fed at place w in step t; `line_BxWxT` names each response's own entries, this
    step's included. Most scores are masked, but products of all with all cost less than gathering the own ones.
    """
    B, W, H, E = query_BxWxHxE.shape
    K, T = prompt_key_BxKxPxE.shape[1], line_BxWxT.shape[2]
    query = query_BxWxHxE.reshape(B, W, K, H // K, E).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, E)

    def scores(key_BxKxUxE: jax.Array, visible_BxWxU: jax.Array) -> jax.Array:
        found = jnp.einsum("bkqe,bkue->bkqu", query, key_BxKxUxE, preferred_element_type=jnp.float32)
        found = _bounded(found, scale, cap).reshape(B, K, H // K, W, -1)
        return jnp.where(visible_BxWxU[:, None, None], found, _MASKED).reshape(B, K, H // K * W, -1)

    is_own_BxWxTxW = line_BxWxT[..., None] == jnp.arange(W)[None, None, None]
    is_own_BxWxTxW &= _within(depth - jnp.arange(T), window)[None, None, :, None]
    to_self = scores(key_BxKxUxE, is_own_BxWxTxW.reshape(B, W, T * W))
    prompt_visible = _prompt_visible(prompt_mask_BxP, jnp.broadcast_to(depth, (B, 1)), window)
    to_prompt = scores(prompt_key_BxKxPxE, prompt_visible)
    from_prompt, from_self = _softmax(to_prompt, to_self, value_BxKxUxE.dtype)
    mixed = jnp.einsum("bkqp,bkpe->bkqe", from_prompt, prompt_value_BxKxPxE)
    mixed += jnp.einsum("bkqu,bkue->bkqe", from_self, value_BxKxUxE)
    return mixed.reshape(B, K, H // K, W, E).transpose(0, 3, 1, 2, 4).reshape(B, W, H, E)


def _prompt_visible(prompt_mask_BxP: jax.Array, step_BxQ: jax.Array, window: jax.Array | int | None) -> jax.Array:
    """Which prompt tokens are seen from `step_BxQ` positions behind the prompt's end: [B, Q or 1, P]."""
    if window is None:
        return prompt_mask_BxP[:, None]
    end_Bx1x1 = prompt_mask_BxP.sum(axis=1)[:, None, None]
    distance_BxQxP = end_Bx1x1 + step_BxQ[:, :, None] - jnp.arange(prompt_mask_BxP.shape[1])[None, None]
    return prompt_mask_BxP[:, None] & (distance_BxQxP < window)


def _softmax(to_prompt: jax.Array, to_self: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """The weights of one softmax over two sets of keys; partial softmaxes are never merged."""
    weights = jax.nn.softmax(jnp.concatenate([to_prompt, to_self], axis=-1), axis=-1).astype(dtype)
    return weights[..., : to_prompt.shape[-1]], weights[..., to_prompt.shape[-1] :]


def _bounded(scores: jax.Array, scale: float, cap: float) -> jax.Array:
    return soft_cap(scores * scale, cap)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap tanh(x / cap); 0 is no cap.

    Never above the cap anyway, but a bare product is merged with the subtraction of a softmax into one rounding, in
    some programs and not in others, and policy and reference would not start bit for bit equal.
    """
    return jnp.minimum(cap * jnp.tanh(x / cap), cap) if cap else x


def _within(distance: jax.Array, window: jax.Array | int | None) -> jax.Array:
    """Whether a query sees a key `distance` positions before it: none that comes later, none too far back."""
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)
