# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What the two training stages share: settings and their checks, data, policy, run directory, and how a run ends."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.training.arguments import UsualSettings

from .batch_size import DIVISION_SETTINGS, division_of, set_accumulation


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainingArguments

    from medst_trl.pipeline.record import StageRecord

# Training arguments that do not affect what is learned, so that a resumed run may change them.
_OPERATIONAL_PREFIXES = (
    "logging_", "log_", "report_to", "run_name", "trackio_", "disable_tqdm", "save_", "hub_", "push_to_hub",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "resume_from_checkpoint", "ddp_", "gradient_checkpointing", "activation_checkpointing", "include_",
    "debug", "skip_memory_metrics", "use_cpu", "local_rank", "deepspeed", "fsdp", "parallelism_config",
    "torch_empty_cache_steps", "ref_log_probs_dir", "precompute_ref_batch_size",
)  # fmt: skip

_AT_LEAST = {
    "max_records": 1, "lora_r": 0, "vision_lora_r": 0, "lora_alpha": 1, "vision_lora_alpha": 1, "lora_dropout": 0,
    "early_stopping_patience": 1, "max_length": 1, "sq_ratio": 0, "question_loss_weight": 0, "learning_rate": 0,
    "vision_learning_rate": 0, "projector_learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
}  # fmt: skip
_AT_MOST = {"lora_dropout": 1, "sq_ratio": 1}


@dataclass
class PolicyArguments:
    """Which policy a stage trains, on which data, and with which adapter."""

    model_name_or_path: str = field(
        metadata={"help": "Directory or Hub id of a vision-language model, or of an adapter to train further."}
    )
    dataset: str = field(metadata={"help": "Directory or Hub id of the dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(
        default="validation", metadata={"help": "Split to evaluate on if eval_strategy is steps or epoch."}
    )
    max_records: int | None = field(default=None, metadata={"help": "Train only on the first N records."})
    use_lora: bool = field(
        default=True,
        metadata={"help": "Train a LoRA adapter: the model's own, or else a new one. False trains all weights."},
    )
    lora_r: int = field(
        default=128, metadata={"help": "LoRA rank in the language model, for a new adapter. 0 freezes the model."}
    )
    lora_alpha: int = field(default=256, metadata={"help": "LoRA scale in the language model, for a new adapter."})
    vision_lora_r: int = field(
        default=32, metadata={"help": "LoRA rank in the vision tower, for a new adapter. 0 freezes the tower."}
    )
    vision_lora_alpha: int = field(default=64, metadata={"help": "LoRA scale in the vision tower, for a new adapter."})
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model of the adapter, if it has moved."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the frozen weights, for example float32 or bfloat16. Default: bfloat16 or float16 if "
            "bf16 or fp16 is set, and float32 if all weights are trained. The trained weights of an adapter are "
            "always float32."
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "QLoRA: load the frozen language model in 4 bits (NF4) to save GPU memory. Needs bitsandbytes "
            "(extra qlora)."
        },
    )
    effective_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of examples per optimizer step over all processes. gradient_accumulation_steps is "
            "computed from it, per_device_train_batch_size and the number of processes."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention implementation: sdpa, eager, flash_attention_2, ... Default: chosen by the model."
        },
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Delete the results of an earlier run in output_dir and start again."}
    )


def listed_settings(own: type) -> type:
    """A trainer's own settings and the usual ones of TRL, for `--help`."""
    return make_dataclass("TrainingSettings", [], bases=(own, UsualSettings))


