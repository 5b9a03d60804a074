# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Extra cost of the self-questioning collator over TRL's stock vision collator, as a share of a training step.

```bash
python tests/benchmarks/bench_collator.py --images vqa_rad/images
```

The same batches are collated by TRL's collator (with assistant-only loss, which needs `{% generation %}` markers) and
by ours. The training step is forward, backward and optimizer step of a tiny LLaVA. Figures are medians of `--repeats`
rounds over all batches in one process.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.policy.loading import prepare_policy
from medst_trl.training.collator import DataCollatorForSelfQuestioning


def examples(directory: Path | None, count: int, turns: int) -> list[dict]:
    """Return conversations of `turns` turns about real images or about noise of a similar size."""
    paths = sorted(directory.iterdir())[:count] if directory else []
    rng = np.random.default_rng(0)
    noise = lambda: Image.fromarray(rng.integers(0, 255, (700, 700, 3), dtype=np.uint8))  # noqa: E731
    images = [Image.open(path).convert("RGB") for path in paths] or [noise() for _ in range(count)]
    part = lambda value: [{"type": "text", "text": value}]  # noqa: E731
    rows = []
    for number, image in enumerate(images):
        messages = []
        for turn in range(turns):
            first = [{"type": "image"}] if turn == 0 else []
            messages.append(
                {"role": "user", "content": [*first, *part(f"Is there a pleural effusion on side {turn}?")]}
            )
            messages.append(
                {"role": "assistant", "content": part("No, the costophrenic angles are sharp." * (1 + turn % 2))}
            )
        rows.append({"id": str(number), "images": [image], "messages": messages})
    return rows


def seconds_per_batch(function, batches) -> float:
    start = time.perf_counter()
    for batch in batches:
        function(batch)
    return (time.perf_counter() - start) / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="directory of images; default: noise of 700 x 700 pixels")
    parser.add_argument("--count", type=int, default=64, help="number of conversations")
    parser.add_argument("--turns", type=int, default=4, help="number of question-answer pairs per conversation")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    model, processor = tiny_llava()
    stock_processor = tiny_llava()[1]
    prepare_policy(model, processor)
    rows = examples(args.images, args.count, args.turns)
    batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    stock = DataCollatorForVisionLanguageModeling(stock_processor, assistant_only_loss=True)
    ours = DataCollatorForSelfQuestioning(processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(inputs: dict) -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    collated = [{k: v for k, v in ours(batch).items() if k != "question_mask"} for batch in batches]
    times = {"stock": [], "ours": [], "step": []}
    for _ in range(args.repeats + 1):  # the first round warms up
        times["stock"].append(seconds_per_batch(stock, batches))
        times["ours"].append(seconds_per_batch(ours, batches))
        times["step"].append(seconds_per_batch(step, collated))
    rounds = list(zip(*(times[name][1:] for name in ("stock", "ours", "step")), strict=True))
    for name, values in times.items():
        print(f"{name:<5} {1000 * statistics.median(values[1:]):8.1f} ms per batch of {args.batch_size}")
    share = statistics.median((ours_ - stock_) / (stock_ + step_) for stock_, ours_, step_ in rounds)
    ratio = statistics.median(ours_ / stock_ for stock_, ours_, _ in rounds)
    print(f"ours / stock {ratio:.3f}; extra cost {100 * share:+.2f}% of a training step (stock collator + model)")


if __name__ == "__main__":
    main()
