"""What our stack says about a Hugging Face directory, in the form in which torch is asked too."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rosepo_jax.data.prompts import pad
from rosepo_jax.decoding.greedy import greedy
from rosepo_jax.models import checkpoints_hf
from rosepo_jax.models.decoder import LanguageModel
from rosepo_jax.preference.logprobs import response_logps
from rosepo_jax.preference.objectives import OBJECTIVES, Objective
from rosepo_jax.preference.smoothing import Smoothing
from rosepo_jax.stages import align
from rosepo_jax.training.step import Task, init_state, train_step

Ids = Sequence[int]
NEVER = -1  # an EOS that no model generates


@dataclasses.dataclass(frozen=True)
class Row:
    """A preference pair in ids; SFT takes prompt and chosen."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclasses.dataclass(frozen=True)
class Step:
    """One update: its loss, gradient norm before clipping, reward margin (DPO), and the parameters after it."""

    loss: float
    grad_norm: float
    margin: float
    params: dict[str, np.ndarray]


def load(directory: pathlib.Path, dtype: str = "float32") -> tuple[LanguageModel, dict[str, np.ndarray]]:
    config = checkpoints_hf.read_config(directory)
    return LanguageModel(config, None, dtype, dtype), checkpoints_hf.read(directory, config, dtype)


def batch(prompts: Sequence[Ids], responses: Sequence[Sequence[Ids]], P: int = 0, T: int = 0) -> dict[str, np.ndarray]:
    """Prompts [B, P] and responses [B, R, T], right-padded with a real id; P and T of 0: two more than needed."""
    flat = [response for row in responses for response in row]
    prompt, prompt_mask = pad(prompts, P or max(map(len, prompts)) + 2, 5)
    response, response_mask = pad(flat, T or max(map(len, flat)) + 2, 5)
    shape = (len(prompts), len(responses[0]), -1)
    return {
        "prompt_BxP": prompt,
        "prompt_mask_BxP": prompt_mask,
        "response_BxRxT": response.reshape(shape),
        "response_mask_BxRxT": response_mask.reshape(shape),
    }


@functools.partial(jax.jit, static_argnums=0)
def _logits(lm, params, b):
    first, later = lm.states(params, b["prompt_BxP"], b["prompt_mask_BxP"], b["response_BxRxT"])
    return lm.logits(params, jnp.concatenate([first[:, None], later], axis=1))


@functools.partial(jax.jit, static_argnums=0)
def _logps(lm, params, b):
    return response_logps(
        lm, params, b["prompt_BxP"], b["prompt_mask_BxP"], b["response_BxRxT"], b["response_mask_BxRxT"]
    )


def logits(lm, params, texts: Sequence[Ids], prompt_lengths: Sequence[int]) -> list[np.ndarray]:
    """Per text the logits [n - p + 1, V] from its p-th token on, the first p tokens being the prompt."""
    parts = [(text[:p], text[p:]) for text, p in zip(texts, prompt_lengths)]
    longest = max(map(len, texts))  # widths for any place of the cut, so that one program serves all
    rows = _logits(lm, params, batch([prompt for prompt, _ in parts], [[rest] for _, rest in parts], longest, longest))
    return [np.asarray(row[: len(rest) + 1]) for row, (_, rest) in zip(rows, parts)]


def logps(lm, params, prompts: Sequence[Ids], responses: Sequence[Sequence[Ids]]) -> np.ndarray:
    return np.asarray(_logps(lm, params, batch(prompts, responses)))


def continuations(lm, params, prompts: Sequence[Ids], tokens: int) -> list[list[int]]:
    b = batch(prompts, [[[5]]] * len(prompts))
    found, _ = greedy(lm, params, b["prompt_BxP"], b["prompt_mask_BxP"], max_tokens=tokens, eos=NEVER)
    return np.asarray(found).tolist()


def preference_batch(rows: Sequence[Row], rejected: bool = True) -> dict:
    part = batch([row.prompt for row in rows], [[row.chosen, row.rejected][: 1 + rejected] for row in rows])
    return update_batch(part, np.zeros((len(rows), 1), np.float32))


def update_batch(part: dict[str, np.ndarray], epsilon_BxK: np.ndarray) -> dict:
    """The batch of one update, all in one part."""
    count_BxR = part["response_mask_BxRxT"].sum(axis=2)
    row_B = np.arange(len(count_BxR), dtype=np.int32)
    return {"parts": (part,), "count_BxR": count_BxR, "row_B": row_B, "update_B": 0 * row_B, "epsilon_BxK": epsilon_BxK}


def preference_task(lm, objective: str | Objective = "dpo", factor: Smoothing = Smoothing("none")) -> Task:  # noqa: B008
    """The task of `align` with eps from the rows."""
    objective = OBJECTIVES[objective] if isinstance(objective, str) else objective
    return align.task(lm, objective, factor, None, "stored", seed=0)


def updates(task: Task, transformation, params, b, steps: int, reference=None) -> list[Step]:
    """Updates on one batch, repeated; `reference` is that of preference tasks, SFT has none."""
    state = init_state(jax.tree.map(jnp.asarray, params), transformation)
    frozen = {} if reference is None else {"base": {}, "reference": reference, "oracle": {}}
    step = functools.partial(train_step, task, transformation, lambda _: 0.0, 1)
    step = jax.jit(step).lower(state, frozen, b).compile()  # once: the first state's buffers are of another kind
    found = []
    for _ in range(steps):
        state, metrics = step(state, frozen, b)
        numbers = (float(metrics.get(name, 0.0)) for name in ("loss", "grad_norm", "rewards/margins"))
        found.append(Step(*numbers, {path: np.asarray(value) for path, value in state.trainable.items()}))
    return found