def train_policy(
    args: PolicyArguments,
    training_args: "TrainingArguments",
    *,
    stage: str,
    kind: str,
    examples: str,
    make_trainer: "Callable[[dict[str, Dataset]], Trainer]",
    summarize: "Callable[[Trainer, int], tuple[dict[str, Any], dict[str, float], str]]",
) -> None:
    """
    Train, from the newest complete checkpoint if there is one, and leave adapter, processor, record and card.

    Args:
        args ([`PolicyArguments`]):
            The stage's arguments, checked.
        training_args ([`~transformers.TrainingArguments`]):
            Those of its trainer.
        stage (`str`):
            Name of the stage.
        kind (`str`):
            Kind of the dataset, see `KINDS`.
        examples (`str`):
            What its rows are called.
        make_trainer (`Callable`):
            From the datasets (`train` and, with an evaluation, `eval`) to the trainer.
        summarize (`Callable`):
            From the trained trainer and the number of records to counts and metrics for `stage.json`, and a summary
            for people. Called on every rank.
    """
    from medst_trl.base.files import explain_full_disk
    from medst_trl.training.resume import resume_checkpoint

    set_accumulation(args, training_args)
    datasets = load_splits(args, training_args, kind)
    record = open_record(args, training_args, stage)
    if record.status == "finished":
        return
    try:
        trainer = make_trainer(datasets)
    except Exception:
        record.forget()
        raise
    print_trainable_parameters(trainer, examples)
    checkpoint = resume_checkpoint(training_args.output_dir, trainer.accelerator)
    with explain_full_disk(training_args.output_dir):
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.accelerator.wait_for_everyone()
        counts, metrics, summary = summarize(trainer, len(datasets["train"]))
        save_result(trainer)
    record.finish(counts=counts | {"steps": trainer.state.global_step}, metrics=metrics)
    if trainer.args.should_save:
        from medst_trl.hub.cards import write_card

        write_card(training_args.output_dir)
    trainer.accelerator.print(f"{summary} Adapter and processor are in {training_args.output_dir}.")
    trainer.accelerator.wait_for_everyone()  # a rank that leaves while others work may abort
    trainer.end()


def load_splits(args: Any, training_args: "TrainingArguments", kind: str) -> "dict[str, Dataset]":
    """The checked datasets that `args` name: `train` and, if there is an evaluation, `eval`."""
    names = [args.dataset] if isinstance(args.dataset, str) else args.dataset
    datasets = {"train": _load(names, args.train_split, kind)}
    if training_args.eval_strategy != "no":
        datasets["eval"] = _load(names, args.validation_split, kind)
    if args.max_records is not None:
        datasets["train"] = datasets["train"].select(range(min(args.max_records, len(datasets["train"]))))
    return datasets


def _load(names: Sequence[str], split: str, kind: str) -> "Dataset":
    """
    One split of one or several datasets, concatenated. An id that an earlier dataset has taken gets the number of its
    dataset as a suffix (`17@2`), because draws of `<vusr>` turns and `rejected.jsonl` go by the id.
    """
    from datasets import concatenate_datasets

    from medst_trl.data.schema import features_of, load_records

    datasets = [load_records(name, split, kind) for name in names]
    if len(datasets) == 1:
        return datasets[0]
    features = features_of(kind)
    taken, joined = set(), []
    for place, dataset in enumerate(datasets, start=1):
        dataset = dataset.select_columns(list(features))
        if dataset.features != features:  # for example large strings; a cast copies the images
            dataset = dataset.cast(features)
        ids = [f"{name}@{place}" if name in taken else name for name in dataset["id"]]
        taken.update(ids)
        joined.append(dataset.remove_columns("id").add_column("id", ids))
    return concatenate_datasets(joined)


def open_record(args: Any, training_args: "TrainingArguments", stage: str) -> "StageRecord":
    """The stage's record in `output_dir`, see [`StageRecord.open`]."""
    from medst_trl.pipeline.record import StageRecord

    # As they were given: `to_dict()` adds what the machine is, which may differ when a run is resumed.
    given = {item.name: getattr(training_args, item.name) for item in fields(training_args) if item.init}
    operational = {name for name in training_args.to_dict() if name.startswith(_OPERATIONAL_PREFIXES)}
    return StageRecord.open(
        training_args.output_dir,
        stage=stage,
        settings=asdict(args) | given,
        inputs={"model_name_or_path": args.model_name_or_path, "dataset": args.dataset},
        operational=operational | (DIVISION_SETTINGS if args.effective_batch_size else set()),
        overwrite=args.overwrite,
    )


