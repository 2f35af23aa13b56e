"""The shared-prefix preference step against one padded sequence of P + T tokens per response.

python benchmarks/step.py [--R=2,4,16] [--P=256] [--T=12] [--repeats=5] [--record]

All variants run the same step (LoRA, float32, reference and policy forward, gradient, AdamW) with the same parameters
and data, interleaved in one process; only the forward pass differs:

    shared      one prompt with R responses (rosepo_jax.preference.logprobs)
    everywhere  R sequences per prompt, vocabulary logits at all positions: what preference trainers usually do
    responses   R sequences per prompt, vocabulary logits at response positions only: the tougher baseline

One JSON line per figure. Time: the median over repeats of baseline / shared within one repeat, and its range; by the
clock, and by processor time, which a busy machine disturbs less. Memory: temporary bytes of the compiled step, baseline
over shared. Difference: the largest, relative to the largest magnitude, of log-probs, and of each gradient array.
"""

import argparse
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import record

from rosepo_jax import seeds
from rosepo_jax.__main__ import keep_freed_memory
from rosepo_jax.models import attention
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.models.lora import LoRAConfig, is_adapter
from rosepo_jax.preference import objectives
from rosepo_jax.preference.logprobs import response_logps
from rosepo_jax.training.step import Task, gradients, init_state, train_step

DECODER = DecoderConfig(vocabulary=8192, width=256, layers=4, heads=4, kv_heads=2, head_dim=64, mlp_width=768)
TARGETS = {  # baseline `everywhere` over shared, at the default P and T
    "time": {2: 2.0, 4: 4.0, 16: 12.0},
    "memory": {2: 1.9, 4: 3.5, 16: 9.0},
}
TOLERANCE = 1e-5
BASELINES = ("everywhere", "responses")


class Concatenated(LanguageModel):
    """The same decoder over whole sequences, prompt and response joined."""

    def sequence_logps(self, params, batch, *, everywhere: bool) -> jax.Array:
        """logps_BxR from sequence_BxRxS with S = P + T, full causal attention in each."""
        module = self._module(params)
        B, R, S = batch["sequence_BxRxS"].shape
        T = batch["response_BxRxT"].shape[2]
        tokens = batch["sequence_BxRxS"].reshape(B * R, S)

        def attend(window, _, query, key, value):
            return attention.causal(query, key, value, **self.config.scores, window=window), None

        position = jnp.broadcast_to(jnp.arange(S)[None], tokens.shape)
        x, _ = module.layers(self._embed(module, tokens), position, attend, remat=self.remat)
        first = jnp.repeat(batch["prompt_mask_BxP"].sum(axis=1), R) - 1  # predicts the first response token
        mask = batch["response_mask_BxRxT"].reshape(B * R, T)
        if everywhere:
            label, x = tokens[:, 1:], x[:, :-1]
            offset = jnp.arange(S - 1)[None] - first[:, None]
            mask = (offset >= 0) & (offset < mask.sum(axis=1, keepdims=True))
        else:
            label = batch["response_BxRxT"].reshape(B * R, T)
            x = jnp.take_along_axis(x, (first[:, None] + jnp.arange(T)[None])[..., None], axis=1)
        logits = module.logits(module.norm(x))
        logps = jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
        return jnp.where(mask, logps, 0.0).sum(axis=-1).reshape(B, R)


Logps = Callable[[Any, Any], jax.Array]


def variants(decoder: DecoderConfig) -> dict[str, Logps]:
    """Name -> logps(params, batch), [B, R]."""
    lora = LoRAConfig(rank=8, alpha=16.0, targets="attention/.*|mlp/.*")
    shared, joined = LanguageModel(decoder, lora), Concatenated(decoder, lora)

    def shared_logps(params, batch):
        names = ("prompt_BxP", "prompt_mask_BxP", "response_BxRxT", "response_mask_BxRxT")
        return response_logps(shared, params, *(batch[name] for name in names))

    return {
        "shared": shared_logps,
        "everywhere": functools.partial(joined.sequence_logps, everywhere=True),
        "responses": functools.partial(joined.sequence_logps, everywhere=False),
    }


def preference_task(logps: Logps) -> Task:
    """DPO without smoothing over K = R - 1 rejected responses; reference and policy share the base."""
    objective = objectives.Objective()

    def forward(trainable, frozen, batch):
        return logps({**frozen["base"], **trainable}, batch)

    def constants(frozen, batch):
        return logps({**frozen["base"], **frozen["reference"]}, batch)

    def loss(logps_BxR, reference_BxR, batch):
        counts_BxR = batch["response_mask_BxRxT"].sum(axis=-1)
        epsilon_BxK = jnp.zeros_like(logps_BxR[:, 1:])
        real_B = jnp.ones(logps_BxR.shape[0], bool)
        return objectives.preference_loss(objective, logps_BxR, reference_BxR, counts_BxR, epsilon_BxK, real_B)

    return Task(forward, constants, loss)


def parameters(decoder: DecoderConfig) -> tuple[dict, dict]:
    """(trainable, frozen): an adapter with an effect, and a base with a slightly different reference adapter."""
    lora = LoRAConfig(rank=8, alpha=16.0, targets="attention/.*|mlp/.*")
    params = LanguageModel(decoder, lora).init(jax.random.key(0))
    base = {path: value for path, value in params.items() if not is_adapter(path)}
    rng = seeds.generator("benchmark", "adapter")
    adapter = {
        path: value if path.endswith("lora_a") else jnp.asarray(rng.normal(0, 0.05, value.shape), value.dtype)
        for path, value in params.items()
        if is_adapter(path)
    }
    return adapter, {"base": base, "reference": {path: 0.9 * value for path, value in adapter.items()}}


