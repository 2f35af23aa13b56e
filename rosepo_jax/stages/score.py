"""`score`: summed log-probability and token count of each response after its prompt, for JSON lines of both."""

import argparse
import pathlib

import numpy as np
from ml_collections import ConfigDict

from rosepo_jax import files
from rosepo_jax.data import batches, examples
from rosepo_jax.decoding import rank
from rosepo_jax.errors import UserError
from rosepo_jax.stages import runtime
from rosepo_jax.training import policy, programs, sharding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Log-probability of given responses: JSON lines of `prompt` and `response` in, scores out."
    parser.add_argument(
        "--model", required=True, type=pathlib.Path, help="WORKDIR/sft, WORKDIR/align or a HF directory"
    )
    parser.add_argument("--input", required=True, type=pathlib.Path, help="JSON lines with prompt and response")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="JSON lines: the input with logp and tokens")


def main(config: ConfigDict, args: argparse.Namespace) -> int:
    rows = read(args.input)
    programs.keep(config)
    model = policy.open_model(config, args.model, sharding.make_mesh(config.mesh))
    size = config.evaluate.batch_size
    out: list[dict] = []
    for block, real in batches.blocks(len(rows), size):
        chunk = [rows[i] for i in block]
        response_Bx1xT, mask_Bx1xT = examples.responses(model.encoder, [[row["response"]] for row in chunk])
        logp_B = rank.logps(model, model.params, [row["prompt"] for row in chunk], response_Bx1xT, mask_Bx1xT)[:, 0]
        tokens_B = mask_Bx1xT[:, 0].sum(axis=-1)
        for i in np.flatnonzero(real):
            out.append({**chunk[i], "logp": float(logp_B[i]), "tokens": int(tokens_B[i])})
    files.write_jsonl(args.output, out)
    runtime.say(f"score: {len(out)} rows written to {args.output}")
    return 0


def read(path: pathlib.Path) -> list[dict]:
    """The rows to score. UserError names the one that lacks a text."""
    rows = files.read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("response"), str):
            raise UserError(f"{path}: row {number} needs the texts `prompt` and `response`")
    return rows
