"""AdamW with a warmed-up schedule, and lengths in natural units."""

import re

import optax
from ml_collections import ConfigDict

from rosepo_jax.errors import UserError


def steps(length: str, key: str, *, batch_size: int, rows: int, total: int | None = None) -> int:
    """Resolves "300 steps", "2 epochs", "6400 examples" or "5 %" (of `total`) to a number of updates, at least 1."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|examples?|%)\s*", length)
    if not match or (match[2] == "%" and total is None):
        units = "steps, epochs or examples" + (" or %" if total is not None else "")
        raise UserError(f"{key}={length!r}: write a number and a unit: {units}")
    number, unit = float(match[1]), match[2].rstrip("s")
    if number == 0:
        return 0
    per_unit = {"step": 1.0, "epoch": rows / batch_size, "example": 1 / batch_size, "%": (total or 0) / 100}[unit]
    return max(1, round(number * per_unit))


def make(config: ConfigDict, key: str, total: int, rows: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clip by global norm, AdamW (decay on matrices only), learning rate `schedule` over `total` updates."""
    warmup = steps(config.warmup, f"{key}.warmup", batch_size=config.batch_size, rows=rows, total=total)
    decay = max(total - warmup, 1)
    peak = config.learning_rate
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay),
        "linear": lambda: optax.linear_schedule(peak, 0.0, decay),
        "constant": lambda: optax.constant_schedule(peak),
    }
    if config.schedule not in after:
        raise UserError(f"{key}.schedule={config.schedule!r}: choose one of {', '.join(after)}")
    # The first update already moves: the ramp ends at the peak on update `warmup`.
    ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    schedule = optax.join_schedules([ramp, after[config.schedule]()], [warmup])
    matrices = lambda params: {path: not path.endswith(("norm/scale", "/bias")) for path in params}  # noqa: E731
    transformation = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=config.weight_decay, mask=matrices),
    )
    return transformation, schedule
