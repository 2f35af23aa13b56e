"""DPO updates by Tunix's trainer, one for every request: `python tunix_dpo.py SETTINGS.json`, asked by peers.py.

An update takes all pairs, `micro` at a time. Its time runs from its first batch to the last result of its optimiser.
"""

import json
import os
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
import safetensors.numpy
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput
from worker import Clock, Memory, requests

LINEAR = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


class Trainer(DPOTrainer):
    """Keeps what each update computed."""

    def _post_process_train_step(self, aux):
        self.logps.append([aux["log_probs/chosen"], aux["log_probs/rejected"]])
        super()._post_process_train_step(aux)

    def _buffer_metrics(self, buffer, loss, **kwargs):
        self.losses.append(loss)
        return super()._buffer_metrics(buffer, loss=loss, **kwargs)


def read_model(folder: str, dtype: str, remat: bool) -> llama.Llama3:
    c = json.loads(pathlib.Path(folder, "config.json").read_text())
    heads = c["num_attention_heads"]
    config = llama.ModelConfig(
        num_layers=c["num_hidden_layers"], vocab_size=c["vocab_size"], embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"], num_heads=heads, head_dim=c["head_dim"],
        num_kv_heads=c["num_key_value_heads"], rope_theta=0, norm_eps=c["rms_norm_eps"],
        weight_tying=c["tie_word_embeddings"],
        remat_config=llama.RematConfig.DECODER if remat else llama.RematConfig.NONE,
    )  # fmt: skip
    return create_model_from_safe_tensors(folder, config, dtype=jnp.dtype(dtype))


def adapted(model: llama.Llama3, folder: pathlib.Path) -> llama.Llama3:
    """The model with the adapter of a PEFT directory."""
    described = json.loads((folder / "adapter_config.json").read_text())
    provider = qwix.LoraProvider(module_path=LINEAR, rank=described["r"], alpha=described["lora_alpha"])
    model = qwix.apply_lora_to_model(model, provider, **model.get_model_input(), rngs=nnx.Rngs(0))
    tensors = {}
    for name, value in safetensors.numpy.load_file(folder / "adapter_model.safetensors").items():
        layer, module, half = re.search(r"layers\.(\d+)\.(.+)\.lora_([AB])\.weight", name).groups()
        tensors[int(layer), module.rpartition(".")[2], half.lower()] = value.T
    state = nnx.state(model, nnx.LoRAParam)
    for path, leaf in nnx.to_flat_state(state):
        value = tensors.pop((path[1], path[-2], path[-1][-1]))
        leaf.set_value(jnp.asarray(value.reshape(leaf.get_value().shape), jnp.float32))
    assert not tensors, f"nowhere to put {list(tensors)}"
    nnx.update(model, state)
    return model


def batches(s: dict) -> list[TrainingInput]:
    """Pairs in their order, `micro` of them at a time, all padded alike."""
    pairs = [(row["prompt"], row["responses"][0], other) for row in s["rows"] for other in row["responses"][1:]]
    P = max(len(prompt) for prompt, *_ in pairs)

    def padded(texts, width, left):
        ids, mask = (np.zeros((len(texts), width), np.int32) for _ in range(2))
        for i, text in enumerate(texts):
            where = slice(width - len(text), None) if left else slice(len(text))
            ids[i, where], mask[i, where] = text, 1
        return ids, mask

    found = []
    for start in range(0, len(pairs), s["micro"]):
        prompts, chosen, rejected = zip(*pairs[start : start + s["micro"]])
        found.append(
            TrainingInput(*padded(prompts, P, True), *padded(chosen, s["T"], False), *padded(rejected, s["T"], False))
        )
    return found


def main() -> None:
    asked, answer = requests()
    s = json.loads(pathlib.Path(sys.argv[1]).read_text())
    memory = Memory()
    reference = read_model(s["model"], s["dtype"], False)
    policy = read_model(s["model"], s["dtype"], s["remat"]) if not s["adapter"] else reference
    if s["adapter"]:
        policy = adapted(read_model(s["model"], s["dtype"], s["remat"]), pathlib.Path(s["adapter"]))
    micros = batches(s)
    optimizer = optax.chain(
        optax.clip_by_global_norm(s["clip"]), optax.adamw(s["learning_rate"], b1=0.9, b2=0.999, weight_decay=0.0)
    )
    config = DPOTrainingConfig(
        beta=s["beta"], eval_every_n_steps=10**9, gradient_accumulation_steps=len(micros), data_sharding_axis=()
    )
    trainer = Trainer(policy, reference, optimizer, config)

    def on_request():
        for request in asked:
            if request["do"] == "memory":
                device = jax.devices()[0]
                peak = None if device.platform == "cpu" else device.memory_stats()["peak_bytes_in_use"]
                answer(**(memory.peak() if peak is None else {"growth": peak, "process": peak}))
                continue
            trainer.losses, trainer.logps = [], []
            clock = Clock()
            yield from micros
            jax.block_until_ready((nnx.state(policy), trainer.losses))
            loss = float(np.mean([np.asarray(loss, np.float64) for loss in trainer.losses]))
            means = np.mean(np.asarray(trainer.logps, np.float64), axis=0)
            answer(**clock.stop(), loss=loss, logps=[means.tolist()])
            if trainer.train_steps == 1:
                memory.restart()  # what compiling took is no part of training
        os._exit(0)  # its trainer would write checkpoints and metrics

    trainer.train(on_request())


if __name__ == "__main__":
    main()
