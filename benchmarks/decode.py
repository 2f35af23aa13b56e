"""Evaluation throughput, users a second, against transformers on the same weights.

python benchmarks/decode.py [--users=16] [--P=128] [--items=10000] [--repeats=3] [--alone] [--record]

candidates  log-probs of 20 titles of each user. transformers: 20 full sequences, prompt and title, logits at the
            title's positions only.
catalogue   the top 10 of all titles by 20 beams. transformers: `generate` with as many beams, the trie as
            `prefix_allowed_tokens_fn` (a look-up in a dict), length_penalty=0, so that scores are sums as ours are.
completed   the same, then best-first search for the users whose beams prove nothing.

Both run in one process, interleaved, on the same users and the same random llama, which is written to a Hugging Face
directory. Random weights know no title, and no beam could prove anything; what may follow a token in titles is
therefore written into the head, so that titles go on as those of a trained model do. Memory is allocated as always:
keeping what was freed, as the command line does, makes XLA faster and `generate` several times slower.

One JSON line per figure: the median over repeats and its range. Both must give the same log-probs, and where our top 10
is certified no list of transformers may be better. --alone leaves transformers (and torch) out.
"""

import argparse
import importlib.util
import itertools
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import record

from rosepo_jax import config as defaults
from rosepo_jax import seeds
from rosepo_jax.data.prompts import pad
from rosepo_jax.decoding.beam import beam_search
from rosepo_jax.decoding.best_first import best_first
from rosepo_jax.decoding.trie import compile_trie
from rosepo_jax.models import checkpoints_hf
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.preference.logprobs import response_logps
from rosepo_jax.training import policy, sharding

DECODER = DecoderConfig(
    vocabulary=8192, width=256, layers=6, heads=4, kv_heads=4, head_dim=64, mlp_width=768, tie_embeddings=False
)
EOS, FIRST = 2, 3  # ids below are special
KNOWN, LIKED = 24.0, 6.0  # logits: of what may follow in a title; spread of first tokens, each user's own
TOLERANCE = 1e-4  # of summed log-probs


class Problem(NamedTuple):
    lm: LanguageModel
    params: dict[str, np.ndarray]
    prompts: list[list[int]]
    titles: list[list[int]]  # EOS included
    candidates_UxC: np.ndarray


class Top(NamedTuple):
    items_Uxk: np.ndarray  # -1 where there is none
    scores_Uxk: np.ndarray
    certified_U: np.ndarray


