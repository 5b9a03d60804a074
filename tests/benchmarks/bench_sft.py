# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
How long a step of SFT on conversations about images takes: ours, packed or not, and TRL's SFTTrainer.

```bash
python tests/benchmarks/bench_sft.py                                  # lengths of VQA-RAD, images drawn
python tests/benchmarks/bench_sft.py --shape cpu_64                   # the same with 64 tokens an image
python tests/benchmarks/bench_sft.py --images vqa_rad/images          # real images instead of drawn ones
python tests/benchmarks/bench_sft.py --shape llava_7b --output sft_7b.json
```

Conversations as long as those of VQA-RAD, the same for all ways, as are weights, batch size and settings; the loss of
the first batch is compared before anything is timed. A repetition is one epoch of each trainer's own `train()`,
collating included:

- `stock`: `trl.SFTTrainer`, loss on the answers, padded batches
- `ours`: `SelfQuestioningTrainer` as it is by default, without questions as targets (`sq_ratio=0`), so that the
  training is the same
- `ours, grouped`: the same in batches of about equal length
- `ours, packed`: with `pack_sequences`

The floor is what the operations of a conversation without any padding take at the rate of a large matrix product.
What a way executes beyond them is padding (and recomputing under gradient checkpointing).
"""

import argparse
import copy
import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from flops import Layout, computed_again, fewer_operations, training, weights_of
from measure import Machine, Row, add_common_arguments, alternate, report
from shapes import SHAPES, Shape, build_model, build_processor, conversations
from steps import (
    Epoch,
    batches_of,
    check_equal,
    common_arguments,
    copy_trained,
    evaluated,
    largest_that_fits,
    scored_positions,
    twin,
)
from trl import SFTConfig, SFTTrainer

from medst_trl.policy.adapters import adapter_config
from medst_trl.training.sft import SelfQuestioningConfig, SelfQuestioningTrainer


OURS = {
    "ours": {},
    "ours, grouped": {"train_sampling_strategy": "group_by_length"},
    "ours, packed": {"pack_sequences": True},
}
WAYS = ("stock", *OURS)


@dataclass(frozen=True)
class Setting:
    """A setting: conversations, batch size, and the variants to compare, the first of which is the baseline."""

    shape: Shape
    device: torch.device
    batch_size: int
    batches: int
    ways: Sequence[str] = WAYS
    gradient_checkpointing: bool = False
    images: Path | None = None
    attention: str = "sdpa"

    @property
    def what(self) -> str:
        checkpointing = ", checkpointing" if self.gradient_checkpointing else ""
        return f"SFT step, {self.shape.image_tokens} tokens an image{checkpointing}"


def make_trainers(setting: Setting, model: "torch.nn.Module", dataset: Dataset) -> dict[str, SFTTrainer]:
    """A trainer for each variant, all with the same weights."""
    shape, trainers = setting.shape, {}
    common = common_arguments(setting.batch_size, setting.device, shape.dtype, setting.gradient_checkpointing)
    for way in setting.ways:
        policy = twin(model, share_weights=shape.lora)
        kwargs = {"model": policy, "train_dataset": dataset, "processing_class": build_processor(shape)}
        if shape.lora:
            kwargs["peft_config"] = adapter_config(policy)
        if way == "stock":
            trainers[way] = SFTTrainer(args=SFTConfig(max_length=2048, assistant_only_loss=True, **common), **kwargs)
        else:
            args = SelfQuestioningConfig(sq_ratio=0.0, **common, **OURS[way])
            trainers[way] = SelfQuestioningTrainer(args=args, **kwargs)
    for trainer in trainers.values():
        copy_trained(trainers[setting.ways[0]].model, trainer.model)
    return trainers


def operations(setting: Setting, trainer: SFTTrainer, lengths: list[int]) -> tuple[float, float]:
    """
    Operations of an epoch: those of the conversations alone, and those executed, with padding and what is computed
    twice.
    """
    batches = batches_of(trainer)
    images = sum(batch["images"] for batch in batches)
    labelled = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    padded = [batch["input_ids"].shape[1] for batch in batches for _ in batch["input_ids"]]
    scored = scored_positions(setting.device, labelled, sum(padded) - len(padded))
    config, weights = trainer.model.config, weights_of(trainer.model)
    needed, executed = Layout(images, lengths, labelled), Layout(images, padded, scored)
    again = computed_again(config, weights, executed, setting.gradient_checkpointing)
    return training(config, weights, needed), training(config, weights, executed) + again


def measure(setting: Setting, model: "torch.nn.Module", machine: Machine, repeats: int) -> list[Row]:
    """The rows of one setting."""
    count = setting.batch_size * setting.batches
    dataset = conversations(setting.shape, build_processor(setting.shape), count, images=setting.images)
    trainers = make_trainers(setting, model, dataset)
    first = [dataset[number] for number in range(setting.batch_size)]
    same = check_equal(
        {way: evaluated(trainer, copy.deepcopy(first)) for way, trainer in trainers.items()}, setting.shape.dtype
    )
    epochs = {way: Epoch(trainer, setting.device) for way, trainer in trainers.items()}
    for epoch in epochs.values():
        epoch.warm_up()
    runs = alternate(epochs, repeats)
    stock = trainers[setting.ways[0]]
    lengths = [int(length) for batch in batches_of(stock) for length in batch["attention_mask"].sum(1)]
    counted = {way: operations(setting, trainer, lengths) for way, trainer in trainers.items()}
    rows = []
    for way in setting.ways:
        needed, executed = counted[way]
        notes = [
            f"{setting.batches} batches of {setting.batch_size}",
            fewer_operations(*counted[setting.ways[0]], *counted[way]),
        ]
        notes += [f"{min(lengths)} to {max(lengths)} tokens", same] if way == setting.ways[0] else []
        rows.append(
            Row(
                what=setting.what, way=way, unit="conversation", runs=runs[way], stock=runs[setting.ways[0]],
                tokens=sum(lengths) / len(lengths), flops=needed / len(lengths),
                executed_flops=executed / len(lengths), floor_seconds=machine.seconds_for(needed / len(lengths)),
                notes="; ".join(notes),
            )
        )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="the first is compared with")
    parser.add_argument("--batch_size", type=int, help="conversations a batch; halved where one does not fit")
    parser.add_argument("--batches", type=int, help="batches a repetition")
    parser.add_argument("--attention", default="sdpa", help="of ours and of stock, for example flash_attention_2")
    args = parser.parse_args(arguments)

    shape, device = SHAPES[args.shape], torch.device(args.device or SHAPES[args.shape].device)
    machine = Machine.measure(device, shape.dtype, quick=args.shape == "tiny")
    model = build_model(shape, build_processor(shape), device, attention=args.attention).requires_grad_(not shape.lora)
    rows = []
    for checkpointing in (True, False) if device.type == "cuda" else (False,):
        setting = Setting(
            shape, device, args.batch_size or shape.sft[0], args.batches or shape.sft[1], args.ways, checkpointing,
            args.images, args.attention,
        )  # fmt: skip
        rows += largest_that_fits(
            setting.what,
            setting.batch_size,
            lambda size: measure(replace(setting, batch_size=size), model, machine, args.repeats),  # noqa: B023
        )
        gc.collect()
    settings = {
        "shape": args.shape, "repeats": args.repeats, "attention": args.attention,
        "images": "real" if args.images else "drawn",
    }  # fmt: skip
    return report("SFT", settings, machine, rows, args.output)


if __name__ == "__main__":
    main()
