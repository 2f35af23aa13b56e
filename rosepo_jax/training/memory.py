"""What training needs on one device, counted from shapes alone: nothing is loaded, no device is touched.

State is exact: every parameter by its sharding rule, in the format it is kept in. What a step needs beside it is an
estimate, for one device's share of the rows (and, split by `tensor`, of heads, MLP units and vocabulary):

    step      = gradients + kept + max(block + gathered, head)
    gradients   of the trainable parameters; twice with micro-batches (the sum and the addend)
    kept        what the backward pass keeps of the blocks: the leaves of the pull-back of `jax.vjp` that are no inputs
    block       the same of one block that recomputes nothing: the block whose turn it is
    gathered    the kernels of two blocks where `fsdp` splits them: the one at work, and the next on its way
    head        the logits, their cotangent, and the cotangent in the compute dtype; the head's kernel, where it must
                be gathered or cast; its whole gradient, where it is trained and `fsdp` splits it
    scoring   = max(block, logits + head's kernel) + gathered: validation, which runs beside the same state

State plus step was 0.85 to 1.1 times what the compiler asks for: small models on a CPU, the models of 1 to 8 billion
parameters on 1 and 8 H100s, 16 TPU v5e and 64 v5p (compiled without the devices). It holds as long as rows stay on
their device. Batches (kilobytes) and the oracle (megabytes) are not counted.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from rosepo_jax.models import lora
from rosepo_jax.models.decoder import LanguageModel
from rosepo_jax.training import loop, optimizer, sharding
from rosepo_jax.training.step import init_state

Shapes = Mapping[str, jax.ShapeDtypeStruct]

HARDWARE = {  # bytes that a device reports as its memory
    "h100": 81_559 << 20,
    "h200": 143_771 << 20,
    "v5e": 16_911_433_728,
    "v5p": 102_801_367_040,
    "v6e": 33_554_432_000,
}
GPUS = ("h100", "h200")
USABLE = 0.9  # of them: the rest is for the estimate's error and for what runtimes keep for themselves


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a stage trains."""

    base: int  # parameters that are never trained
    trainable: int
    reference: int  # a frozen copy of the trainable parameters, in alignment
    optimizer: int
    gradients: int
    kept: int
    transient: int  # the larger of a block and the head
    scoring: int  # instead of the three above, during validation

    @property
    def state(self) -> int:
        return self.base + self.trainable + self.reference + self.optimizer

    @property
    def total(self) -> int:
        return self.state + max(self.gradients + self.kept + self.transient, self.scoring)


class Work(NamedTuple):
    """What one device computes at a time: B prompts of P tokens, each with R responses of T tokens."""

    B: int
    P: int
    R: int
    T: int


def stages(config: ConfigDict, lm: LanguageModel, mesh: Mesh) -> dict[str, Memory]:
    """The stages that train, at the longest prompts and titles that the config allows."""
    reference = config.align.reference == "in_step"
    return {
        "sft": stage(config, "sft", config.sft, lm, mesh, responses=1, reference=False),
        "align": stage(
            config, "align", config.align, lm, mesh, responses=1 + config.pairs.negatives, reference=reference
        ),
    }


