"""The training loop of SFT and alignment."""

import contextlib
import functools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rosepo_jax import distributed
from rosepo_jax.errors import Preempted, UserError
from rosepo_jax.training import checkpoint, flops, goodput, optimizer, sharding
from rosepo_jax.training.metrics import Batch, MetricWriter, Throughput, peak_memory, progress
from rosepo_jax.training.profile import Profiler
from rosepo_jax.training.step import Task, TrainState, init_state, train_step


def train(
    *,
    name: str,
    clock: goodput.Clock,
    config: ConfigDict,
    settings: ConfigDict,
    out: pathlib.Path,
    mesh: Mesh,
    task: Task,
    trainable: Mapping[str, jax.Array],
    frozen: Any,
    rows: int,
    stream: Callable[..., Iterator[Batch]],
    validate: Callable[[Mapping[str, jax.Array]], dict[str, float]],
    first: Callable[[dict[str, float]], None] = lambda metrics: None,
    length: int | None = None,
    work: Callable[[Batch], float] | None = None,
) -> dict[str, float]:
    """Trains `trainable` for `settings.length` updates and leaves the best or the last parameters in `out`/model.

    `trainable` is used up: its buffers become the training state. `clock` began with the stage.

    `stream(start=, stop=)` yields this host's batches; `validate` gives metrics with "HR@1", the figure that chooses;
    `first` sees the metrics of the very first update; `work` counts the FLOPs of an update by its batch. Resumes from
    `out`/checkpoints. Returns the validation of what it leaves.
    """
    # ---- Set-up: length, optimiser, state -------------------------------------------------------------------------
    sharding.check_batch(mesh, f"{name}.batch_size", settings.batch_size, settings.accumulate)
    units = functools.partial(optimizer.steps, batch_size=settings.batch_size, rows=rows)
    total = length if length is not None else units(settings.length, f"{name}.length")
    every = {
        key: max(1, units(value, key, total=total))
        for key, value in (("checkpoint.every", config.checkpoint.every), (f"{name}.validate", settings.validate))
    }
    if settings.keep not in ("best", "last"):
        raise UserError(f"{name}.keep={settings.keep!r}: choose best or last")
    profiler = Profiler(config.log.profile, out / "profile")
    transformation, schedule = optimizer.make(settings, name, total, rows)
    initialise = functools.partial(init_state, transformation=transformation)
    layout = state_sharding(mesh, jax.eval_shape(initialise, trainable))
    state = jax.jit(initialise, out_shardings=layout, donate_argnums=0)(dict(trainable))

    # ---- Restore ---------------------------------------------------------------------------------------------------
    def kept_at(number: int) -> pathlib.Path:
        return out / "kept" / str(number)

    def lost_patience() -> bool:
        return 0 < settings.get("patience", 0) <= meta["stale"]

    checkpoints = checkpoint.Checkpoints(out / "checkpoints", config.checkpoint.keep)
    meta: dict[str, Any] = {"step": 0, "kept": None, "stale": 0, "held": []}
    if (found := checkpoints.restore(state)) is not None:
        state, meta = found
        handed_on = (out / "model").exists() and (meta["step"] == total or lost_patience())
        if not handed_on and not kept_at(meta["kept"]["step"]).exists():
            raise UserError(f"{kept_at(meta['kept']['step'])}: no such folder; {checkpoint.REDO}")
    writer = MetricWriter(out, tensorboard=config.log.tensorboard, resume_step=meta["step"] if found else -1)
    journal = goodput.Journal(out, clock)
    journal.line(meta["step"], always=True)

    # ---- Step: the state is donated, the frozen parameters never ---------------------------------------------------
    step = jax.jit(
        functools.partial(train_step, task, transformation, schedule, settings.accumulate, spike=settings.spike),
        donate_argnums=0,
        out_shardings=(layout, None),
    )
    peak = config.log.peak_flops or flops.peak(mesh.devices.flat[0])
    throughput = Throughput(clock, settings.batch_size, work, peak and peak * mesh.size)
    programs: dict[Any, jax.stages.Compiled] = {}
    compiled: dict[str, float] = {}  # how long it took, until a line says so

    def program(batch: Mapping[str, Any]) -> jax.stages.Compiled:
        """The step for batches of these shapes. Updates under way end before it is compiled: none takes that time."""
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes not in programs:
            jax.block_until_ready(state)
            with clock.spent("compile"):
                started = time.perf_counter()
                programs[shapes] = step.lower(state, frozen, batch).compile()
                compiled["compile_seconds"] = compiled.get("compile_seconds", 0.0) + time.perf_counter() - started
        return programs[shapes]

    def check(number: int, trainable: Mapping[str, jax.Array]) -> None:
        """Validates, and keeps the best parameters so far, or simply the latest; and those that checkpoints speak of,
        since a restart may begin from these."""
        jax.block_until_ready(trainable)
        with clock.spent("evaluation"):
            figures = validate(trainable)
        writer.scalars(number, {f"validation/{key}": value for key, value in figures.items()})
        better = meta["kept"] is None or figures["HR@1"] > meta["kept"]["HR@1"]
        meta["stale"] = 0 if better else meta["stale"] + 1
        if better or settings.keep == "last":
            with clock.spent("checkpoint"):
                checkpoint.save_params(kept_at(number), trainable)
                checkpoint.remove_others(out / "kept", {str(held) for held in (*meta["held"], number)})
            meta["kept"] = figures | {"step": number}

    # ---- Loop: while an update runs, the metrics of the one before it are read and the batch of the next one is sent
    if meta["step"] == 0 and meta["kept"] is None:
        check(0, state.trainable)
    late: tuple[int, dict[str, jax.Array], Batch] | None = None
    start = meta["step"]

    def report(item) -> None:
        """Writes the metrics of an update that has ended; counts and names what was skipped."""
        number, device_metrics, batch = item
        ids = batch["row_B"]
        throughput.count(batch)
        metrics = {key: float(value) for key, value in jax.device_get(device_metrics).items()}
        skipped = not metrics.pop("taken")
        if skipped:
            ids = sorted(map(int, ids))
            meta.setdefault("bad", []).append([number, *ids[:8]])
            what = f"{name}: update {number} skipped (loss {metrics['loss']:.4g}, gradient {metrics['grad_norm']:.4g})"
            print(f"{what}; its rows {' '.join(map(str, ids))}", file=sys.stderr, flush=True)
            if len(meta["bad"]) > settings.max_bad_steps:
                raise UserError(
                    f"{name}: {len(meta['bad'])} updates were skipped for a loss or gradient that is not finite, or a "
                    f"loss above {name}.spike, more than {name}.max_bad_steps={settings.max_bad_steps}; last at update "
                    f"{number}, rows {ids[:8]}"
                )
            metrics = {key: value for key, value in metrics.items() if math.isfinite(value)} | {"skipped": 1.0}
        elif number == 1:
            first(metrics)
        if number == start + 1:
            throughput.read()  # it filled the queues: no measure of speed
        if skipped or number == 1 or number % config.log.every == 0 or number == total:
            rates = throughput.read() if number > start + 1 else {}
            writer.scalars(number, metrics | rates | peak_memory(programs.values()) | compiled)
            compiled.clear()

    stop = start if lost_patience() else total
    with contextlib.ExitStack() as stack:
        stack.enter_context(distributed.deferred())
        stack.enter_context(clock.spent("step"))
        for closed in (writer, journal, checkpoints, profiler):
            stack.enter_context(contextlib.closing(closed))
        batches = clock.waiting(stream(start=start, stop=stop))
        for number, batch in zip(progress(range(start + 1, stop + 1), name), batches):
            on_device = sharding.to_device(mesh, batch)
            update = program(on_device)
            profiler.before(number)
            with jax.profiler.StepTraceAnnotation(name, step_num=number):
                state, metrics = update(state, frozen, on_device)
            profiler.after(number, metrics)
            distributed.alive()
            if late is not None:
                report(late)
                journal.line(number - 1)
            late = (number, metrics, batch)
            meta["step"] = number
            ended = number == total
            if number % every[f"{name}.validate"] == 0 or ended:
                report(late)
                late = None
                check(number, state.trainable)
                ended |= lost_patience()
            preempted = distributed.told_to_stop()
            if number % every["checkpoint.every"] == 0 or ended or preempted:
                if late is not None:
                    report(late)
                    late = None
                with clock.spent("checkpoint"):
                    # Of the checkpoints that stay, and of the one before them, which goes when this one is written.
                    meta["held"] = [*meta["held"], meta["kept"]["step"]][-config.checkpoint.keep - 1 :]
                    checkpoints.save(number, state, meta)
                journal.line(number, always=True)
            if preempted and not ended:
                raise Preempted(f"{name}: told to stop, and saved update {number} of {total}")
            if ended:
                break
    checkpoint.hand_on(kept_at(meta["kept"]["step"]), out / "model")
    return meta["kept"]


def state_sharding(mesh: Mesh, state: TrainState) -> TrainState:
    """Optimiser moments lie like the parameters they belong to; everything else is replicated."""
    paths = set(state.trainable)

    def place(keys, leaf):
        path = next((str(key.key) for key in reversed(keys) if isinstance(key, jax.tree_util.DictKey)), None)
        if path in paths:
            return sharding.parameter_sharding(mesh, path, leaf.shape)
        return sharding.replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)
