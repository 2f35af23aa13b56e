"""DPO updates by TRL's trainer, one for every request: `python trl_dpo.py SETTINGS.json`, asked by benchmarks/peers.py.

The rows are token ids already. An update takes all of them, `micro` pairs at a time. Its time runs from TRL's
on_step_begin to on_step_end: forwards, backward, clipping, optimiser; without collating and logging, which lie outside.
"""

import json
import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import peft
import tokenizers
import torch
import transformers
import trl.import_utils as trl_imports
from datasets import Dataset
from worker import Clock, Memory, requests

# trl 0.28 takes the answer of transformers for a bool; transformers 5 answers (found, version), always true.
_found = trl_imports._is_package_available
trl_imports._is_package_available = lambda name, return_version=False: (
    _found(name, True) if return_version else bool(_found(name)[0])
)
from trl import DPOConfig, DPOTrainer  # noqa: E402


class Trainer(DPOTrainer):
    """Takes rows that are token ids, in their order, and keeps what each update computed."""

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def concatenated_forward(self, model, batch, is_ref_model=False):
        found = super().concatenated_forward(model, batch, is_ref_model)
        if not is_ref_model:
            self.logps.append(torch.stack([found["chosen_logps"], found["rejected_logps"]], dim=1).detach())
        return found

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class OnRequest(transformers.TrainerCallback):
    """An update begins when it is asked for."""

    def __init__(self, memory: Memory, gpu: bool):
        self.requests, self.answer = requests()
        self.memory, self.gpu, self.trainer = memory, gpu, None

    def on_step_begin(self, args, state, control, **_):
        for request in self.requests:
            if request["do"] == "step":
                break
            peak = self.memory.peak()
            if self.gpu:
                peak = {"growth": torch.cuda.max_memory_allocated(), "process": torch.cuda.max_memory_reserved()}
            self.answer(**peak)
        else:
            os._exit(0)  # nothing is left to do, and the trainer must not go on
        self.trainer.losses, self.trainer.logps = [], []
        self.clock = Clock()

    def on_step_end(self, args, state, control, **_):
        if self.gpu:
            torch.cuda.synchronize()
        taken = self.clock.stop()
        trainer = self.trainer
        loss = torch.stack(trainer.losses).double().mean().item()
        self.answer(**taken, loss=loss, logps=torch.cat(trainer.logps).double().tolist())


def main() -> None:
    s = json.loads(pathlib.Path(sys.argv[1]).read_text())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not s["gpu"] and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    callback = OnRequest(Memory(), s["gpu"])
    dtype = getattr(torch, s["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(s["model"], dtype=dtype)
    if s["adapter"]:
        model = peft.PeftModel.from_pretrained(model, s["adapter"], is_trainable=True)
        if s["remat"]:
            model.enable_input_require_grads()
    rows = [
        {"prompt_input_ids": row["prompt"], "chosen_input_ids": chosen, "rejected_input_ids": rejected}
        for row in s["rows"]
        for chosen, *rest in [row["responses"]]
        for rejected in rest
    ]
    with tempfile.TemporaryDirectory() as out:
        arguments = DPOConfig(
            output_dir=out, beta=s["beta"], loss_type="sigmoid", optim="adamw_torch", learning_rate=s["learning_rate"],
            weight_decay=0.0, max_grad_norm=s["clip"], lr_scheduler_type="constant", max_steps=10**6,
            per_device_train_batch_size=s["micro"], gradient_accumulation_steps=len(rows) // s["micro"],
            use_logits_to_keep=s["logits_to_keep"], activation_checkpointing=s["remat"], bf16=dtype == torch.bfloat16,
            use_cpu=not s["gpu"], max_length=None, logging_steps=10**6, save_strategy="no", report_to="none",
            disable_tqdm=True, dataloader_pin_memory=s["gpu"],
        )  # fmt: skip
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, "<pad>"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
        trainer = Trainer(
            model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            callbacks=[callback],
        )  # fmt: skip
        callback.trainer = trainer
        trainer.train()


if __name__ == "__main__":
    main()
