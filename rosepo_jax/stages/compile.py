"""`compile`: the programs of a run, compiled for accelerators that this machine does not have, and what they need.

    sft, align   the training step of the stage, its state donated, as `training.loop` runs it
    score        the log-probabilities of a batch of candidate lists (`decoding.rank`)
    search       the beam search over the catalogue (`decoding.beam`)

Nothing is loaded: parameters, optimiser state and batches are shapes with shardings. Batches have the longest prompts
and titles that the config allows. The catalogue is made up: `--items` titles of random tokens.

Read from the compiled program: memory (arguments, temporaries, output that takes no argument's place, code), the
kernels that are called, the collectives (`training.hlo`). Counted by formula: FLOPs (`training.flops`). The beam search
is counted at its longest, as many rounds as a title may have tokens. `score` also runs as the validation of training;
the optimiser state and the reference, which stay on the device then, are counted beside it.

The step time is a bound from below, the largest of

    compute   FLOPs / peak
    memory    (arguments + output + (r - 1) weights) / bandwidth: each of r passes over the layers reads all kernels
              that the device computes with; activations are left out
    links     the collectives one after the other, each as a ring (`hardware.seconds`)

as if the other two were hidden behind it, with the peaks of `training.hardware`. No GPU is here to time kernels on, so
matrix products are cuBLAS's; a run chooses among more, which changes neither shapes nor collectives.
"""

import argparse
import dataclasses
import functools
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from rosepo_jax import files, seeds
from rosepo_jax.data import layouts
from rosepo_jax.data.layouts import Encoded, Part
from rosepo_jax.decoding import rank
from rosepo_jax.decoding.beam import beam_search
from rosepo_jax.decoding.trie import Trie, compile_trie
from rosepo_jax.errors import UserError, nearest
from rosepo_jax.models import sasrec
from rosepo_jax.models.decoder import LanguageModel
from rosepo_jax.preference import objectives
from rosepo_jax.preference.smoothing import Smoothing
from rosepo_jax.stages import align, doctor, sft
from rosepo_jax.training import flops, hardware, hlo, loop, memory, optimizer, policy, sharding
from rosepo_jax.training.step import Task, init_state, train_step

GIB = 2**30
PROGRAMS = ("sft", "align", "score", "search")
UPDATES = 1000  # of the schedules: a number in the program, no shape


@dataclasses.dataclass(frozen=True)
class Plan:
    """A program to compile, and what is known of it without that."""

    function: Any  # jitted
    arguments: tuple
    settings: Mapping[str, Any]  # keyword arguments
    flops: float  # of one device
    reads: int  # how often the kernels are read
    rounds: int = 1  # of a loop that ends when it will, at most
    beside: int = 0  # bytes that are no arguments but stay on the device meanwhile


