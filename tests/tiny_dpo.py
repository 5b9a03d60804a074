# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A small stage-2 run: preference pairs about noise images, and an adapter that differs from its initial values.

As a script it runs in a separate process:
`python tests/tiny_dpo.py OUTPUT_DIR '{"max_steps": 6}' [--kill_after_step N]`
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from tiny_run import SMALL, KillAfterStep, small_policy, text, trained_weights

from medst_trl.base.processes import leave_peers
from medst_trl.policy.adapters import adapter_config
from medst_trl.policy.vusr import add_vusr
from medst_trl.training.dpo import MultimodalDPOConfig, MultimodalDPOTrainer
from medst_trl.training.resume import resume_checkpoint


__all__ = ["SMALL", "adapter_policy", "make_trainer", "pair", "save_adapter", "trained_weights"]


# A plugin whose loss `my_sigmoid` equals TRL's `sigmoid`.
SIGMOID = """
import torch.nn.functional as F

from medst_trl.training.losses import LOSSES, PreferenceLoss

class MySigmoid(PreferenceLoss):
    name = "my_sigmoid"
    paper = "https://example.org/paper"

    def __call__(self, pairs, args):
        ratios = pairs.log_ratios()
        return -F.logsigmoid(args.beta * (ratios.chosen - ratios.rejected))

LOSSES.register(MySigmoid())
"""


def pair(number: int) -> dict:
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    answers = [f"It is {'very ' * (2 + number % 3)}dark.", "bright"]
    return {
        "id": f"p{number}",
        "images": [Image.fromarray(pixels)],
        "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, *text(f"What about {number}?")]}],
        "chosen": [{"role": "assistant", "content": text(answers[0])}],
        "rejected": [{"role": "assistant", "content": text(answers[1])}],
    }


def adapter_policy(save_to: Path | None = None, **kwargs):
    """Return a policy with an adapter whose parts all differ from their initial values, as after stage 1."""
    model, processor = small_policy(**kwargs)
    if save_to is not None:
        model.save_pretrained(save_to / "base")
        processor.save_pretrained(save_to / "base")
        model.config._name_or_path = model.name_or_path = str(save_to / "base")
    ranks = {"r": 8, "lora_alpha": 16, "vision_r": 4, "vision_lora_alpha": 8, "lora_dropout": 0.0}
    torch.manual_seed(5)  # for the initialization of LoRA
    model = get_peft_model(model, adapter_config(model, vusr_token_id=add_vusr(processor), **ranks))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape)
    return model, processor


def save_adapter(directory: Path, name: str = "adapter"):
    """Save a base and, in `directory / name`, an adapter of it with its processor; return the model."""
    model, processor = adapter_policy(save_to=directory)
    model.save_pretrained(directory / name, save_embedding_layers=False)
    processor.save_pretrained(directory / name)
    return model


def make_trainer(output_dir: str | Path, policy="continued_adapter", **overrides) -> MultimodalDPOTrainer:
    rows = overrides.pop("rows", None) or [pair(number) for number in range(12)]
    eval_rows = overrides.pop("eval_rows", None)
    callbacks = overrides.pop("callbacks", None)
    data_collator = overrides.pop("data_collator", None)
    config = None
    if policy == "continued_adapter":
        policy = adapter_policy()
    elif policy in ("new_adapter", "full"):
        kind, policy = policy, small_policy()
        if kind == "new_adapter":
            config = adapter_config(policy[0], vusr_token_id=add_vusr(policy[1]), r=8, vision_r=4, lora_dropout=0.0)
    settings = {
        "output_dir": str(output_dir), "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1,
        "learning_rate": 1e-3, "report_to": "none", "lr_scheduler_type": "constant", "save_strategy": "no",
        "gradient_checkpointing": False, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return MultimodalDPOTrainer(
        model=policy[0],
        args=MultimodalDPOConfig(**{**settings, **overrides}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=policy[1],
        peft_config=config,
        callbacks=callbacks,
        data_collator=data_collator,
    )


if __name__ == "__main__":
    output_dir, overrides, *kill = sys.argv[1:]
    overrides = json.loads(overrides)
    if kill:
        overrides["callbacks"] = [KillAfterStep(int(kill[1]))]
    trainer = make_trainer(output_dir, **overrides)
    trainer.train(resume_from_checkpoint=resume_checkpoint(output_dir, trainer.accelerator))
    weights = trained_weights(trainer)
    if trainer.accelerator.is_main_process:
        torch.save(weights, os.path.join(output_dir, "weights.pt"))
        facts = {"world_size": trainer.accelerator.num_processes, "kind": str(trainer.accelerator.distributed_type)}
        Path(output_dir, "run.json").write_text(json.dumps(facts | {"log": trainer.state.log_history}))
    trainer.accelerator.wait_for_everyone()
    del trainer  # it holds the process group
    leave_peers()
