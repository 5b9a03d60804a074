# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What both training stages do with data and folder: open them, name the settings, leave the result."""

import os
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError


if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from medst_trl.pipeline.record import StageRecord

# Arguments of the Trainer that change nothing in what is learned, so a resumed run may change them.
_OPERATIONAL_PREFIXES = (
    "logging_", "log_", "report_to", "run_name", "trackio_", "disable_tqdm", "save_", "hub_", "push_to_hub",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "resume_from_checkpoint", "ddp_", "gradient_checkpointing", "activation_checkpointing", "include_",
    "debug", "skip_memory_metrics", "use_cpu", "local_rank", "deepspeed", "fsdp", "parallelism_config",
    "torch_empty_cache_steps", "ref_log_probs_dir", "precompute_ref_batch_size",
)  # fmt: skip


def load_splits(args: Any, training_args: "TrainingArguments", kind: str) -> "dict[str, Dataset]":
    """The datasets that `args` names, checked: `train`, and `eval` if there is to be an evaluation."""
    names = [args.dataset] if isinstance(args.dataset, str) else args.dataset
    datasets = {"train": _load(names, args.train_split, kind)}
    if training_args.eval_strategy != "no":
        datasets["eval"] = _load(names, args.validation_split, kind)
    if args.max_records is not None:
        datasets["train"] = datasets["train"].select(range(min(args.max_records, len(datasets["train"]))))
    return datasets


def _load(names: "Sequence[str]", split: str, kind: str) -> "Dataset":
    """
    One split of one or several datasets, one behind the other. An id that an earlier one has taken gets its dataset's
    place behind it (`17@2`): draws of `<vusr>` turns and `rejected.jsonl` go by the id.
    """
    from datasets import concatenate_datasets

    from medst_trl.data.schema import check_columns, features_of, load_records

    datasets = [load_records(name, split) for name in names]
    for name, dataset in zip(names, datasets):
        try:
            check_columns(dataset, kind)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    if len(datasets) == 1:
        return datasets[0]
    features = features_of(kind)
    taken, joined = set(), []
    for place, dataset in enumerate(datasets, start=1):
        dataset = dataset.select_columns(list(features))
        if dataset.features != features:  # such as large strings; a cast copies the images
            dataset = dataset.cast(features)
        ids = [f"{name}@{place}" if name in taken else name for name in dataset["id"]]
        taken.update(ids)
        joined.append(dataset.remove_columns("id").add_column("id", ids))
    return concatenate_datasets(joined)


def open_record(args: Any, training_args: "TrainingArguments", stage: str) -> "StageRecord":
    """The stage's record in `output_dir`, see [`StageRecord.open`]."""
    from medst_trl.pipeline.record import StageRecord
    from medst_trl.training.batch_size import HOW_A_STEP_IS_DIVIDED

    return StageRecord.open(
        training_args.output_dir,
        stage=stage,
        settings=asdict(args) | settings_of(training_args),
        inputs={"model_name_or_path": args.model_name_or_path, "dataset": args.dataset},
        operational=operational_settings(training_args)
        | (HOW_A_STEP_IS_DIVIDED if args.effective_batch_size else set()),
        overwrite=args.overwrite,
    )


def settings_of(training_args: "TrainingArguments") -> dict:
    """The arguments as they were given; `to_dict()` adds what the machine is, which may differ when continued."""
    return {item.name: getattr(training_args, item.name) for item in fields(training_args) if item.init}


def operational_settings(training_args: "TrainingArguments") -> set[str]:
    """Names of the arguments that may change when a run is continued."""
    return {name for name in training_args.to_dict() if name.startswith(_OPERATIONAL_PREFIXES)}


def save_adapter(trainer: "Trainer") -> None:
    """Adapter (or model), processor and the Trainer's state appear in `output_dir` file by file, each complete."""
    final, temporary = trainer.args.output_dir, os.path.join(trainer.args.output_dir, ".adapter.incomplete")
    trainer.save_model(temporary)
    if trainer.args.should_save:
        trainer.save_state()
        for name in os.listdir(temporary):
            os.replace(os.path.join(temporary, name), os.path.join(final, name))
        os.rmdir(temporary)


class OwnModelCard:
    """Mixin for TRL's trainers, whose card is for a text model: [`write_model_card`] writes one for an image model."""

    def create_model_card(self, *args, **kwargs):
        pass


def write_model_card(trainer: "Trainer") -> None:
    """The card of what the run has made, from its `stage.json`, which has to be finished."""
    if trainer.args.should_save:
        from medst_trl.hub.cards import write_card

        write_card(trainer.args.output_dir)