def stage(
    config: ConfigDict,
    name: str,
    settings: ConfigDict,
    lm: LanguageModel,
    mesh: Mesh,
    *,
    responses: int,
    reference: bool,
) -> Memory:
    """One stage that trains by `settings` on prompts with `responses` responses and holds a frozen `reference` or not.

    Errors: UserError when the devices do not divide a batch.
    """
    m, e = config.model, config.evaluate
    sharding.check_batch(mesh, f"{name}.batch_size", settings.batch_size, settings.accumulate)
    sharding.check_batch(mesh, "evaluate.batch_size", e.batch_size)
    ways = sharding.ways(mesh)
    step = Work(settings.batch_size // settings.accumulate // ways, m.prompt_length, responses, m.response_length)
    score = Work(e.batch_size // ways, m.prompt_length, config.data.candidates, m.response_length)

    base, trainable = parameters(lm)
    learned = on_device(mesh, trainable)
    part = share(lm, mesh.shape["tensor"])
    block = dataclasses.replace(
        part, config=dataclasses.replace(part.config, layers=1, sliding=part.config.sliding[:1]), remat="none"
    )
    split = mesh.shape["fsdp"] > 1
    gathered = 2 * split * _bytes([x for path, x in _shapes(block).items() if path.startswith("blocks/")])
    head = part.config.vocabulary * part.config.width * jnp.dtype(lm.param_dtype).itemsize
    whole = head * (split or lm.param_dtype != lm.dtype)
    whole_gradient = head * (split and lm.lora is None)
    a_logit = 4 + 4 + jnp.dtype(lm.dtype).itemsize
    return Memory(
        base=on_device(mesh, base),
        trainable=learned,
        reference=reference * learned,
        optimizer=_optimizer(mesh, name, settings, trainable),
        gradients=learned * min(settings.accumulate, 2),
        kept=_kept(part, step),
        transient=max(_kept(block, step) + gathered, a_logit * _logits(part, step) + whole + whole_gradient),
        scoring=max(_kept(block, score), 4 * _logits(part, score) + whole) + gathered,
    )


def parameters(lm: LanguageModel) -> tuple[Shapes, Shapes]:
    """(frozen, trainable) parameters without their values."""
    shapes = _shapes(lm)
    learns = {path for path in shapes if lm.lora is None or lora.is_adapter(path)}
    return {p: x for p, x in shapes.items() if p not in learns}, {p: shapes[p] for p in learns}


def on_device(mesh: Mesh, params: Shapes) -> int:
    """Bytes of one device's shards."""
    return sum(shard_bytes(sharding.parameter_sharding(mesh, path, x.shape), x) for path, x in params.items())


def share(lm: LanguageModel, ways: int) -> LanguageModel:
    """What one of `ways` devices along `tensor` computes: its heads, MLP units and vocabulary, at full width."""

    def cut(size: int) -> int:
        return size // ways if size % ways == 0 else size

    c = lm.config
    heads = cut(c.heads)
    kv_heads = math.gcd(cut(c.kv_heads), heads)
    cut_mlp, cut_vocabulary = cut(c.mlp_width), cut(c.vocabulary)
    config = dataclasses.replace(c, heads=heads, kv_heads=kv_heads, mlp_width=cut_mlp, vocabulary=cut_vocabulary)
    return dataclasses.replace(lm, config=config)


@functools.cache
def _shapes(lm: LanguageModel) -> dict[str, jax.ShapeDtypeStruct]:
    return jax.eval_shape(lm.init, jax.random.key(0))


def _optimizer(mesh: Mesh, name: str, settings: ConfigDict, trainable: Shapes) -> int:
    transformation, _ = optimizer.make(settings, name, 1, 1)
    state = jax.eval_shape(functools.partial(init_state, transformation=transformation), trainable)
    layout = loop.state_sharding(mesh, state)
    return sum(map(shard_bytes, jax.tree.leaves(layout.optimizer), jax.tree.leaves(state.optimizer)))


@functools.cache
def _kept(lm: LanguageModel, work: Work) -> int:
    """Bytes that the pull-back of `states` holds, parameters and batch left out."""

    def held(trainable, base, batch):
        _, pull = jax.vjp(lambda p: lm.states({**base, **p}, *batch), trainable)
        inputs = {id(x) for x in jax.tree.leaves((trainable, base, batch))}
        return list({id(x): x for x in jax.tree.leaves(pull) if id(x) not in inputs}.values())

    lm = dataclasses.replace(lm, unrolled=False)  # written out, what layers share would be counted once a layer
    base, trainable = parameters(lm)
    B, P, R, T = work
    shape = jax.ShapeDtypeStruct
    batch = shape((B, P), jnp.int32), shape((B, P), jnp.bool), shape((B, R, T), jnp.int32)
    return _bytes(jax.eval_shape(held, trainable, base, batch))


def _logits(lm: LanguageModel, work: Work) -> int:
    """How many logits there are at once: those behind the first token of each response, or a chunk of them."""
    positions = work.R * (work.T - 1)
    return work.B * min(positions, lm.logits_chunk or positions) * lm.config.vocabulary


def _bytes(arrays: list[Any]) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)


def shard_bytes(where: NamedSharding, x: Any) -> int:
    """Bytes that one device holds of an array."""
    shape: tuple[int, ...] = where.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize
