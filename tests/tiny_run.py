# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A small stage-1 run: four-turn conversations about noise images, and a LLaVA with 60k parameters.

As a script it runs in a separate process, which a test can kill or start with two ranks:
`python tests/tiny_run.py OUTPUT_DIR '{"max_steps": 6}' [--kill_after_step N | ...]`

`--kill_while_saving N` kills it in the middle of a checkpoint. `--term_in_step N` sends SIGTERM to the process group
of the last rank, with the workers of its data loader.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Value
from PIL import Image
from transformers import TrainerCallback

from medst_trl.base.processes import leave_peers
from medst_trl.data.schema import instruct_features
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.policy.adapters import adapter_config
from medst_trl.policy.loading import prepare_policy
from medst_trl.policy.vusr import add_vusr
from medst_trl.training.resume import resume_checkpoint
from medst_trl.training.sft import SelfQuestioningConfig, SelfQuestioningTrainer


SMALL = {
    "image_size": 16, "patch_size": 8, "vision_size": 32, "vision_layers": 3, "text_size": 32, "text_layers": 2,
    "vocab_size": 400,
}  # fmt: skip


def text(content: str) -> list[dict]:
    return [{"type": "text", "text": content}]


def conversation(number: int, turns: int = 2, with_image: bool = True) -> dict:
    """Return an example with its own image and a few turns of different lengths."""
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    messages = []
    for turn in range(turns):
        question, answer = f"What about {number} in turn {turn}?", "It is " + "very " * ((number + turn) % 4) + "dark."
        image = [{"type": "image", "text": None}] if turn == 0 and with_image else []
        messages.append({"role": "user", "content": [*image, *text(question)]})
        messages.append({"role": "assistant", "content": text(answer)})
    return {"id": f"r{number}", "images": [Image.fromarray(pixels)] * with_image, "messages": messages}


def write_instruct(
    directory: Path,
    numbers: Iterable[int],
    split: str = "train",
    *,
    turns: int = 2,
    features: dict | None = None,
    **columns,
) -> str:
    """Write an instruct dataset with one conversation per number, whose id is `r<number>`, and text `columns`."""
    rows = [{**conversation(n, turns), "image_ids": [f"{n:064x}"], **columns} for n in numbers]
    for message in (message for row in rows for message in row["messages"]):
        message["vusr"] = False
    directory.mkdir(exist_ok=True)
    extra = {name: Value("string") for name in columns}
    dataset = Dataset.from_list(rows, features=Features({**instruct_features(), **(features or {}), **extra}))
    dataset.to_parquet(directory / f"{split}-00000-of-00001.parquet")
    return str(directory)


def small_policy(**kwargs):
    model, processor = tiny_llava(**{**SMALL, **kwargs})
    return prepare_policy(model, processor), processor


def make_trainer(output_dir: str | Path, n: int = 16, lora: bool = True, **overrides) -> SelfQuestioningTrainer:
    callbacks = overrides.pop("callbacks", None)
    eval_dataset = overrides.pop("eval_dataset", None)
    model_kwargs = overrides.pop("model", {})
    rows = overrides.pop("rows", None) or [conversation(i, with_image=i % 5 != 1) for i in range(n)]
    features = overrides.pop("features", None)
    dropout = overrides.pop("lora_dropout", 0.05)
    policy = overrides.pop("policy", None)  # model, processor, adapter configuration
    settings = {
        "output_dir": str(output_dir), "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1,
        "learning_rate": 1e-3, "report_to": "none", "lr_scheduler_type": "constant", "save_strategy": "no",
        "gradient_checkpointing": False, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    if policy is None:
        model, processor = small_policy(**model_kwargs)
        ranks = {"r": 8, "lora_alpha": 16, "vision_r": 4, "vision_lora_alpha": 8}
        config = adapter_config(model, vusr_token_id=add_vusr(processor), lora_dropout=dropout, **ranks)
    else:
        model, processor, config = policy
    return SelfQuestioningTrainer(
        model=model,
        args=SelfQuestioningConfig(**{**settings, **overrides}),
        train_dataset=Dataset.from_list(rows, features=features),
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=config if lora else None,
        callbacks=callbacks,
    )


def train(output_dir: str | Path, **overrides) -> SelfQuestioningTrainer:
    """Train from the newest complete checkpoint, if there is one."""
    trainer = make_trainer(output_dir, **overrides)
    trainer.train(resume_from_checkpoint=resume_checkpoint(output_dir, trainer.accelerator))
    return trainer


def trained_weights(trainer: SelfQuestioningTrainer) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class KillAfterStep(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class SignalInStep(TrainerCallback):
    """Send signals to this process while the gradients of a step (the first is 1) are computed, or to its group."""

    def __init__(self, step: int, *numbers: signal.Signals, to_group: bool = False):
        self.step = step
        self.numbers = numbers
        self.to_group = to_group

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and args.process_index == args.world_size - 1:
            for number in self.numbers:
                if self.to_group:  # by another process: a worker exits silently if its parent asks it to
                    subprocess.run(["kill", "-s", str(int(number)), "--", f"-{os.getpgid(0)}"])
                else:
                    os.kill(os.getpid(), number)


def kill_while_saving(step: int) -> None:
    """Kill the process when half of the optimizer state of checkpoint `step` is written."""
    save = torch.save

    def killing_save(obj, file, *args, **kwargs):
        save(obj, file, *args, **kwargs)
        if f"checkpoint-{step}" in str(file) and str(file).endswith("optimizer.pt"):
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = killing_save


if __name__ == "__main__":
    output_dir, overrides, *kill = sys.argv[1:]
    overrides = json.loads(overrides)
    if kill and kill[0] == "--kill_after_step":
        overrides["callbacks"] = [KillAfterStep(int(kill[1]))]
    elif kill and kill[0] == "--term_in_step":
        if os.getpgid(0) != os.getpid():  # a rank of a launch has its own group already
            os.setpgid(0, 0)
        overrides["callbacks"] = [SignalInStep(int(kill[1]), signal.SIGTERM, to_group=True)]
    elif kill:
        kill_while_saving(int(kill[1]))
    trainer = train(output_dir, **overrides)
    weights = trained_weights(trainer)
    if trainer.accelerator.is_main_process:
        torch.save(weights, os.path.join(output_dir, "weights.pt"))
        facts = {"world_size": trainer.accelerator.num_processes, "kind": str(trainer.accelerator.distributed_type)}
        Path(output_dir, "run.json").write_text(json.dumps(facts | {"log": trainer.state.log_history}))
    trainer.accelerator.wait_for_everyone()
    del trainer  # it holds the process group
    leave_peers()