def save_result(trainer: "Trainer") -> None:
    """Save adapter (or model), processor and the Trainer's state in `output_dir`, each file when it is complete."""
    final, temporary = trainer.args.output_dir, os.path.join(trainer.args.output_dir, ".adapter.incomplete")
    trainer.save_model(temporary)
    if trainer.args.should_save:
        trainer.save_state()
        for name in os.listdir(temporary):
            os.replace(os.path.join(temporary, name), os.path.join(final, name))
        os.rmdir(temporary)


def print_trainable_parameters(trainer: "Trainer", examples: str) -> None:
    """Print the number of trained parameters by part, and how a step is divided, once for all processes."""
    counts = ", ".join(f"{part} {count:,}" for part, count in trainer.trainable_parameters().items())
    trainer.accelerator.print(f"Training {counts} parameters, {division_of(trainer.args, examples)}")


def end_of_log(log_history: Sequence[dict[str, Any]], share: float = 0.2) -> dict[str, float]:
    """
    Average each figure over the last part of a Trainer's log, since a single entry may be of one small batch.

    Args:
        log_history (sequence of `dict`):
            `trainer.state.log_history`, as `trainer_state.json` keeps it.
        share (`float`, *optional*, defaults to `0.2`):
            Share of the log's training entries to average over, at least one entry.

    Returns:
        `dict[str, float]`: By name, evaluations as they were logged last. Empty if nothing was logged.
    """
    steps = [entry for entry in log_history if "loss" in entry]
    last = steps[-max(1, round(share * len(steps))) :] if steps else []
    means = {}
    for name in dict.fromkeys(name for entry in last for name in entry):
        values = [entry[name] for entry in last if isinstance(entry.get(name), int | float)]
        if values:
            means[name] = sum(values) / len(values)
    for entry in log_history:
        means |= {name: value for name, value in entry.items() if name.startswith("eval_") or name == "train_loss"}
    return means


# The policy


def load_trainable_policy(
    args: PolicyArguments, training_args: "TrainingArguments"
) -> "tuple[PreTrainedModel, ProcessorMixin]":
    """Load the model and processor that `args` name, frozen weights in the type that training computes in."""
    from medst_trl.policy.loading import load_policy

    frozen = "float32"
    if args.use_lora and (training_args.bf16 or training_args.fp16):
        frozen = "bfloat16" if training_args.bf16 else "float16"
    return load_policy(
        args.model_name_or_path,
        base_model_name_or_path=args.base_model_name_or_path,
        dtype=args.dtype or frozen,
        is_trainable=True,
        load_in_4bit=args.load_in_4bit,
        vusr_role=getattr(args, "vusr_role", None),  # stage 2 finds it in the template that stage 1 saved
        trust_remote_code=training_args.trust_remote_code,
        attn_implementation=args.attn_implementation,
    )


def new_adapter(
    args: PolicyArguments, model: "PreTrainedModel", processor: "ProcessorMixin", **changes: Any
) -> "LoraConfig | None":
    """A new adapter with the settings of `args`; `None` if the model has one or trains in full."""
    from medst_trl.policy.adapters import adapter_config
    from medst_trl.policy.vusr import add_vusr

    if not args.use_lora or hasattr(model, "peft_config"):
        return None
    settings = {
        "vusr_token_id": add_vusr(processor) if getattr(args, "train_vusr", True) else None,
        "r": args.lora_r,
        "lora_alpha": args.lora_alpha,
        "vision_r": args.vision_lora_r,
        "vision_lora_alpha": args.vision_lora_alpha,
    }
    return adapter_config(model, **settings | changes)


