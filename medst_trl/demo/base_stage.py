# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Build a tiny LLaVA in code and train it on plain shapes and plain text, so that recipes run without a download.

```bash
medst base --output_dir runs/demo/base
```

It replaces the general-purpose vision-language model from which the paper starts. It knows squares, corners,
bright and dark, and medical words, but has seen no scan and no medical label.

Output in `output_dir`: the model (safetensors) and its processor, written when training is done. An interrupted run
resumes from its newest checkpoint.
"""

import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from medst_trl.base.settings import check_bounds, documented
from medst_trl.pipeline.stage import MODEL, STAGES, Output, RowCounter, Stage


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin, Trainer


# Settings of `TrainingArguments`.
_PASSED_ON = ("per_device_train_batch_size", "learning_rate", "warmup_steps", "save_steps", "logging_steps", "seed")


@documented
@dataclass
class BaseArguments:
    """
    Arguments of `medst base`.

    Args:
        output_dir (`str`):
            Directory for the model and its processor.
        num_texts (`int`, *optional*, defaults to `2000`):
            Number of conversations without a picture. The model is trained on them first.
        num_pictures (`int`, *optional*, defaults to `16000`):
            Number of pictures of plain shapes.
        turns (`int`, *optional*, defaults to `1`):
            Number of questions about each picture.
        per_device_train_batch_size (`int`, *optional*, defaults to `32`):
            Number of conversations per step.
        learning_rate (`float`, *optional*, defaults to `0.0007`):
            Peak learning rate.
        warmup_steps (`int`, *optional*, defaults to `30`):
            Number of steps until the peak learning rate.
        save_steps (`int`, *optional*, defaults to `200`):
            Number of steps between checkpoints.
        logging_steps (`int`, *optional*, defaults to `50`):
            Number of steps between log lines.
        seed (`int`, *optional*, defaults to `0`):
            Seed for the weights, the pictures and their order.
        overwrite (`bool`, *optional*, defaults to `False`):
            Delete the output of an earlier run and start again.
    """

    output_dir: str
    num_texts: int = 2000
    num_pictures: int = 16000
    turns: int = 1
    per_device_train_batch_size: int = 32
    learning_rate: float = 7e-4
    warmup_steps: int = 30
    save_steps: int = 200
    logging_steps: int = 50
    seed: int = 0
    overwrite: bool = False


def main(args: BaseArguments) -> None:
    from medst_trl.pipeline.record import StageRecord

    check(args)
    record = StageRecord.of(STAGE, args)
    if record.decision == "skip":
        return
    print(f"base: training a tiny model on {args.num_texts} plain texts and {args.num_pictures} pictures of shapes.")

    from medst_trl.policy.merging import staged_model
    from medst_trl.training.resume import newest_complete_checkpoint

    from .tiny_model import tiny_llava

    with record:
        model, processor = tiny_llava(seed=args.seed)
        trainer = _trainer(args, model, processor)
        result = trainer.train(resume_from_checkpoint=newest_complete_checkpoint(_run_directory(args)))
        with staged_model(Path(args.output_dir), ".saving") as staging:
            model.save_pretrained(staging)
            processor.save_pretrained(staging)
        shutil.rmtree(_run_directory(args))
        counts = {"parameters": model.num_parameters(), "steps": trainer.state.global_step}
        record.finish(counts=counts, training_loss=result.training_loss)
    loss = result.training_loss
    print(f"base: {counts['parameters']:,} parameters, training loss {loss:.3f}, in {args.output_dir}")


def check(args: BaseArguments) -> None:
    """Raise a `UserError` for numbers out of bounds."""
    counts = ("num_texts", "num_pictures", "turns", "per_device_train_batch_size", "save_steps", "logging_steps")
    check_bounds(args, at_least=dict.fromkeys(counts, 1) | {"warmup_steps": 0}, above={"learning_rate": 0})


def _run_directory(args: BaseArguments) -> Path:
    """Return the Trainer's directory. It is hidden, so that it does not count as part of the result."""
    return Path(args.output_dir) / ".run"


def _make_collator(processor: "ProcessorMixin") -> Callable[[list[dict]], dict]:
    """Make a collator of conversations in which every word is a target."""
    from medst_trl.training.collator import DataCollatorForSelfQuestioning

    # Stage 1's collator for its rendering. It adds `<vusr>` to its processor, so it gets a copy.
    collator = DataCollatorForSelfQuestioning(deepcopy(processor), sq_ratio=0.0)

    def collate(rows: list[dict]) -> dict:
        batch = collator(rows)
        batch.pop("question_mask")
        # As in pre-training every word is a target. Stage 1 does not train the output layer, so a word that was never
        # a target here, such as those that only questions have, could hardly be used in a question later.
        text = (batch["attention_mask"] == 1) & (batch["input_ids"] != processor.image_token_id)
        batch["labels"] = batch["input_ids"].masked_fill(~text, -100)
        return batch

    return collate


def _trainer(args: BaseArguments, model: "PreTrainedModel", processor: "ProcessorMixin") -> "Trainer":
    import torch
    from transformers import Trainer, TrainingArguments

    from medst_trl.training.upstream import ResumesExactly

    from .tiny_model import training_conversations

    # Plain Trainer: a tiny model on a CPU spends a third of its time on the statistics that SFTTrainer gathers.
    class ResumingTrainer(ResumesExactly, Trainer):
        pass

    training = TrainingArguments(
        output_dir=str(_run_directory(args)),
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        lr_scheduler_type="cosine",
        adam_beta2=0.95,
        weight_decay=0.01,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        save_total_limit=1,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        **{name: getattr(args, name) for name in _PASSED_ON},
    )
    return ResumingTrainer(
        model=model,
        args=training,
        train_dataset=training_conversations(args.num_texts, args.num_pictures, args.turns, args.seed),
        data_collator=_make_collator(processor),
        processing_class=processor,
    )


@cache
def _config() -> "PreTrainedConfig":
    """Return the configuration of the model after training."""
    from medst_trl.policy.loading import prepare_policy

    from .tiny_model import tiny_llava

    return prepare_policy(*tiny_llava()).config


def plan(counter: RowCounter, args: BaseArguments) -> Iterator[tuple[str, str]]:
    """Yield the stage's rows in a plan."""
    yield "trains", f"a tiny model on {args.num_texts:,} texts and {args.num_pictures:,} pictures, one epoch"


STAGE = STAGES.register(
    Stage(
        name="base",
        summary="build a tiny base model, so that recipes run without a download",
        help=__doc__,
        after=("convert",),
        arguments=lambda: (BaseArguments,),
        check=check,
        main=main,
        plan=plan,
        outputs=(Output("", MODEL, config=lambda settings: (deepcopy(_config()), False), is_published=False),),
        operational=frozenset({"save_steps", "logging_steps"}),
    )
)
