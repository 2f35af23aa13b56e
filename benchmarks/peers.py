"""One DPO update, ours beside TRL's and Tunix's: pairs a second, memory, and whether they compute the same.

python benchmarks/peers.py [--K=1,3,15] [--repeats=3] [--record]     15 M parameters, a CPU
python benchmarks/peers.py --gpu --shape=1b|8b [--record]             bfloat16, a GPU
python benchmarks/peers.py --shape=tiny --dtype=bfloat16 --remat      dry run of the latter

All start from the same random llama in a Hugging Face directory with the same LoRA adapter, take the same pairs, and
train by AdamW with a clipped gradient, in the same precision, with or without rematerialisation alike. With K rejected
responses of a prompt ours is one row; for the others it is K pairs with the same prompt, which is their only way, as
many pairs at a time as there are prompts. Each runs in a process of its own (peer/*.py) and they take turns, an update
each: allocators, threads and memory of one do not touch the other's.

    trl               DPOTrainer as it comes: vocabulary logits at every position
    trl, logits kept  with use_logits_to_keep: from the batch's first response token on
    tunix             DPOTrainer, where `bash launch/peer_env.sh tunix` made an environment with it

One JSON line per figure. Speed: medians over the updates after the first, and their range; ratios within a round.
Memory: how far resident memory peaks above what it was before any weight was read (libraries, and our compiled program,
not counted; on a GPU the peak of each allocator). The loss and all log-probs of the first update are compared, and the
losses of the others. Ceiling: the best of a few large matrix products in the same round; FLOPs by training/flops.py.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import record
from worker import Worker, peer, settle

from rosepo_jax import seeds
from rosepo_jax.models import checkpoints_hf, families, peft
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.models.lora import LoRAConfig, is_adapter

PEERS = pathlib.Path(__file__).parent / "peer"
ROPE = dict(rope_theta=1e6, rope_scaling=None)  # what Tunix computes, whatever its configuration says
STORIES = DecoderConfig(  # the shape of stories15M, a well-known small llama
    vocabulary=32000, width=288, layers=6, heads=6, kv_heads=6, head_dim=48, mlp_width=768, **ROPE
)
SHAPES = {
    "small": lambda: STORIES,
    "tiny": lambda: dataclasses.replace(STORIES, vocabulary=512, width=32, layers=2, heads=4, kv_heads=2, head_dim=8),
    "1b": lambda: dataclasses.replace(families.architecture("llama3.2-1b"), **ROPE),
    "8b": lambda: dataclasses.replace(families.architecture("llama3-8b"), **ROPE),
}
AT_LEAST = {False: {1: 4.0, 3: 10.0, 15: 30.0}, True: {1: 3.0, 3: 9.0, 15: 25.0}}  # pairs/s against trl, by gpu
MEMORY = {False: 1 / 2, True: 1 / 3}  # of trl's, K = 1
CEILING = {False: 0.60, True: 0.55}
LORA = LoRAConfig(rank=16, alpha=32.0, targets="attention/.*|mlp/.*")
WARM = 1  # updates that are not timed
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # relative, of the first update's loss and log-probs
LATER = 10  # times that, for losses of later updates: AdamW divides rounding by its own size


@dataclasses.dataclass(frozen=True)
class Run:
    """What is measured."""

    shape: str
    gpu: bool
    dtype: str
    tuning: str
    remat: bool
    B: int
    P: int
    T: int
    repeats: int
    systems: tuple[str, ...]
    tunix_python: str

    def command(self, system: str, settings: pathlib.Path) -> list[str]:
        python = self.tunix_python if system == "tunix" else sys.executable
        script = {"ours": "ours_dpo.py", "tunix": "tunix_dpo.py"}.get(system, "trl_dpo.py")
        return [python, str(PEERS / script), str(settings)]


def make_model(config: DecoderConfig, dtype: str, folder: pathlib.Path) -> None:
    """Random weights of standard deviation 1/sqrt(fan in)."""
    rng = seeds.generator("benchmark", "peers", "model")
    params: dict[str, Any] = {}
    for path, shape in checkpoints_hf.shapes(config).items():
        unit = rng.random(shape, np.float32) - np.float32(0.5)
        fan_in = shape[-1] if path == "embedding" else shape[-2] if path.endswith("kernel") else 0
        params[path] = (unit * (12 / fan_in) ** 0.5 if fan_in else 1 + unit / 2).astype(jnp.dtype(dtype))
    checkpoints_hf.write(folder, config, params, None, dtype)


def make_adapter(config: DecoderConfig, base: pathlib.Path, folder: pathlib.Path) -> None:
    """An adapter with an effect, so that policy and reference differ from the first update on."""
    rng = seeds.generator("benchmark", "peers", "adapter")
    shapes = jax.eval_shape(LanguageModel(config, LORA).init, jax.random.key(0))
    adapter = {
        path: (rng.standard_normal(x.shape, np.float32) * x.shape[-2] ** -0.5).astype(np.float32)
        for path, x in shapes.items()
        if is_adapter(path)
    }
    peft.write(folder, config, LORA, adapter, base=str(base))


def make_rows(vocabulary: int, B: int, P: int, T: int, K: int) -> list[dict[str, Any]]:
    """Prompts of P/2..P tokens; 1 + K responses of T/2..T."""
    rng = seeds.generator("benchmark", "peers", "rows", B, P, T, K)

    def text(longest: int) -> list[int]:
        return rng.integers(3, vocabulary, rng.integers(max(longest // 2, 1), longest + 1)).tolist()

    return [{"prompt": text(P), "responses": [text(T) for _ in range(1 + K)]} for _ in range(B)]


def measure(run: Run, folder: pathlib.Path, vocabulary: int, K: int) -> Iterator[dict[str, Any]]:
    """All figures of one K."""
    settings = dict(
        model=str(folder / "model"), adapter=str(folder / "adapter") if run.tuning == "lora" else "", gpu=run.gpu,
        rows=make_rows(vocabulary, run.B, run.P, run.T, K), T=run.T, micro=run.B, dtype=run.dtype, remat=run.remat,
        beta=0.1, learning_rate=1e-4, clip=1.0, matmul=8192 if run.gpu else 1536,
    )  # fmt: skip
    with ExitStack() as stack:
        workers = {}
        for system in run.systems:
            file = folder / f"{system} {K}.json"
            file.write_text(json.dumps(settings | {"logits_to_keep": system == "trl, logits kept"}))
            env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": "" if run.gpu else "cpu"}
            workers[system] = stack.enter_context(Worker(run.command(system, file), env))
        found: dict[str, list[dict[str, Any]]] = {system: [] for system in workers}
        ceilings = []
        logps_BxR = np.array(workers["ours"].ask(do="logps")["logps"])
        for number in range(WARM + run.repeats):
            for system, worker in workers.items():
                settle()
                found[system].append(worker.ask(do="step"))
            if number == WARM:
                memory = {system: worker.ask(do="memory") for system, worker in workers.items()}
            ceilings.append(workers["ours"].ask(do="matmul")["flops"] if number >= WARM else np.nan)
        work = workers["ours"].ask(do="work")
    yield from speed(run, K, found)
    yield from spent(run, K, memory)
    yield from agreement(run, K, found, logps_BxR)
    taken = np.array([step["seconds"] for step in found["ours"][WARM:]])
    used, ceiling = work["flops"] / taken, np.array(ceilings[WARM:])
    yield {"K": K, "figure": "matrix products", "unit": "GFLOP/s", **record.spread(ceiling / 1e9)}
    yield {"K": K, "figure": "ours", "unit": "GFLOP/s", **record.spread(used / 1e9)}
    share = {"K": K, "figure": "ours", "unit": "of matrix products", **record.spread(used / ceiling)}
    yield share | ({"at least": CEILING[run.gpu]} if run.shape != "tiny" else {})
    yield {"K": K, "figure": "ours: useful tokens", "unit": "share", "value": work["useful"] / work["processed"]}


def speed(run: Run, K: int, found: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    taken = {
        (system, kind): np.array([step[kind] for step in steps[WARM:]])
        for system, steps in found.items()
        for kind in ("seconds", "processor")
    }
    for system in found:
        yield {"K": K, "figure": system, "unit": "pairs/s", **record.spread(run.B * K / taken[system, "seconds"])}
    for system in list(found)[1:]:
        for kind, figure in (("seconds", "speed"), ("processor", "speed by processor time")):
            row = {"K": K, "figure": figure, "against": system, "unit": "x"}
            row |= record.spread(taken[system, kind] / taken["ours", kind])
            target = AT_LEAST[run.gpu].get(K) if (system, kind) == ("trl", "seconds") and run.shape != "tiny" else None
            yield row | ({} if target is None else {"at least": target})


def spent(run: Run, K: int, memory: dict[str, dict[str, int]]) -> Iterator[dict[str, Any]]:
    for system, bytes_of in memory.items():
        for kind, value in bytes_of.items():
            figure = {"growth": "memory", "process": "memory, whole process", "planned": "memory by XLA's plan"}[kind]
            yield {"K": K, "figure": figure, "system": system, "unit": "MiB", "value": value / 2**20}
    for system in list(memory)[1:]:
        ratio = memory["ours"]["growth"] / memory[system]["growth"]
        row = {"K": K, "figure": "memory", "against": system, "unit": "of theirs", "value": ratio}
        yield row | ({"at most": MEMORY[run.gpu]} if (system, K) == ("trl", 1) and run.shape != "tiny" else {})


def agreement(run: Run, K: int, found, logps_BxR: np.ndarray) -> Iterator[dict[str, Any]]:
    """Largest relative differences. A system that tells mean log-probs of chosen and rejected is compared by them."""
    pairs_Nx2 = np.stack(np.broadcast_arrays(logps_BxR[:, :1], logps_BxR[:, 1:]), axis=-1).reshape(-1, 2)
    for system in list(found)[1:]:
        loss_U, loss_of_U = (np.array([step["loss"] for step in found[name]]) for name in ("ours", system))
        logps_Nx2 = np.array(found[system][0]["logps"])
        ours_Nx2 = pairs_Nx2 if len(logps_Nx2) == len(pairs_Nx2) else pairs_Nx2.mean(axis=0, keepdims=True)
        for what, ours, theirs, tolerance in (
            ("log-probs", ours_Nx2, logps_Nx2, 1),
            ("the first loss", loss_U[:1], loss_of_U[:1], 1),
            ("later losses", loss_U[1:], loss_of_U[1:], LATER),
        ):
            error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
            row = {"K": K, "figure": f"relative difference of {what}", "against": system, "value": error}
            yield row | {"at most": tolerance * TOLERANCE[run.dtype]}


def met(row: dict[str, Any]) -> bool:
    value = row.get("value", 0.0)
    return row.get("at least", value) <= value <= row.get("at most", value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--K", default="1,3,15", help="numbers of rejected responses")
    parser.add_argument("--gpu", action="store_true", help="on the first GPU; bfloat16, P=512, T=16, --remat")
    parser.add_argument("--shape", choices=SHAPES, help="default: small, with --gpu 1b")
    parser.add_argument("--dtype", choices=TOLERANCE)
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--remat", action="store_true", help="layers are computed again in the backward pass")
    parser.add_argument("--B", type=int, default=4, help="prompts of an update")
    parser.add_argument("--P", type=int, help="prompt tokens")
    parser.add_argument("--T", type=int, help="response tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--tunix-python", default=peer("tunix"), help="of an environment with Tunix; default .venv-tunix's"
    )
    parser.add_argument("--alone", action="store_true", help="without TRL (and torch)")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/RESULTS.md")
    args = parser.parse_args(argv)
    if not args.alone and importlib.util.find_spec("trl") is None:
        parser.error("TRL is not installed; pip install -e .[parity], or add --alone")
    theirs = ("tunix",) if args.tunix_python else ()
    run = Run(
        shape=args.shape or ("1b" if args.gpu else "small"),
        gpu=args.gpu,
        dtype=args.dtype or ("bfloat16" if args.gpu else "float32"),
        tuning=args.tuning,
        remat=args.remat or args.gpu,
        B=args.B,
        P=args.P or (512 if args.gpu else 256),
        T=args.T or (16 if args.gpu else 12),
        repeats=args.repeats,
        systems=("ours",) if args.alone else ("ours", "trl", "trl, logits kept", *theirs),
        tunix_python=args.tunix_python,
    )
    if not args.gpu:
        jax.config.update("jax_platforms", "cpu")
    config, rows = SHAPES[run.shape](), []
    if not args.tunix_python:
        print(json.dumps({"figure": "tunix", "note": "left out: run `bash launch/peer_env.sh tunix`"}))
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        make_model(config, run.dtype, folder / "model")
        if run.tuning == "lora":
            make_adapter(config, folder / "model", folder / "adapter")
        for K in map(int, args.K.split(",")):
            for row in measure(run, folder, config.vocabulary, K):
                rows.append(row)
                print(json.dumps(row), flush=True)
    if args.record:
        given = sys.argv[1:] if argv is None else argv
        record.append(" ".join(["python benchmarks/peers.py", *given]), rows)
    return 0 if all(map(met, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