def keep_shape(args: Any, model: "PeftModel") -> str:
    """
    Describe the shape of an adapter that is trained further, and refuse settings that ask for another shape.

    Args:
        args (dataclass):
            A stage's arguments with `lora_r`, `lora_alpha`, `lora_dropout`, `vision_lora_r`, `vision_lora_alpha`.
        model ([`~peft.PeftModel`]):
            The adapter on its base.

    Raises:
        UserError: if one of these is neither the default nor the adapter's own value.
    """
    own = _shape_of(model)
    defaults = {item.name: item.default for item in fields(args)}
    other = [name for name in own if getattr(args, name) not in (defaults[name], own[name])]
    if other:
        raise UserError(
            f"{args.model_name_or_path} is an adapter with "
            + ", ".join(f"{name} {own[name]}" for name in other)
            + ", which is trained further. "
            + ", ".join(f"{name} {getattr(args, name)}" for name in other)
            + " would need a new adapter. Remove the setting, or start from the base model."
        )
    return "The adapter keeps its own " + ", ".join(f"{name} {value}" for name, value in own.items()) + "."


def _shape_of(model: "PeftModel") -> dict[str, float]:
    from medst_trl.policy.parts import model_parts

    name, part_of = model.active_adapter, model_parts(model.get_base_model()).part_of
    # Of the layers, not of their weights: under ZeRO-3 those have no shape.
    layers = {part_of(path): layer for path, layer in model.named_modules() if name in getattr(layer, "lora_A", ())}
    prefixes = {"language": "", "vision": "vision_"}
    shape = {f"{prefix}lora_r": layers[part].r[name] if part in layers else 0 for part, prefix in prefixes.items()}
    for part, layer in layers.items():
        shape[f"{prefixes[part]}lora_alpha"] = layer.lora_alpha[name]
    return shape | ({"lora_dropout": model.peft_config[name].lora_dropout} if layers else {})


# Checks before anything is read or loaded


def check_settings(args: Any, training_args: "TrainingArguments") -> None:
    """
    Refuse settings that are out of bounds or cannot run together.

    Raises:
        UserError: for a setting out of bounds, for `load_in_4bit` if the 4-bit weights would have to train or to be
            divided among ranks, and for ZeRO-3 without GPUs if the token trains.
    """
    check_bounds(args, training_args)
    plugin = training_args.deepspeed_plugin
    uses_zero_3 = plugin is not None and plugin.zero_stage == 3
    by_accelerate = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    uses_fsdp = by_accelerate or training_args.fsdp_plugin_args is not None
    if args.load_in_4bit and not args.use_lora:
        raise UserError("load_in_4bit freezes the language model, and use_lora: false trains it. Choose one of them.")
    if args.load_in_4bit and (uses_fsdp or uses_zero_3):
        raise UserError("load_in_4bit runs on one GPU, under DDP and ZeRO-2. Use multi_gpu or zero2, or remove it.")
    if uses_zero_3 and args.use_lora and getattr(args, "train_vusr", True) and not _has_gpu():
        # PEFT (0.21) asks for the current CUDA device there, whatever device the model is on.
        raise UserError(
            "ZeRO-3 trains the row of <vusr> on GPUs only. Use zero2, or in `medst sft` train_vusr: false."
        )


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def check_bounds(args: Any, training_args: Any) -> None:
    """
    Refuse numbers out of bounds and unknown values.

    Raises:
        UserError: for a number out of bounds, for training that would end before its first step, and for an unknown
            `dtype` or `vusr_role`.
    """
    from medst_trl.policy import DTYPES
    from medst_trl.policy.vusr import VUSR_ROLES

    for settings in (args, training_args):
        for name, least in _AT_LEAST.items():
            value, most = getattr(settings, name, None), _AT_MOST.get(name, inf)
            if value is not None and not (least <= value <= most and value < inf):  # false for NaN
                upper = f" and at most {most}" if name in _AT_MOST else ""
                raise UserError(f"{name} is {value}. It must be at least {least}{upper}.")
    epochs = getattr(training_args, "num_train_epochs", 1)
    if not 0 < epochs < inf and getattr(training_args, "max_steps", -1) <= 0:
        raise UserError(f"num_train_epochs is {epochs}. It must be above 0, unless max_steps is set.")
    for name, known in {"dtype": DTYPES, "vusr_role": VUSR_ROLES}.items():
        value = getattr(args, name, None)
        if value is not None and value not in known:
            raise UserError(f"Unknown {name} {value!r}. Choose one of {', '.join(known)}.")
