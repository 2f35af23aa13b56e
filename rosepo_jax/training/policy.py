"""A language model with its tokenizer and parameters: new, or from a Hugging Face directory or hub id; saved, loaded.

A model folder (`sft`, `align`) holds model.json (architecture, adapter, where the base comes from), tokenizer/ and
model/ (the trained parameters: everything, or the adapter alone).
"""

import dataclasses
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rosepo_jax import distributed, files, forms, seeds
from rosepo_jax.data.prompts import Encoder, Template, train_tokenizer
from rosepo_jax.errors import UserError
from rosepo_jax.models import attention, checkpoints_hf, families, hub, peft
from rosepo_jax.models import lora as adapters
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.models.lora import LoRAConfig
from rosepo_jax.training import checkpoint, sharding

MODEL = {  # of model.json
    "decoder": forms.of(DecoderConfig),
    "lora": (None, forms.of(LoRAConfig)),
    "base": {"seed?": int, "path?": str, "revision?": str},
}
UNROLLED = 8  # layers, at most, that are written out on a CPU: programs grow, and take longer to compile


@dataclasses.dataclass(frozen=True)
class Policy:
    """`trainable` changes in training, `base` (empty for full tuning) never does; together they are all parameters."""

    lm: LanguageModel
    encoder: Encoder
    mesh: Mesh
    base: Mapping[str, jax.Array]
    trainable: Mapping[str, jax.Array]

    @property
    def params(self) -> dict[str, jax.Array]:
        return {**self.base, **self.trainable}


def create(config: ConfigDict, out: pathlib.Path, mesh: Mesh, tokenizer_texts: Iterable[str]) -> Policy:
    """The model SFT starts from. Writes model.json and tokenizer/ into `out`."""
    m = config.model
    base: dict[str, Any] = {"seed": config.seed}
    if m.path:
        folder, commit = hub.local(m.path, m.revision)
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path={m.path!r}: not a Hugging Face model directory (no config.json)")
        architecture = checkpoints_hf.read_config(folder)
        if distributed.is_primary():
            (out / "tokenizer").mkdir(parents=True, exist_ok=True)
            for name in checkpoints_hf.TOKENIZER_FILES:
                if (folder / name).is_file():
                    shutil.copy(folder / name, out / "tokenizer")
        base = {"path": m.path, "revision": commit or m.revision}
    else:
        trains = distributed.is_primary()  # the others learn the size
        (vocabulary,) = distributed.agreed(
            [train_tokenizer(tokenizer_texts, m.vocabulary, out / "tokenizer") if trains else 0]
        )
        architecture = new_architecture(m, vocabulary)
        if architecture.vocabulary < vocabulary:
            raise UserError(f"model.vocabulary={m.vocabulary}: {m.architecture} has {architecture.vocabulary} tokens")
    lora = new_adapter(m)
    described = {"decoder": dataclasses.asdict(architecture), "lora": lora and dataclasses.asdict(lora), "base": base}
    if distributed.is_primary():
        files.write_json(out / "model.json", described)
    distributed.barrier("model described")
    return _assemble(config, out, described, mesh, adapter=m.adapter)