@dataclasses.dataclass(frozen=True)
class Found:
    """What a compiled program says of one device, memory in bytes. One that does not compile for want of memory has no
    more than its total."""

    total: int
    arguments: int = 0
    temporaries: int = 0
    output: int = 0
    code: int = 0
    beside: int = 0
    flops: float = 0.0
    kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)  # name -> places that call it
    collectives: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # kind -> count, bytes
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)  # compute, memory, links: at least
    compile_seconds: float = 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compiles the programs of a run for accelerators that are not here, and prints what they need. Exit status 1 "
        "where one does not fit. `bash launch/compile_env.sh tpu` (or gpu) makes an environment with the compiler."
    )
    parser.add_argument(
        "--topology",
        required=True,
        help="v5e:4x4, v5p:2x2x4, v6e:16x16; two slices: 2xv5e:8x16; h200:1x4x8 (slices x hosts x GPUs); cpu:8",
    )
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="default: %(default)s")
    parser.add_argument(
        "--items", type=int, default=10_000, help="titles of the made-up catalogue, default %(default)s"
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")


def main(config: ConfigDict, args: argparse.Namespace) -> int:
    jax.config.update("jax_platforms", "cpu")  # look for no accelerator
    names = args.programs.split(",")
    for name in names:
        if name not in PROGRAMS:
            raise UserError(f"--programs: no program {name!r}{nearest(name, PROGRAMS)}")
    if args.items < 1:
        raise UserError(f"--items={args.items}: a catalogue has at least one title")
    target = hardware.target(args.topology)
    mesh = hardware.mesh(config.mesh, target.devices)
    limit = memory.HARDWARE.get(target.kind) or _host_memory() // mesh.size
    plans, weights = plan(config, mesh, args.items)
    found = {name: measure(plans[name], target, mesh, weights) for name in names}

    sizes = " x ".join(f"{size} {axis}" for axis, size in mesh.shape.items())
    print(f"{args.config} on {args.topology}: {mesh.size} devices ({sizes})\n\n{table(found, limit)}\n")
    if args.json:
        programs = {name: dataclasses.asdict(x) for name, x in found.items()}
        record = {"config": args.config, "topology": args.topology, "memory": limit, "programs": programs}
        files.write_json(args.json, record)
    lacks = {name: x.total - memory.USABLE * limit for name, x in found.items() if x.total > memory.USABLE * limit}
    if target.kind in memory.GPUS and not lacks and max(x.total for x in found.values()) > 0.75 * limit:
        print("(JAX takes 75 % of a GPU unless told otherwise: export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95)")
    for name, lack in lacks.items():
        print(f"problem: {name} lacks {lack / GIB:.2f} GiB on each device", file=sys.stderr)
    return 1 if lacks else 0


# ---- What is compiled: the functions of the stages, on shapes --------------------------------------------------------


def plan(config: ConfigDict, mesh: Mesh, items: int) -> tuple[dict[str, Plan], int]:
    """The programs of a run on `mesh`, and the bytes of the kernels that one device computes with.

    Errors: UserError where the devices do not divide a batch, or the config asks for what there is not.
    """
    for name in ("sft", "align"):
        sharding.check_batch(mesh, f"{name}.batch_size", config[name].batch_size, config[name].accumulate)
    sharding.check_batch(mesh, "evaluate.batch_size", config.evaluate.batch_size)
    shape = doctor.planned_model(config)
    lm = policy.language_model(config.model, shape.config, shape.lora, mesh)
    base, trainable = (
        {path: _abstract(x, sharding.parameter_sharding(mesh, path, x.shape)) for path, x in part.items()}
        for part in memory.parameters(lm)
    )
    training = _training(config, lm, mesh, base, trainable, items)
    beside = max(
        _held((state.optimizer, frozen.get("reference")))
        for state, frozen, _ in (x.arguments for x in training.values())
    )
    share = memory.parameters(memory.share(lm, mesh.shape["tensor"]))
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(share))
    return training | _decoding(config, lm, mesh, {**base, **trainable}, items, beside), weights


def _training(
    config: ConfigDict, lm: LanguageModel, mesh: Mesh, base: Any, trainable: Any, items: int
) -> dict[str, Plan]:
    """The steps of SFT and of alignment, whose oracle knows `items` items."""
    m, a, o = config.model, config.align, config.oracle
    R, N, cached = 1 + config.pairs.negatives, config.data.history, a.reference == "cached"

    def step(name: str, task: Task, frozen: Any, known: Mapping[str, tuple[int, Any]], R: int, forwards: int) -> Plan:
        """`forwards`: passes over the layers beside the policy's own."""
        settings = config[name]
        transformation, schedule = optimizer.make(settings, name, UPDATES, UPDATES * settings.batch_size)
        state = jax.eval_shape(functools.partial(init_state, transformation=transformation), trainable)
        layout = loop.state_sharding(mesh, state)
        function = jax.jit(
            functools.partial(train_step, task, transformation, schedule, settings.accumulate, spike=settings.spike),
            donate_argnums=0,
            out_shardings=(layout, None),
        )
        batch = _longest_batch(mesh, settings.batch_size, m.prompt_length, R, m.response_length, known)
        return Plan(
            function,
            (jax.tree.map(_abstract, state, layout), frozen, batch),
            {},
            flops.of_batch(lm, batch, reference=name == "align" and not cached) / mesh.size,
            settings.accumulate * (2 + (m.remat != "none") + forwards),
        )

    scorer = sasrec.SASRecConfig(items, N, o.width, o.layers, o.heads, o.dropout)
    scorer_params = jax.eval_shape(functools.partial(sasrec.init, scorer), jax.random.key(0))
    frozen = {
        "base": base,
        "reference": {} if cached else trainable,
        "oracle": _abstract(scorer_params, sharding.replicated(mesh)),
    }
    known = {"history_BxN": (N, np.int32), "item_BxR": (R, np.int32), "epsilon_BxK": (R - 1, np.float32)}
    known |= {"reference_BxR": (R, np.float32)} if cached else {}
    factor = Smoothing(objectives.smoothing_mode(a), a.smoothing.temperature or 1.0, a.smoothing.cap, a.smoothing.value)
    aligning = align.task(
        lm, objectives.objective(a), factor, scorer, a.smoothing.source, seeds.key(config.seed, "align")
    )
    ahead = aligning.coupled and a.accumulate > 1
    return {
        "sft": step("sft", sft.task(lm, seeds.key(config.seed, "sft", "dropout")), base, {}, 1, 0),
        "align": step("align", aligning, frozen, known, R, (not cached) + ahead),
    }


