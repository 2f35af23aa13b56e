"""A language model with its tokenizer and parameters: made from a preset or a Hugging Face directory, saved, loaded.

A model folder (`sft`, `align`) holds model.json (architecture, adapter, where the base comes from), tokenizer/ and
model/ (the trained parameters: everything, or the adapter alone).
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Iterable, Mapping

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rosepo_jax import files, seeds
from rosepo_jax.data.prompts import Encoder, Template, train_tokenizer
from rosepo_jax.errors import UserError
from rosepo_jax.models import checkpoints_hf
from rosepo_jax.models import lora as adapters
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.models.lora import LoRAConfig
from rosepo_jax.training import checkpoint, sharding


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
    tokenizer = out / "tokenizer"
    if m.path:
        if not (pathlib.Path(m.path) / "config.json").is_file():
            raise UserError(f"model.path={m.path!r}: not a Hugging Face model directory (no config.json)")
        architecture = checkpoints_hf.read_config(m.path)
        tokenizer.mkdir(parents=True, exist_ok=True)
        for name in checkpoints_hf.TOKENIZER_FILES:
            if (pathlib.Path(m.path) / name).is_file():
                shutil.copy(pathlib.Path(m.path) / name, tokenizer)
    else:
        if m.width % m.heads or m.heads % m.kv_heads:
            raise UserError(f"model: width {m.width} / heads {m.heads} / kv_heads {m.kv_heads} must divide evenly")
        vocabulary = train_tokenizer(tokenizer_texts, m.vocabulary, tokenizer)
        architecture = DecoderConfig(
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
    if m.tuning not in ("full", "lora"):
        raise UserError(f"model.tuning={m.tuning!r}: choose full or lora")
    lora = LoRAConfig(m.lora.rank, m.lora.alpha, m.lora.targets) if m.tuning == "lora" else None
    base = {"path": m.path, "hash": files.hash_tree(m.path)} if m.path else {"seed": config.seed}
    description = {"decoder": dataclasses.asdict(architecture), "lora": lora and dataclasses.asdict(lora), "base": base}
    files.write_json(out / "model.json", description)
    return _assemble(config, out, description, mesh, trained=None)


def load(config: ConfigDict, folder: pathlib.Path, mesh: Mesh) -> Policy:
    """The model a stage left in `folder`."""
    description = files.read_json(folder / "model.json")
    return _assemble(config, folder, description, mesh, trained=folder / "model")


def open_model(config: ConfigDict, folder: pathlib.Path, mesh: Mesh) -> Policy:
    """A model folder of a stage, or a Hugging Face directory as it is."""
    if (folder / "model.json").is_file():
        return load(config, folder, mesh)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: neither a stage's model folder (model.json) nor a Hugging Face one (config.json)")
    architecture = checkpoints_hf.read_config(folder)
    lm = LanguageModel(architecture, None, config.model.dtype, config.model.param_dtype, config.model.remat)
    params = sharding.place(mesh, checkpoints_hf.read(folder, architecture, config.model.param_dtype))
    return Policy(lm, _encoder(config, folder), mesh, {}, params)


def hand_on(source: pathlib.Path, out: pathlib.Path) -> None:
    """Copies the description and the tokenizer of one model folder to the next stage's."""
    shutil.copytree(source / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    files.write_bytes(out / "model.json", (source / "model.json").read_bytes())


def load_model(config: ConfigDict, workdir: pathlib.Path, stage: str) -> tuple[DecoderConfig, dict, pathlib.Path]:
    """Architecture, merged parameters and tokenizer folder of a stage, for export."""
    policy = load(config, workdir / stage, sharding.make_mesh(config.mesh))
    params = adapters.merge(policy.params, policy.lm.lora) if policy.lm.lora else policy.params
    return policy.lm.config, params, workdir / stage / "tokenizer"


def _assemble(config, folder: pathlib.Path, description: dict, mesh: Mesh, trained: pathlib.Path | None) -> Policy:
    m = config.model
    architecture = description["decoder"]
    if architecture["rope_scaling"] is not None:  # JSON has no tuples
        architecture = architecture | {"rope_scaling": tuple(map(tuple, architecture["rope_scaling"]))}
    lora = LoRAConfig(**description["lora"]) if description["lora"] else None
    lm = LanguageModel(DecoderConfig(**architecture), lora, m.dtype, m.param_dtype, m.remat)
    key = jax.random.key(seeds.key(description["base"].get("seed", config.seed), "init") >> 33)
    shapes = jax.eval_shape(lm.init, key)
    layout = sharding.shardings(mesh, shapes)
    learns = functools.partial(_learns, lora is not None)
    trainable: Mapping[str, jax.Array] = {}
    if trained is not None:
        like = {p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout[p]) for p, s in shapes.items() if learns(p)}
        trainable = checkpoint.load_params(trained, like)
    params: Mapping[str, jax.Array] = {}
    if len(trainable) < len(shapes):
        params = jax.jit(lm.init, out_shardings=layout)(key)
        if path := description["base"].get("path"):
            read = checkpoints_hf.read(path, lm.config, m.param_dtype)
            params = {**params, **sharding.place(mesh, read)}
    return Policy(
        lm,
        _encoder(config, folder / "tokenizer"),
        mesh,
        {path: value for path, value in params.items() if not learns(path)},
        trainable or {path: value for path, value in params.items() if learns(path)},
    )


def _encoder(config: ConfigDict, tokenizer: pathlib.Path) -> Encoder:
    m = config.model
    return Encoder(tokenizer, Template.load(config.data.template), m.prompt_length, m.response_length, m.chat_template)


def _learns(lora: bool, path: str) -> bool:
    return adapters.is_adapter(path) or not lora