def new_architecture(m: ConfigDict, vocabulary: int) -> DecoderConfig:
    """The shape of a model without weights: model.architecture, or the preset."""
    if m.architecture:
        return families.architecture(m.architecture)
    if m.width % m.heads or m.heads % m.kv_heads:
        raise UserError(f"model: width {m.width} / heads {m.heads} / kv_heads {m.kv_heads} must divide evenly")
    return DecoderConfig(
        vocabulary=-(-vocabulary // 64) * 64,  # a multiple that meshes divide
        width=m.width,
        layers=m.layers,
        heads=m.heads,
        kv_heads=m.kv_heads,
        head_dim=m.width // m.heads,
        mlp_width=m.mlp_width,
        tie_embeddings=m.tie_embeddings,
        max_positions=m.prompt_length + m.response_length,
    )


def language_model(m: ConfigDict, architecture: DecoderConfig, lora: LoRAConfig | None, mesh: Mesh) -> LanguageModel:
    """The model as the devices of `mesh` compute it."""
    c, platform = architecture, mesh.devices.flat[0].platform
    chosen = attention.choose(
        m.attention, platform, dtype=m.dtype, head_dim=c.head_dim,
        prompt_length=m.prompt_length, cap=c.attention_cap,
        sliding=any(c.sliding) and c.window < m.prompt_length,
    )  # fmt: skip
    # XLA's loops on CPUs copy what they read and write: a third of an update's time.
    unrolled = platform == "cpu" and c.layers <= UNROLLED
    rows = sharding.batch_sharding(mesh)
    return LanguageModel(c, lora, m.dtype, m.param_dtype, m.remat, m.quantize, chosen, m.logits_chunk, unrolled, rows)


def load(config: ConfigDict, folder: pathlib.Path, mesh: Mesh) -> Policy:
    """The model a stage left in `folder`."""
    return _assemble(config, folder, describe(folder), mesh, trained=folder / "model")


def describe(folder: pathlib.Path) -> dict[str, Any]:
    """What model.json says: the decoder, the adapter or None, the base."""
    path = folder / "model.json"
    again = f"run `rosepo {folder.name}` again"
    described = forms.check(files.read_json(path), MODEL, path, again)
    try:
        families.refuse_unknown(DecoderConfig(**described["decoder"]))
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: {error}; {again}") from None
    return described


def open_model(config: ConfigDict, source: str | os.PathLike, mesh: Mesh) -> Policy:
    """A model folder of a stage, a Hugging Face directory or hub id, or a PEFT directory on top of its base."""
    if (pathlib.Path(source) / "model.json").is_file():
        return load(config, pathlib.Path(source), mesh)
    m = config.model
    path, revision = str(source), m.revision
    if peft.is_directory(source):
        path, revision = (m.path, m.revision) if m.path else peft.base_name(source)
        if not path:
            raise UserError(f"{source}: the adapter does not name its base; pass --config.model.path=DIR")
    folder, commit = hub.local(path, revision)
    if not (folder / "config.json").is_file():
        raise UserError(f"{path}: neither a stage's model folder (model.json) nor a Hugging Face one (config.json)")
    architecture = checkpoints_hf.read_config(folder)
    lora = peft.read_config(source) if peft.is_directory(source) else None
    described = {
        "decoder": dataclasses.asdict(architecture),
        "lora": lora and dataclasses.asdict(lora),
        "base": {"path": path, "revision": commit},
    }
    return _assemble(config, folder, described, mesh, adapter=str(source) if lora else "", tokenizer=folder)


def hand_on(source: pathlib.Path, out: pathlib.Path) -> None:
    """Copies the description and the tokenizer of one model folder to the next stage's."""
    if distributed.is_primary():
        shutil.copytree(source / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
        files.write_bytes(out / "model.json", (source / "model.json").read_bytes())


def new_adapter(m: ConfigDict) -> LoRAConfig | None:
    """What is trained on top of a frozen base; None for full tuning."""
    if m.tuning not in ("full", "lora"):
        raise UserError(f"model.tuning={m.tuning!r}: choose full or lora")
    if m.tuning == "full":
        if m.adapter:
            raise UserError("model.adapter: an adapter is continued with model.tuning=lora")
        if m.quantize != "none":
            raise UserError(f"model.quantize={m.quantize}: is for a frozen base; use model.tuning=lora")
        return None
    if m.adapter:
        return peft.read_config(m.adapter)
    lora = LoRAConfig(m.lora.rank, m.lora.alpha, m.lora.targets, m.lora.dropout, m.lora.rslora)
    modules = checkpoints_hf.MODULES
    try:
        matches = any(map(lora.matches, modules))
    except re.error:
        matches = False
    if lora.rank < 1 or not 0 <= lora.dropout < 1 or not matches:
        raise UserError(
            f"model.lora: rank {lora.rank} must be at least 1, dropout {lora.dropout} in [0, 1), and targets "
            f"{lora.targets!r} a regular expression that matches some of {', '.join(modules)}"
        )
    return lora


def _assemble(
    config: ConfigDict,
    folder: pathlib.Path,
    described: dict[str, Any],
    mesh: Mesh,
    *,
    trained: pathlib.Path | None = None,
    adapter: str = "",
    tokenizer: pathlib.Path | None = None,
) -> Policy:
    """Every parameter from where it comes: `trained`, the PEFT directory `adapter`, the base's files, or a new draw."""
    m = config.model
    lora = LoRAConfig(**described["lora"]) if described["lora"] else None
    lm = language_model(m, DecoderConfig(**described["decoder"]), lora, mesh)
    base = described["base"]
    key = jax.random.key(seeds.key(base.get("seed", config.seed), "init") >> 33)
    shapes = jax.eval_shape(lm.init, key)
    layout = sharding.shardings(mesh, shapes)
    learns = {path for path in shapes if lora is None or adapters.is_adapter(path)}
    params: dict[str, jax.Array] = {}
    if trained is not None:
        like = {p: jax.ShapeDtypeStruct(shapes[p].shape, shapes[p].dtype, sharding=layout[p]) for p in learns}
        params |= checkpoint.load_params(trained, like)
    if lora and adapter:
        params |= peft.read(adapter, lm.config, lora, layout)
    if "path" in base and not shapes.keys() <= params.keys():
        source, _ = hub.local(base["path"], base["revision"])
        params |= checkpoints_hf.read(source, lm.config, m.param_dtype, layout, lm.quantize)
    if missing := sorted(shapes.keys() - params.keys()):
        draw = jax.jit(lambda key: {p: lm.init(key)[p] for p in missing}, out_shardings={p: layout[p] for p in missing})
        params |= draw(key)
    return Policy(
        lm,
        _encoder(config, tokenizer or folder / "tokenizer"),
        mesh,
        {path: params[path] for path in shapes if path not in learns},
        {path: params[path] for path in shapes if path in learns},
    )


def _encoder(config: ConfigDict, tokenizer: pathlib.Path) -> Encoder:
    m = config.model
    return Encoder(tokenizer, Template.load(config.data.template), m.prompt_length, m.response_length, m.chat_template)
