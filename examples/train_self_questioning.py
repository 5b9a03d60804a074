# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Stage 1 from Python: train a vision-language model to answer and ask questions, then let it ask one.

```bash
python examples/train_self_questioning.py
python examples/train_self_questioning.py --model llava-hf/llava-1.5-7b-hf --dataset runs/vqa_rad/prepare/instruct
```

Without arguments, it trains a tiny model on synthetic scans for a few steps. This shows how to use the trainer. The
model learns almost nothing.
"""

import argparse

from datasets import Dataset, load_dataset

from medst_trl import SelfQuestioningConfig, SelfQuestioningTrainer, adapter_config, load_policy
from medst_trl.data.schema import instruct_features
from medst_trl.demo.phantoms import instruct_rows, make_phantoms
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.policy.loading import prepare_policy
from medst_trl.policy.vusr import VUSR, add_vusr


def main(model_name: str | None, dataset_name: str | None, output_dir: str, max_steps: int) -> str:
    if model_name:
        model, processor = load_policy(model_name)
    else:
        model, processor = tiny_llava()
        prepare_policy(model, processor)

    if dataset_name:
        dataset = load_dataset(dataset_name, split="train")
    else:
        rows = list(instruct_rows(make_phantoms(64, seed=0), seed=0))
        dataset = Dataset.from_list(rows, features=instruct_features())

    trainer = SelfQuestioningTrainer(
        model=model,
        args=SelfQuestioningConfig(
            output_dir=output_dir,
            max_steps=max_steps,
            per_device_train_batch_size=8,
            learning_rate=2e-4,  # of the language model; all three are the paper's rates
            vision_learning_rate=5e-5,
            projector_learning_rate=2e-5,
            sq_ratio=0.5,  # the model learns to write half of the questions
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=dataset,
        processing_class=processor,
        peft_config=adapter_config(model, vusr_token_id=add_vusr(processor)),
    )
    trainer.train()
    trainer.save_model(output_dir)  # adapter, processor and template, for load_policy(output_dir)

    image = dataset[0]["images"][0].convert("RGB")
    bare = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": VUSR}]}]
    inputs = processor.apply_chat_template(bare, tokenize=True, return_dict=True, return_tensors="pt").to(model.device)
    tokens = trainer.model.generate(**inputs, do_sample=True, max_new_tokens=24)
    question = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"The model asks about the first image: {question!r}")
    return question


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or Hub id; default: a tiny model with random weights")
    parser.add_argument("--dataset", help="directory or Hub id of an instruct dataset; default: synthetic scans")
    parser.add_argument("--output_dir", default="runs/example")
    parser.add_argument("--max_steps", type=int, default=20)
    args = parser.parse_args()
    main(args.model, args.dataset, args.output_dir, args.max_steps)
