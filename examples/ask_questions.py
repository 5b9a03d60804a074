# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Let a trained policy ask questions: send an image and a bare `<vusr>`, and the model writes a question.

```bash
python examples/ask_questions.py runs/demo/sft
```

It asks about synthetic scans that no stage has used, and counts the questions that the scan can answer.
"""

import argparse

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from medst_trl import load_policy
from medst_trl.demo.phantoms import is_well_formed, make_phantoms
from medst_trl.policy.vusr import VUSR


def ask(
    model: PreTrainedModel, processor: ProcessorMixin, images: list[Image.Image], batch_size: int = 50, **sampling
) -> list[str]:
    """Sample one question about each image."""
    questions = []
    for start in range(0, len(images), batch_size):
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": VUSR}]}]
            for image in images[start : start + batch_size]
        ]
        inputs = processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(model.device)
        tokens = model.generate(**inputs, max_new_tokens=32, do_sample=True, **sampling)
        questions += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [question.strip() for question in questions]


def measure(model_name_or_path: str, count: int, seed: int, **sampling) -> tuple[float, float]:
    """Return the share of sampled questions that are well-formed, and the share that the scan can answer."""
    model, processor = load_policy(model_name_or_path)
    phantoms = make_phantoms(count, seed, split="unlabelled")
    torch.manual_seed(seed)
    questions = ask(model, processor, [phantom.image.convert("RGB") for phantom in phantoms], **sampling)
    for question in dict.fromkeys(questions[:8]):
        print(f"  {question}")
    answerable = [is_well_formed(question, p.truth) for question, p in zip(questions, phantoms, strict=True)]
    return sum(map(is_well_formed, questions)) / count, sum(answerable) / count


def main(model_name_or_path: str, count: int, seed: int) -> float:
    well_formed, answerable = measure(model_name_or_path, count, seed, temperature=1.0, top_p=0.95)
    print(
        f"{well_formed:.0%} of {count} sampled questions are well-formed, "
        f"{answerable:.0%} can be answered from the scan."
    )
    return answerable


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_name_or_path", help="directory or Hub id of a policy or its adapter")
    parser.add_argument("--count", type=int, default=200, help="number of synthetic scans")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    main(args.model_name_or_path, args.count, args.seed)