def make_problem(decoder: DecoderConfig, *, users: int, P: int, items: int, T: int, candidates: int) -> Problem:
    """Prompts of P/2..P tokens and distinct titles of 3..T, EOS included; many share their beginnings.

    The first half of the vocabulary stands inside titles, the next quarter at their ends, the last ends prompts.
    """
    rng = seeds.generator("benchmark", "decode", users, P, items, T)
    half, quarter = decoder.vocabulary // 2, decoder.vocabulary // 4
    titles: list[list[int]] = []
    known: set[tuple[int, ...]] = set()
    while len(titles) < items:
        earlier = titles[int(rng.integers(len(titles)))][:-2] if titles else []
        start = earlier[: int(rng.integers(0, 4))]
        new = rng.integers(FIRST, half, int(rng.integers(1, T - 1))).tolist()
        title = [*[*start, *new][: T - 2], int(half + rng.integers(quarter)), EOS]
        if tuple(title) not in known:
            known.add(tuple(title))
            titles.append(title)
    prompts = [rng.integers(FIRST, decoder.vocabulary, rng.integers(P // 2, P + 1)).tolist() for _ in range(users)]
    for prompt in prompts:
        prompt[-1] = int(half + quarter + rng.integers(quarter))
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
    lm = policy.language_model(defaults.default().model, decoder, None, one)
    candidates_UxC = np.stack([rng.permutation(items)[:candidates] for _ in range(users)])
    return Problem(lm, parameters(lm, prompts, titles, rng), prompts, titles, candidates_UxC)


def parameters(lm: LanguageModel, prompts, titles, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random, but embeddings outweigh what the blocks add, and the head knows what may follow a token."""
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    params = {
        path: np.ones(x.shape, np.float32) if "norm" in path else rng.standard_normal(x.shape, np.float32)
        for path, x in shapes.items()
    }
    for path, value in params.items():
        if path.startswith("blocks/") and "norm" not in path:
            value *= value.shape[-2] ** -0.5
    half, quarter = lm.config.vocabulary // 2, lm.config.vocabulary // 4
    embedding, head = params["embedding"], params["head/kernel"]
    ending = rng.standard_normal(lm.config.width, np.float32)
    embedding[half : half + quarter] += ending
    embedding *= 4.0
    direction = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    inside = sorted({pair for title in titles for pair in itertools.pairwise(title[:-1])})
    starts = [(prompt[-1], start) for prompt in prompts for start in sorted({title[0] for title in titles})]
    heights = np.append(np.full(len(inside), KNOWN), rng.normal(KNOWN / 2, LIKED, len(starts)))
    before, after = np.array([*inside, *starts]).T
    np.add.at(head.T, after, heights[:, None].astype(np.float32) * direction[before])
    head[:, EOS] = KNOWN * ending / np.linalg.norm(ending)
    head /= lm.config.width**0.5
    return params


class Ours:
    """Every method answers for all users in one batch."""

    def __init__(self, problem: Problem, beams: int, k: int, budget: int):
        self.lm, self.params = problem.lm, jax.device_put(problem.params)
        self.beams, self.k, self.budget = beams, k, budget
        self.trie = jax.device_put(compile_trie(problem.titles, EOS))
        self.prompts = pad(problem.prompts, max(map(len, problem.prompts)), EOS)
        tokens, mask = pad(problem.titles, max(map(len, problem.titles)), EOS)
        self.titles = tokens[problem.candidates_UxC], mask[problem.candidates_UxC]
        self.score = jax.jit(response_logps, static_argnums=0)

    def candidates(self) -> np.ndarray:
        return np.asarray(self.score(self.lm, self.params, *self.prompts, *self.titles))

    def catalogue(self) -> Top:
        found = beam_search(self.lm, self.params, self.trie, *self.prompts, beams=self.beams, k=self.k)
        return Top(*map(np.array, found))

    def completed(self) -> Top:
        top = self.catalogue()
        index = np.flatnonzero(~top.certified_U)
        if len(index):
            padded = np.resize(index, len(top.certified_U))  # one shape, one program
            batch = (x[padded] for x in (*self.prompts, top.items_Uxk, top.scores_Uxk))
            found = best_first(self.lm, self.params, self.trie, *batch, lines=self.beams, budget=self.budget)
            for kept, value in zip(top, found):
                kept[index] = np.asarray(value)[: len(index)]
        return top


class Theirs:
    """The same by transformers, reading the directory that we wrote."""

    def __init__(self, problem: Problem, beams: int, k: int, folder: pathlib.Path):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        if hasattr(os, "sched_getaffinity"):
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        checkpoints_hf.write(folder, problem.lm.config, problem.params, None)
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.item = {tuple(title): item for item, title in enumerate(problem.titles)}
        self.allowed: dict[tuple[int, ...], list[int]] = {}
        for *title, _ in self.item:
            for n, token in enumerate((*title, EOS)):
                following = self.allowed.setdefault(tuple(title[:n]), [])
                if token not in following:
                    following.append(token)
        self.beams, self.k, self.T = beams, k, max(map(len, problem.titles))
        self.P = max(map(len, problem.prompts))
        prompt, mask = (torch.from_numpy(x) for x in pad([p[::-1] for p in problem.prompts], self.P, EOS))
        self.prompt_UxP, self.mask_UxP = prompt.flip(1).long(), mask.flip(1).long()  # padded on the left
        tokens, real = (torch.from_numpy(x) for x in pad(problem.titles, self.T, EOS))
        self.title_UxCxT, self.real_UxCxT = tokens.long()[problem.candidates_UxC], real[problem.candidates_UxC]

    def candidates(self) -> np.ndarray:
        torch = self.torch
        U, C, T = self.title_UxCxT.shape
        title, real = self.title_UxCxT.reshape(-1, T), self.real_UxCxT.reshape(-1, T)
        prompt, mask = (x.repeat_interleave(C, dim=0) for x in (self.prompt_UxP, self.mask_UxP))
        mask = torch.cat([mask, real.long()], dim=1)
        with torch.inference_mode():
            logits = self.model(
                input_ids=torch.cat([prompt, title], dim=1), attention_mask=mask,
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0), logits_to_keep=T + 1, use_cache=False,
            ).logits[:, :-1]  # fmt: skip
            logps = logits.gather(-1, title[..., None])[..., 0] - logits.logsumexp(dim=-1)
            return (logps * real).sum(dim=1).reshape(U, C).numpy()

    def catalogue(self) -> Top:
        def allowed(_, ids):
            return self.allowed.get(tuple(ids[self.P :].tolist()), [EOS])

        with self.torch.inference_mode():
            found = self.model.generate(
                input_ids=self.prompt_UxP, attention_mask=self.mask_UxP, prefix_allowed_tokens_fn=allowed,
                num_beams=self.beams, num_return_sequences=self.k, max_new_tokens=self.T, do_sample=False,
                length_penalty=0.0, early_stopping="never", eos_token_id=EOS, pad_token_id=EOS,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        texts = [[*row, EOS] for row in found.sequences[:, self.P :].tolist()]
        items = np.array([self.item.get(tuple(text[: text.index(EOS) + 1]), -1) for text in texts])
        scores = found.sequences_scores.numpy()
        users = (len(self.prompt_UxP), self.k)
        return Top(items.reshape(users), scores.reshape(users), np.zeros(users[0], bool))


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(ours: Ours, theirs: Theirs | None, users: int, repeats: int) -> Iterator[dict[str, Any]]:
    calls: dict[tuple[str, str], Callable[[], Any]] = {
        ("candidates", "ours"): ours.candidates,
        ("catalogue", "ours"): ours.catalogue,
        ("completed", "ours"): ours.completed,
    }
    if theirs is not None:
        calls |= {("candidates", "transformers"): theirs.candidates, ("catalogue", "transformers"): theirs.catalogue}
    answers = {name: call() for name, call in calls.items()}  # the first call compiles
    taken: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(seconds(call))
    for (figure, variant), values in taken.items():
        yield {"figure": figure, "variant": variant, "unit": "users/s", **record.spread(users / np.array(values))}
    if theirs is not None:
        for figure, baseline in (("candidates", "candidates"), ("catalogue", "catalogue"), ("completed", "catalogue")):
            ratio = np.array(taken[baseline, "transformers"]) / np.array(taken[figure, "ours"])
            yield {"figure": figure, "against": f"transformers, {baseline}", "unit": "x", **record.spread(ratio)}
    for figure in ("catalogue", "completed"):
        share = float(answers[figure, "ours"].certified_U.mean())
        yield {"figure": f"{figure}: certified", "unit": "share of users", "value": share}
    if theirs is not None:
        yield from agreement(answers)


def agreement(answers: dict[tuple[str, str], Any]) -> Iterator[dict[str, Any]]:
    """Candidates: the largest difference of log-probs. Catalogue, over the lists that we call exact: how much better
    any of theirs is at any rank (a proof of an error), and how many are the same."""
    error = np.abs(answers["candidates", "ours"] - answers["candidates", "transformers"]).max()
    yield {"figure": "candidates: difference of log-probs", "value": float(error), "at most": TOLERANCE}
    theirs = answers["catalogue", "transformers"]
    for figure in ("catalogue", "completed"):
        ours = answers[figure, "ours"]
        exact = ours.certified_U
        if exact.any():
            ahead = (theirs.scores_Uxk - ours.scores_Uxk)[exact].max()
            yield {"figure": f"{figure}: transformers ahead of a proof", "value": float(ahead), "at most": TOLERANCE}
            same = (theirs.items_Uxk == ours.items_Uxk)[exact].all(axis=1)
            yield {
                "figure": f"{figure}: same list where certified",
                "unit": f"of {len(same)}",
                "value": int(same.sum()),
            }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=16, help="in one batch")
    parser.add_argument("--P", type=int, default=128, help="prompt tokens")
    parser.add_argument("--T", type=int, default=8, help="tokens of the longest title, its end included")
    parser.add_argument("--items", type=int, default=10000, help="titles in the catalogue")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--beams", type=int, default=20)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--budget", type=int, default=2000, help="prefixes that best-first search may expand")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/RESULTS.md")
    args = parser.parse_args(argv)
    if not args.alone and importlib.util.find_spec("torch") is None:
        parser.error("torch is not installed; pip install -e .[parity], or add --alone")
    problem = make_problem(DECODER, users=args.users, P=args.P, items=args.items, T=args.T, candidates=args.candidates)
    ours, rows = Ours(problem, args.beams, args.k, args.budget), []
    with tempfile.TemporaryDirectory() as temporary:
        theirs = None if args.alone else Theirs(problem, args.beams, args.k, pathlib.Path(temporary) / "hf")
        for row in measure(ours, theirs, args.users, args.repeats):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.record:
        given = sys.argv[1:] if argv is None else argv
        record.append(" ".join(["python benchmarks/decode.py", *given]), rows)
    return 0 if all(row["value"] <= row.get("at most", row["value"]) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
