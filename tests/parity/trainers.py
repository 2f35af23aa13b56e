"""Updates by TRL on given token ids."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
import transformers
import trl.import_utils as trl_imports
from datasets import Dataset

from parity import checkpoints
from parity.ours import Row, Step
from rosepo_jax.models import checkpoints_hf

# trl 0.28 takes the answer of transformers for a bool; transformers 5 answers (found, version), always true.
_found = trl_imports._is_package_available
trl_imports._is_package_available = lambda name, return_version=False: (
    _found(name, True) if return_version else bool(_found(name)[0])
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

transformers.utils.logging.set_verbosity_error()


class _InOrder:
    """Batches in the order of the rows."""

    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class _DPO(_InOrder, DPOTrainer):
    """Takes rows that are token ids already."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


class _SFT(_InOrder, SFTTrainer):
    pass


class _Record(transformers.TrainerCallback):
    """Keeps the parameters after every update."""

    def __init__(self, directory: pathlib.Path):
        self.directory, self.params = directory, []

    def on_step_end(self, args, state, control, model=None, **_):
        self.params.append(to_ours(model, self.directory))


def updates(
    task: str,
    directory: pathlib.Path,
    rows: Sequence[Row],
    out: pathlib.Path,
    *,
    optimizer: str,
    learning_rate: float,
    clip: float,
    steps: int,
    reference: pathlib.Path | None = None,
    label_smoothing: float = 0.0,
) -> list[Step]:
    """Updates of a checkpoint by TRL on one batch, repeated. task: sft | dpo; optimizer: sgd | adamw_torch.

    Without `reference`, DPO's is a copy of the checkpoint. beta is 0.1; nothing decays; the rate is constant.
    """
    settings = dict(
        output_dir=str(out / "trainer"), optim=optimizer, learning_rate=learning_rate, max_grad_norm=clip,
        weight_decay=0.0, lr_scheduler_type="constant", max_steps=steps, per_device_train_batch_size=len(rows),
        bf16=False, use_cpu=True, activation_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, max_length=None,
    )  # fmt: skip
    record = _Record(directory)
    shared = dict(
        model=checkpoints.read(directory),
        processing_class=transformers.AutoTokenizer.from_pretrained(directory),
        callbacks=[record],
    )
    if task == "sft":
        data = [
            {"input_ids": row.prompt + row.chosen, "completion_mask": [0] * len(row.prompt) + [1] * len(row.chosen)}
            for row in rows
        ]
        arguments = SFTConfig(completion_only_loss=True, **settings)
        trainer = _SFT(args=arguments, train_dataset=Dataset.from_list(data), **shared)
    else:
        data = [{f"{key}_input_ids": ids for key, ids in dataclasses.asdict(row).items()} for row in rows]
        arguments = DPOConfig(beta=0.1, loss_type="sigmoid", label_smoothing=label_smoothing, **settings)
        trainer = _DPO(
            ref_model=checkpoints.read(reference) if reference else None,
            args=arguments, train_dataset=Dataset.from_list(data), **shared,
        )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return [
        Step(log["loss"], log["grad_norm"], log.get("rewards/margins", 0.0), params)
        for log, params in zip(logs, record.params, strict=True)
    ]


def to_ours(model, directory: pathlib.Path) -> dict[str, np.ndarray]:
    """The parameters of a torch model by our paths; `directory` holds its configuration."""
    with tempfile.TemporaryDirectory() as out:
        model.save_pretrained(out)
        return checkpoints_hf.read(out, checkpoints_hf.read_config(directory))