def _decoding(
    config: ConfigDict, lm: LanguageModel, mesh: Mesh, params: Any, items: int, beside: int
) -> dict[str, Plan]:
    """Candidate scoring, which training state may lie `beside`, and the beam search over `items` titles."""
    m, e = config.model, config.evaluate

    def asked(responses: int) -> tuple[Any, float]:
        """Prompts with so many responses, and the FLOPs of a pass over them."""
        batch = _longest_batch(mesh, e.batch_size, m.prompt_length, responses, m.response_length, {})
        work = flops.work(lm.config, batch["parts"])
        return batch["parts"][0], sum(flops.forward(lm.config, lm.lora, work)) / mesh.size

    listed, scoring = asked(config.data.candidates)
    beams, searching = asked(min(e.beams, items))  # each beam feeds as many tokens as a response has
    trie = made_up_trie(items, lm.config.vocabulary, m.response_length)
    rows = sharding.batch_sharding(mesh)
    settings = {
        **{name: beams[name] for name in ("prompt_BxP", "prompt_mask_BxP")},
        "excluded_BxX": jax.ShapeDtypeStruct((e.batch_size, config.data.history), np.int32, sharding=rows),
        "beams": e.beams,
        "k": e.top,
    }
    rounds = m.response_length - 1
    return {
        "score": Plan(rank.part_logps, (lm, params, listed), {}, scoring, 1, beside=beside),
        "search": Plan(
            beam_search,
            (lm, params, _abstract(trie, sharding.replicated(mesh))),
            settings,
            searching,
            1 + rounds,
            rounds=rounds,
        ),
    }


def made_up_trie(items: int, vocabulary: int, longest: int) -> Trie:
    """Titles of up to `longest` tokens with the end, some tokens much more frequent than others."""
    draw, eos = seeds.generator(0, "titles"), vocabulary - 1
    lengths = draw.integers(1, longest, items)
    lengths[0] = longest - 1
    tokens = (eos * draw.random(int(lengths.sum())) ** 4).astype(int).tolist()
    ends = np.cumsum(lengths).tolist()
    return compile_trie([[*tokens[end - length : end], eos] for end, length in zip(ends, lengths.tolist())], eos)


def _longest_batch(mesh: Mesh, B: int, P: int, R: int, T: int, known: Mapping[str, tuple[int, Any]]) -> dict[str, Any]:
    """A training batch in one part, as wide as the limits allow, with `known` figures: name -> (how many, dtype)."""
    figures = {name: np.zeros((B, size), dtype) for name, (size, dtype) in known.items()}
    figures |= dict.fromkeys(("row_B", "update_B"), np.zeros(B, np.int32))
    full = Encoded([[0] * P] * B, np.zeros((B, R, T), np.int32), np.ones((B, R, T), bool), figures)
    return _abstract(layouts.lay_out((Part(B, P, R * (T - 1)),), full, 0), sharding.batch_sharding(mesh))


def _abstract(tree: Any, where: NamedSharding) -> Any:
    """Shapes instead of arrays, all lying alike."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=where), tree
    )


def _held(tree: Any) -> int:
    """Bytes of one device's shards."""
    shapes = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct))
    return sum(memory.shard_bytes(x.sharding, x) for x in shapes)


# ---- What the compiled programs say ----------------------------------------------------------------------------------


def build(plan: Plan, target: hardware.Target) -> jax.stages.Compiled:
    return plan.function.lower(*plan.arguments, **plan.settings).compile(dict(target.options))


