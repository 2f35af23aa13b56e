"""DPO updates by our step, one for every request: `python ours_dpo.py SETTINGS.json`, asked by benchmarks/peers.py.

An update's time runs from its batch in host memory to its loss in host memory. It is compiled before memory is watched,
from shapes alone, so that the growth of the process is what training needs.
"""

import functools
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from worker import Clock, Memory, requests

from rosepo_jax import config as defaults
from rosepo_jax.__main__ import keep_freed_memory
from rosepo_jax.data import layouts
from rosepo_jax.data.prompts import pad
from rosepo_jax.models import checkpoints_hf, peft
from rosepo_jax.models.lora import is_adapter
from rosepo_jax.preference import objectives
from rosepo_jax.preference.smoothing import Smoothing
from rosepo_jax.stages import align
from rosepo_jax.training import flops, optimizer, policy, sharding
from rosepo_jax.training.step import init_state, train_step

UPDATES = 1000  # of the run whose layouts are chosen


def make_batch(rows: list[dict], T: int) -> dict:
    """The rows as one update of a run of such rows lays them out."""
    B, R = len(rows), len(rows[0]["responses"])
    tokens, mask = pad([response for row in rows for response in row["responses"]], T, 0)
    known = {
        "row_B": np.arange(B, dtype=np.int32),
        "update_B": np.zeros(B, np.int32),
        "epsilon_BxK": np.zeros((B, R - 1), np.float32),
    }
    prompts = [row["prompt"] for row in rows]
    encoded = layouts.Encoded(prompts, tokens.reshape(B, R, T), mask.reshape(B, R, T), known)
    prompt_B, fed_B = encoded.lengths
    limit = layouts.Part(B, int(prompt_B.max()), R * (T - 1))
    chosen = layouts.choose(prompt_B[None, None], fed_B[None, None], accumulate=1, updates=UPDATES, limit=limit)
    number = layouts.first_fit(chosen, prompt_B[None], fed_B[None])
    return layouts.lay_out(chosen[number], encoded, pad_id=0)


class Ours:
    def __init__(self, s: dict):
        config = checkpoints_hf.read_config(s["model"])
        lora = peft.read_config(s["adapter"]) if s["adapter"] else None
        c = defaults.default()
        c.model.update(
            dtype=s["dtype"], param_dtype=s["dtype"], remat="full" if s["remat"] else "none",
            prompt_length=max(len(row["prompt"]) for row in s["rows"]),
        )  # fmt: skip
        one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
        lm = policy.language_model(c.model, config, lora, one)
        self.batch = make_batch(s["rows"], s["T"])
        settings = dict(clip=s["clip"], schedule="constant", warmup="0 steps", weight_decay=0.0)
        settings |= dict(learning_rate=s["learning_rate"], batch_size=len(s["rows"]))
        transformation, schedule = optimizer.make(ConfigDict(settings), "align", UPDATES, len(s["rows"]))
        task = align.task(lm, objectives.OBJECTIVES["dpo"], Smoothing("none"), None, "stored", seed=0)

        def split(params):
            learns = {path: x for path, x in params.items() if lora is None or is_adapter(path)}
            base = {path: x for path, x in params.items() if path not in learns}
            # The reference is the base alone: an adapter of zeros. Its buffers are its own, the state's are donated.
            reference = {path: jnp.zeros_like(x) if "lora_b" in path else jnp.copy(x) for path, x in learns.items()}
            return learns, {"base": base, "reference": reference, "oracle": {}}

        shapes = jax.eval_shape(lm.init, jax.random.key(0))
        learns, frozen = jax.eval_shape(split, shapes)
        state = jax.eval_shape(functools.partial(init_state, transformation=transformation), learns)
        step = jax.jit(functools.partial(train_step, task, transformation, schedule, 1), donate_argnums=0)
        self.step = step.lower(state, frozen, self.batch).compile()
        self.logps = jax.jit(task.forward).lower(learns, frozen, self.batch).compile()
        self.memory = Memory()
        params = jax.device_put(checkpoints_hf.read(s["model"], config, s["dtype"]))
        if lora is not None:
            params |= peft.read(s["adapter"], config, lora)
        learns, self.frozen = split(params)
        self.state = init_state(learns, transformation)
        forward = flops.work(config, self.batch["parts"])
        self.flops = flops.update(config, lora, forward, reference=True)

    def answer(self, request: dict) -> dict:
        return getattr(self, f"do_{request['do']}")()

    def do_step(self) -> dict:
        """One update and its loss."""
        clock = Clock()
        self.state, metrics = self.step(self.state, self.frozen, jax.device_put(self.batch))
        loss = float(metrics["loss"])
        return {**clock.stop(), "loss": loss}

    def do_logps(self) -> dict:
        """[B, R] log-probs of the policy as it is, rows in their order."""
        logps_BxR = np.asarray(self.logps(self.state.trainable, self.frozen, self.batch))
        return {"logps": logps_BxR[np.argsort(self.batch["row_B"])].tolist()}

    def do_memory(self) -> dict:
        analysis = self.step.memory_analysis()
        names = ("argument", "temp", "output")
        planned = sum(getattr(analysis, f"{name}_size_in_bytes") for name in names) - analysis.alias_size_in_bytes
        device = jax.devices()[0]
        if device.platform == "cpu":
            return {**self.memory.peak(), "planned": planned}
        peak = device.memory_stats()["peak_bytes_in_use"]
        return {"growth": peak, "process": peak, "planned": planned}

    def do_work(self) -> dict:
        processed, useful = layouts.tokens(self.batch)
        return {"flops": self.flops, "processed": processed, "useful": useful}


def matmul_ceiling(dtype: str, size: int) -> float:
    """FLOP/s of matrix products: the best of some large shapes, by XLA and on a CPU also by numpy's BLAS."""
    best = 0.0
    for m, k, n in ((size, size, size), (2 * size, size // 2, 2 * size), (size, 4 * size, size // 2)):
        host = [np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((m, k), (k, n))]
        device = [jnp.asarray(x, dtype) for x in host]
        ways = [(jax.jit(jnp.matmul), device)]
        if jax.devices()[0].platform == "cpu" and dtype == "float32":
            ways.append((np.matmul, host))
        for product, (a, b) in ways:
            jax.block_until_ready(product(a, b))
            for _ in range(4):
                started = time.perf_counter()
                jax.block_until_ready(product(a, b))
                best = max(best, 2 * m * k * n / (time.perf_counter() - started))
    return best


def main() -> None:
    asked, answer = requests()
    keep_freed_memory()  # as the command line does before it trains
    s = json.loads(pathlib.Path(sys.argv[1]).read_text())
    ours = Ours(s)
    for request in asked:
        if request["do"] == "matmul":
            answer(flops=matmul_ceiling(s["dtype"], s["matmul"]))
        else:
            answer(**ours.answer(request))


if __name__ == "__main__":
    main()