def random_batch(vocabulary: int, B: int, P: int, R: int, T: int) -> dict[str, jax.Array]:
    """Prompts of P/2..P tokens and responses of T/2..T, as shared-prefix arrays and as joined sequences."""
    rng = seeds.generator("benchmark", "batch", B, P, R, T)
    prompt_BxP = rng.integers(3, vocabulary, (B, P)).astype(np.int32)
    response_BxRxT = rng.integers(3, vocabulary, (B, R, T)).astype(np.int32)
    prompt_length_B = rng.integers(P // 2, P + 1, B)
    response_length_BxR = rng.integers(max(T // 2, 1), T + 1, (B, R))
    sequence_BxRxS = np.zeros((B, R, P + T), np.int32)
    for b, p in enumerate(prompt_length_B):
        for r, t in enumerate(response_length_BxR[b]):
            sequence_BxRxS[b, r, : p + t] = [*prompt_BxP[b, :p], *response_BxRxT[b, r, :t]]
    batch = {
        "prompt_BxP": prompt_BxP,
        "prompt_mask_BxP": np.arange(P)[None] < prompt_length_B[:, None],
        "response_BxRxT": response_BxRxT,
        "response_mask_BxRxT": np.arange(T) < response_length_BxR[..., None],
        "sequence_BxRxS": sequence_BxRxS,
    }
    return jax.tree.map(jnp.asarray, batch)


class Compiled(NamedTuple):
    step: Callable
    state: Any
    temporary_bytes: int
    text: str


def compile_step(logps: Logps, trainable, frozen, batch) -> Compiled:
    transformation, schedule = optax.adamw(1e-4), optax.constant_schedule(1e-4)
    state = init_state(trainable, transformation)
    step = functools.partial(train_step, preference_task(logps), transformation, schedule, 1)
    compiled = jax.jit(step).lower(state, frozen, batch).compile()
    return Compiled(compiled, state, compiled.memory_analysis().temp_size_in_bytes, compiled.as_text())


def seconds(compiled: Compiled, frozen, batch) -> tuple[float, float]:
    """One step: (seconds by the clock, processor seconds of all threads)."""
    started = time.perf_counter(), time.process_time()
    jax.block_until_ready(compiled.step(compiled.state, frozen, batch))
    return time.perf_counter() - started[0], time.process_time() - started[1]


def differences(logps: dict[str, Logps], trainable, frozen, batch) -> Iterator[dict[str, Any]]:
    """Largest relative differences of the baselines' log-probs and gradients from the shared-prefix ones."""

    def evaluate(variant):
        return jax.jit(lambda p: (variant({**frozen["base"], **p}, batch), gradient(variant, p)))(trainable)

    def gradient(variant, params):
        return gradients(preference_task(variant), params, frozen, batch, 1)[0]

    ours = evaluate(logps["shared"])
    for name in BASELINES:
        theirs = evaluate(logps[name])
        for what, a, b in zip(("log-probs", "gradients"), ours, theirs):
            pairs = zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)))
            worst = max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)
            yield {"figure": f"relative difference of {what}", "against": name, "value": worst, "at most": TOLERANCE}


def measure(decoder: DecoderConfig, B: int, P: int, R: int, T: int, repeats: int) -> Iterator[dict[str, Any]]:
    """All figures of one R."""
    logps = variants(decoder)
    trainable, frozen = parameters(decoder)
    batch = random_batch(decoder.vocabulary, B, P, R, T)
    yield from differences(logps, trainable, frozen, batch)

    steps = {name: compile_step(variant, trainable, frozen, batch) for name, variant in logps.items()}
    for compiled in steps.values():
        seconds(compiled, frozen, batch)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, compiled in steps.items():
            taken[name].append(seconds(compiled, frozen, batch))
    clock = {name: np.array(values).T for name, values in taken.items()}  # [2, repeats]
    for kind, figure in enumerate(("time", "processor time")):
        for name in steps:
            yield {"figure": f"step {figure}", "variant": name, "unit": "s", **record.spread(clock[name][kind])}
        for name in BASELINES:
            ratios = clock[name][kind] / clock["shared"][kind]
            yield {"figure": figure, "against": name, "unit": "x", **record.spread(ratios)}
    for name in steps:
        megabytes = steps[name].temporary_bytes / 2**20
        yield {"figure": "temporary memory", "variant": name, "unit": "MiB", "value": megabytes}
    for name in BASELINES:
        ratio = steps[name].temporary_bytes / steps["shared"].temporary_bytes
        yield {"figure": "memory", "against": name, "unit": "x", "value": ratio}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--R", default="2,4,16", help="numbers of responses")
    parser.add_argument("--P", type=int, default=256, help="prompt tokens")
    parser.add_argument("--T", type=int, default=12, help="response tokens")
    parser.add_argument("--B", type=int, default=4, help="prompts in a batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/RESULTS.md")
    args = parser.parse_args(argv)
    keep_freed_memory()  # as the command line does before it trains
    rows = []
    for R in map(int, args.R.split(",")):
        for row in measure(DECODER, args.B, args.P, R, args.T, args.repeats):
            target = TARGETS.get(row["figure"], {}).get(R) if row.get("against") == "everywhere" else None
            rows.append({"R": R, **row} | ({} if target is None else {"at least": target}))
            print(json.dumps(rows[-1]), flush=True)
    if args.record:
        given = sys.argv[1:] if argv is None else argv
        record.append(" ".join(["python benchmarks/step.py", *given]), rows)
    return 0 if all(met(row) for row in rows) else 1


def met(row: dict[str, Any]) -> bool:
    return row.get("at least", row["value"]) <= row["value"] <= row.get("at most", row["value"])


if __name__ == "__main__":
    sys.exit(main())