def measure(plan: Plan, target: hardware.Target, mesh: Mesh, weights: int) -> Found:
    """Compiles; `weights` are the bytes of the kernels that one device computes with."""
    started = time.perf_counter()
    try:
        compiled = build(plan, target)
    except jax.errors.JaxRuntimeError as error:
        if (wanted := _wanted(str(error), _held((plan.arguments, plan.settings)))) is None:
            raise
        return Found(wanted + plan.beside)
    spent = time.perf_counter() - started
    found, text = compiled.memory_analysis(), compiled.as_text()
    assert found is not None and text is not None
    output = found.output_size_in_bytes - found.alias_size_in_bytes
    parts = {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "output": output,
        "code": found.generated_code_size_in_bytes,
        "beside": plan.beside,
    }
    program = hlo.parse(text)
    exchanges = hlo.collectives(program, plan.rounds)
    counts: dict[str, tuple[int, int]] = {}
    for x in exchanges:
        count, size = counts.get(x.kind, (0, 0))
        counts[x.kind] = count + x.times, size + x.times * x.bytes
    return Found(
        sum(parts.values()),
        **parts,
        flops=plan.flops,
        kernels=dict(hlo.kernels(program)),
        collectives=counts,
        seconds=bounds(plan, parts, weights, exchanges, target.kind, mesh),
        compile_seconds=spent,
    )


def bounds(
    plan: Plan, parts: Mapping[str, int], weights: int, exchanges: list[hlo.Collective], kind: str, mesh: Mesh
) -> dict[str, float]:
    """The three times that a step takes at least; none where the speed of a device is not known."""
    if kind not in hardware.SPEEDS:
        return {}
    speed = hardware.SPEEDS[kind]
    domain_N = np.array([hardware.domain(device) for device in mesh.devices.flat])
    return {
        "compute": plan.flops / (flops.peak(mesh.devices.flat[0]) or math.inf),
        "memory": (parts["arguments"] + parts["output"] + (plan.reads - 1) * weights) / speed.memory,
        "links": sum(hardware.seconds(x, domain_N, speed) for x in exchanges),
    }


def _wanted(error: str, arguments: int) -> int | None:
    """The bytes that a program would need, from the compiler's refusal; None where the error is another.

    The TPU compiler gives up early when temporaries alone are too many, and late, with the total, for the rest.
    """
    total = re.search(r"Used ([\d.]+)([KMG]) of", error)
    temporaries = re.search(r"HLO temporaries \(([\d.]+)([KMG])\)", error)
    if not (found := total or temporaries):
        return None
    size = int(float(found[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[found[2]])
    return size if total else size + arguments


def table(found: Mapping[str, Found], limit: float) -> str:
    """The figures of one device as a Markdown table, a column a program."""

    def gib(part: str, x: Found) -> str:
        return f"{getattr(x, part) / GIB:.2f}"

    def fits(x: Found) -> str:
        return f"{x.total / limit:.0%}" + ("" if x.total <= memory.USABLE * limit else ", does not fit")

    def exchanged(kind: str, x: Found) -> str:
        count, size = x.collectives.get(kind, (0, 0))
        return f"{count:,} x, {size / GIB:,.2f} GiB" if count else "–"

    def kernels(x: Found) -> str:
        return ", ".join(f"{name} x {places}" for name, places in x.kernels.items()) or "xla"

    def at_least(x: Found) -> str:
        return f"{max(x.seconds.values()):.3g} s ({max(x.seconds, key=x.seconds.__getitem__)})" if x.seconds else "–"

    parts = ("arguments", "temporaries", "output", "code", "beside", "total")
    kinds = [kind for kind in hlo.COLLECTIVES if any(kind in x.collectives for x in found.values())]
    rows: dict[str, Callable[[Found], str]] = {
        **{f"{part}, GiB": functools.partial(gib, part) for part in parts},
        f"of {limit / GIB:.2f} GiB": fits,
        "TFLOPs": lambda x: f"{x.flops / 1e12:,.{0 if x.flops > 1e14 else 2}f}",
        "attention kernel": kernels,
        **{kind: functools.partial(exchanged, kind) for kind in kinds},
        "step time, at least": at_least,
        "compiled in": lambda x: f"{x.compile_seconds:.0f} s",
    }
    lines = [["one device", *found], ["---"] * (1 + len(found))]
    for name, show in rows.items():
        known = (x.arguments or name.startswith(("total", "of ")) for x in found.values())
        lines.append([name, *(show(x) if is_known else "–" for x, is_known in zip(found.values(), known))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
