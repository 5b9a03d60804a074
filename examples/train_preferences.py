# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Stage 2 from Python: DPO teaches a policy to prefer the better of two answers.

```bash
python examples/train_preferences.py
python examples/train_preferences.py --model runs/demo/sft --dataset runs/demo/judge/preferences --max_steps 100
```

Without arguments, a tiny model with random weights learns in a few steps to prefer right answers to wrong ones about
synthetic scans.
"""

import argparse

from datasets import Dataset, load_dataset

from medst_trl import MultimodalDPOConfig, MultimodalDPOTrainer, adapter_config, load_policy
from medst_trl.data.schema import image_part, text_part
from medst_trl.demo.phantoms import MODALITIES, make_phantoms
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.policy.loading import prepare_policy
from medst_trl.policy.vusr import add_vusr


def synthetic_pairs(count: int) -> Dataset:
    """Preference pairs in TRL's columns: the right modality of a scan against a wrong one."""
    rows = []
    for phantom in make_phantoms(count, seed=0, split="unlabelled"):
        right = phantom.truth.modality
        wrong = next(name for name in MODALITIES if name != right)
        rows.append(
            {
                "id": phantom.id,
                "images": [phantom.image],
                "prompt": [{"role": "user", "content": [image_part(), text_part("Which modality is shown?")]}],
                "chosen": [{"role": "assistant", "content": [text_part(right)]}],
                "rejected": [{"role": "assistant", "content": [text_part(wrong)]}],
            }
        )
    return Dataset.from_list(rows)


def main(model_name: str | None, dataset_name: str | None, output_dir: str, max_steps: int) -> dict[str, float]:
    if model_name:
        model, processor = load_policy(model_name, is_trainable=True)
    else:
        model, processor = tiny_llava()
        prepare_policy(model, processor)
    new_adapter = None
    if not hasattr(model, "peft_config"):  # a stage-1 adapter is trained further, with a copy of it as the reference
        new_adapter = adapter_config(model, vusr_token_id=add_vusr(processor))

    trainer = MultimodalDPOTrainer(
        model=model,
        args=MultimodalDPOConfig(
            output_dir=output_dir,
            max_steps=max_steps,
            per_device_train_batch_size=8,
            learning_rate=5e-6 if model_name else 1e-3,  # of the language model; 5e-6 and 2e-5 are the paper's rates
            vision_learning_rate=2e-5 if model_name else 1e-3,
            projector_learning_rate=2e-5 if model_name else 1e-3,
            loss_type=["sigmoid", "sft"],  # the paper: ["sigmoid"]
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=load_dataset(dataset_name, split="train") if dataset_name else synthetic_pairs(64),
        processing_class=processor,
        peft_config=new_adapter,
    )
    trainer.train()
    trainer.save_model(output_dir)
    last = next(entry for entry in reversed(trainer.state.log_history) if "rewards/margins" in entry)
    print(f"Margin {last['rewards/margins']:.3f}, {last['rewards/accuracies']:.0%} of the pairs in the right order.")
    return last


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or Hub id of a policy; default: a tiny model with random weights")
    parser.add_argument("--dataset", help="directory or Hub id of preference pairs; default: synthetic ones")
    parser.add_argument("--output_dir", default="runs/example_preferences")
    parser.add_argument("--max_steps", type=int, default=20)
    args = parser.parse_args()
    main(args.model, args.dataset, args.output_dir, args.max_steps)
