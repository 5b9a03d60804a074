# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the stages that train a policy share: arguments and their checks, data, adapter, and the run itself.

Not a stage: `sft.py` and `dpo.py` are, and a plugin's training stage can use this too.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from importlib import import_module
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from medst_trl.base.errors import Problems, UserError, number_of
from medst_trl.base.files import move_files
from medst_trl.base.processes import leave_peers, rank
from medst_trl.base.settings import check_bounds, check_choice, documented, make_lists
from medst_trl.data.loading import load_records, mix
from medst_trl.data.overlap import image_ids_of
from medst_trl.data.schema import KINDS, features_of
from medst_trl.pipeline.launch import Batch, gpu_count
from medst_trl.pipeline.lineage import trained_on, write_training_images
from medst_trl.pipeline.record import StageRecord, is_complete
from medst_trl.pipeline.stage import MODEL, STAGES, Input, Output, Stage
from medst_trl.policy import DTYPES
from medst_trl.training.settings import CommonTrlSettings, check_sharding, sharding_kind


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, Trainer, TrainingArguments

    from medst_trl.training.trainer import PolicyTrainer


# Training arguments that do not affect what is learned, so that a resumed run may change them.
_OPERATIONAL = frozenset({
    "logging_*", "log_*", "report_to", "run_name", "trackio_*", "disable_tqdm", "save_*", "hub_*", "push_to_hub*",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "resume_from_checkpoint", "ddp_*", "gradient_checkpointing*", "activation_checkpointing*", "include_*",
    "debug", "skip_memory_metrics", "use_cpu", "local_rank", "deepspeed*", "fsdp*", "parallelism_config",
    "torch_empty_cache_steps", "ref_log_probs_dir", "precompute_ref_batch_size",
})  # fmt: skip

_AT_LEAST = {
    "max_records": 1, "lora_r": 0, "vision_lora_r": 0, "lora_alpha": 1, "vision_lora_alpha": 1, "lora_dropout": 0,
    "early_stopping_patience": 1, "max_length": 1, "sq_ratio": 0, "question_loss_weight": 0, "learning_rate": 0,
    "vision_learning_rate": 0, "projector_learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": -1, "seed": 0,
    "label_smoothing": 0, "effective_batch_size": 1,
}  # fmt: skip
_AT_MOST = {"lora_dropout": 1, "sq_ratio": 1}

LOGGED = ("loss", "entropy", "mean_token_accuracy")  # figures of every evaluation by TRL


@documented
@dataclass
class TrainingStageArguments(ABC):
    """
    Which policy a stage trains, on which data, and with which adapter.

    The class variables at the end are the values for a stage that has no such setting. A stage can extend `check`, and
    it must have its own `make_trainer` and `summarize`.

    Args:
        model_name_or_path (`str`):
            Directory or Hub id of a vision-language model, or of an adapter to train further.
        dataset (`list[str]`):
            Directories, files or Hub ids of one or several datasets, which are joined: conversations (`medst prepare`
            writes them) for sft, preference pairs (`medst judge`) for dpo, or your own.
        dataset_weights (`list[float]`, *optional*):
            Shares of several datasets in the training data, in any unit: 1 3 for a quarter and three quarters. The
            first records of each are used, as many as the shares allow. Default: all records.
        oversample (`bool`, *optional*, defaults to `False`):
            With dataset_weights, repeat records of the smaller datasets at random places instead of leaving out
            records of the larger ones.
        train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        validation_split (`str`, *optional*, defaults to `"validation"`):
            Split to evaluate on if eval_strategy is steps or epoch.
        max_records (`int`, *optional*):
            Train only on the first N records.
        use_lora (`bool`, *optional*, defaults to `True`):
            Train a LoRA adapter: the model's own, or else a new one. False trains all weights of a full model.
        lora_r (`int`, *optional*, defaults to `128`):
            LoRA rank in the language model, for a new adapter. 0 freezes the language model.
        lora_alpha (`int`, *optional*, defaults to `256`):
            LoRA scale in the language model, for a new adapter.
        vision_lora_r (`int`, *optional*, defaults to `32`):
            LoRA rank in the vision tower, for a new adapter. 0 freezes the tower.
        vision_lora_alpha (`int`, *optional*, defaults to `64`):
            LoRA scale in the vision tower, for a new adapter.
        base_model_name_or_path (`str`, *optional*):
            Base model of the adapter, if it has moved.
        dtype (`str`, *optional*):
            Type of the frozen weights, for example float32 or bfloat16. Default: bfloat16 or float16 if bf16 or fp16
            is set, and float32 if all weights are trained. The trained weights of an adapter are always float32.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            QLoRA: load the frozen language model in 4 bits (NF4) to save GPU memory. Needs bitsandbytes (extra qlora).
        effective_batch_size (`int`, *optional*):
            Number of examples per optimizer step over all processes. gradient_accumulation_steps is computed from it,
            per_device_train_batch_size and the number of processes.
        attn_implementation (`str`, *optional*):
            Attention implementation: sdpa, eager, flash_attention_2, ... Default: chosen by the model.
        overwrite (`bool`, *optional*, defaults to `False`):
            Delete the results of an earlier run in output_dir and start again.
    """

    model_name_or_path: str
    dataset: list[str]
    dataset_weights: list[float] | None = None
    oversample: bool = False
    train_split: str = "train"
    validation_split: str = "validation"
    max_records: int | None = None
    use_lora: bool = True
    lora_r: int = 128
    lora_alpha: int = 256
    vision_lora_r: int = 32
    vision_lora_alpha: int = 64
    base_model_name_or_path: str | None = None
    dtype: str | None = None
    load_in_4bit: bool = False
    effective_batch_size: int | None = None
    attn_implementation: str | None = None
    overwrite: bool = False

    lora_dropout: ClassVar[float] = 0.0
    train_vision: ClassVar[bool] = True
    train_vusr: ClassVar[bool] = True
    vusr_role: ClassVar[str | None] = None
    best_metrics: ClassVar[tuple[str, ...]] = ()  # choices of metric_for_best_model; any by default

    def __post_init__(self):
        make_lists(self, "dataset")

    @property
    def operational(self) -> set[str]:
        """Settings that only divide a step, whose size `effective_batch_size` sets (see tests/distributed)."""
        return {"per_device_train_batch_size", "gradient_accumulation_steps"} if self.effective_batch_size else set()

    def weights_dtype(self, training_args: "TrainingArguments") -> str:
        """Type in which the weights are loaded: by default float32 if all train, else that of the computation."""
        is_half = self.use_lora and (training_args.bf16 or training_args.fp16)
        return self.dtype or (("bfloat16" if training_args.bf16 else "float16") if is_half else "float32")

    def check(self, training_args: "TrainingArguments") -> None:
        """
        Refuse settings that are out of bounds or cannot run together, before anything is read or loaded.

        Raises:
            UserError: for a number out of bounds, an unknown `dtype` or `vusr_role`, training that would end before
                its first step, a `resume_from_checkpoint` that is not in `output_dir`, `load_in_4bit` if the 4-bit
                weights would have to train or to be sharded, ZeRO-3 without GPUs if the token trains, and an
                incomplete schedule of the learning rate.
        """
        from medst_trl.policy.vusr import VUSR_ROLES
        from medst_trl.training.machine import check_schedule
        from medst_trl.training.resume import checkpoint_named

        given = vars(training_args) | vars(self)
        settings = SimpleNamespace(**dict.fromkeys(_AT_LEAST) | given)
        above, below = {"num_train_epochs": 0}, {"label_smoothing": 0.5}
        check_bounds(settings, at_least=_AT_LEAST, above=above, at_most=_AT_MOST, below=below)
        _check_weights(self.dataset_weights, self.dataset, self.oversample)
        checkpoint = training_args.resume_from_checkpoint
        if self.overwrite and str(checkpoint or "false").lower() != "false":
            raise UserError("overwrite deletes the checkpoint that resume_from_checkpoint names. Choose one of them.")
        checkpoint_named(training_args.output_dir, checkpoint)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("vusr_role", self.vusr_role, VUSR_ROLES)
        if given.get("eval_strategy") == "no" and (given.get("save_strategy") == "best" or given.get("eval_on_start")):
            raise UserError("save_strategy best and eval_on_start evaluate the model: set eval_strategy, too.")
        if self.best_metrics and (metric := given.get("metric_for_best_model")):
            check_choice("metric_for_best_model", metric.removeprefix("eval_"), self.best_metrics)
        if self.load_in_4bit and not self.use_lora:
            raise UserError("load_in_4bit freezes the language model, and use_lora: false trains it. Choose one.")
        kind = sharding_kind(training_args)
        check_sharding(kind, self, training_args)
        if kind.endswith("ZeRO-3") and self.use_lora and self.train_vusr and not gpu_count():
            # PEFT (0.21) asks for the current CUDA device there, whatever device the model is on.
            raise UserError("ZeRO-3 trains the row of <vusr> on GPUs only. Use zero2, or (in sft) train_vusr: false.")
        check_schedule(training_args)

    @abstractmethod
    def make_trainer(self, training_args: "TrainingArguments", **inputs: Any) -> "Trainer":
        """
        Make the trainer. The inputs are what it needs besides its arguments: the model, its processor and datasets,
        and the configuration of a new adapter.
        """

    @abstractmethod
    def summarize(self, trainer: "Trainer", records: int) -> tuple[dict[str, Any], dict[str, float], str]:
        """
        Return counts and metrics of a finished run for `stage.json`, and a sentence to print. It is called on every
        rank, with the number of records.
        """


def _check_weights(weights: Sequence[float] | None, names: Sequence[str], oversample: bool) -> None:
    if wrong := [weight for weight in weights or () if not 0 < weight < inf]:
        raise UserError(f"dataset_weights is {wrong[0]}. Each must be finite and above 0.")
    if weights and len(weights) != len(names):
        raise UserError(f"dataset_weights has {len(weights)} numbers for {len(names)} datasets. Give one for each.")
    if oversample and not weights:
        raise UserError("oversample needs dataset_weights: the shares of the datasets in the training data.")


def training_stage(arguments: type, config: str, settings: type, kind: str, **more: Any) -> Stage:
    """
    Register a stage that trains a policy.

    Args:
        arguments (`type`):
            Its dataclass of arguments, a [`TrainingStageArguments`].
        config (`str`):
            Public name of the trainer's configuration, which is imported when it is needed.
        settings (`type`):
            The trainer's own settings. `--help` shows them and the common ones of TRL.
        kind (`str`):
            Kind of the dataset.
        **more:
            Further fields of [`Stage`], among them `check` in place of that of the arguments.
    """

    def listed() -> tuple[type, type]:  # one class for all settings of the trainer: its defaults replace those of TRL
        return arguments, make_dataclass("TrainingSettings", [], bases=(settings, CommonTrlSettings))

    more.setdefault("check", lambda args, training_args: args.check(training_args))
    stage = Stage(
        arguments=lambda: (arguments, getattr(import_module("medst_trl"), config)),
        listed=listed,
        main=lambda args, training_args: train_policy(stage, args, training_args),
        distributed=True,
        inputs=(
            Input("model_name_or_path", MODEL),
            Input("base_model_name_or_path", MODEL, has_default=False),
            Input("dataset", kind, split="train_split"),
        ),
        outputs=(Output("", MODEL),),
        operational=_OPERATIONAL,
        **more,
    )
    return STAGES.register(stage)


def train_policy(stage: Stage, args: TrainingStageArguments, training_args: "TrainingArguments") -> None:
    """
    Train, from the newest complete checkpoint if there is one, and write the adapter, processor, record and card.

    Args:
        stage ([`Stage`]):
            The stage, with an input `dataset`.
        args ([`TrainingStageArguments`]):
            Its arguments.
        training_args ([`~transformers.TrainingArguments`]):
            Those of its trainer.
    """
    from medst_trl.hub.cards import write_card
    from medst_trl.training.machine import unsupported_settings
    from medst_trl.training.resume import resume_checkpoint

    args.check(training_args)
    is_finished = is_complete(training_args.output_dir) and not args.overwrite  # perhaps on another machine
    if not is_finished and (found := unsupported_settings(training_args, training_args.device)):
        raise UserError("\n".join(found))
    batch = Batch.of(args, training_args, training_args.world_size)
    training_args.gradient_accumulation_steps = batch.accumulation  # before there is a trainer: DeepSpeed reads it
    datasets = load_splits(args, training_args, stage.input("dataset").kind)
    inputs = {"model_name_or_path": args.model_name_or_path, "dataset": args.dataset}
    record = StageRecord.of(stage, args, training_args, inputs=inputs)
    if record.decision == "skip":
        return
    with record:
        state = training_args.distributed_state
        checkpoint = resume_checkpoint(training_args.output_dir, state, training_args.resume_from_checkpoint)
        if record.decision == "resume" and checkpoint is None and state.is_main_process:
            print("No checkpoint is used. Training starts at the first step.")
        trainer = _with_policy(args, training_args, datasets)
        parameters = ", ".join(f"{part} {count:,}" for part, count in trainer.trainable_parameters().items())
        trainer.accelerator.print(f"Training {parameters} parameters, {batch.describe(stage.trains)}.")
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.accelerator.wait_for_everyone()
        save_result(trainer)
        lineage = {}
        if trainer.args.should_save:
            own = {image for dataset in datasets.values() for ids in image_ids_of(dataset) for image in ids if image}
            write_training_images(training_args.output_dir, own, args.model_name_or_path)
            lineage = {"trained_on": trained_on(training_args.output_dir)}
        counts, metrics, summary = args.summarize(trainer, len(datasets["train"]))
    record.finish(counts=counts | {"steps": trainer.state.global_step}, metrics=metrics, **lineage)
    if trainer.args.should_save:
        write_card(training_args.output_dir)
    result = "Adapter" if hasattr(trainer.model, "peft_config") else "Model"
    trainer.accelerator.print(f"{summary} {result} and processor are in {training_args.output_dir}.")
    trainer.accelerator.wait_for_everyone()  # a rank that leaves while others work may abort
    del trainer  # it holds the process group
    leave_peers()


def _with_policy(args: TrainingStageArguments, training_args: Any, datasets: "dict[str, Dataset]") -> "Trainer":
    """Load the policy that `args` name, and make its trainer."""
    from medst_trl.policy.adapters import freeze_vision
    from medst_trl.policy.loading import load_policy
    from medst_trl.policy.vusr import add_vusr

    model, processor = load_policy(
        args.model_name_or_path,
        base_model_name_or_path=args.base_model_name_or_path,
        dtype=args.weights_dtype(training_args),
        is_trainable=True,
        load_in_4bit=args.load_in_4bit,
        vusr_role=args.vusr_role,  # stage 2 finds it in the template that stage 1 saved
        trust_remote_code=training_args.trust_remote_code,
        attn_implementation=args.attn_implementation,
    )
    if not args.train_vision:
        freeze_vision(model)
    peft_config = new_adapter(args, model, add_vusr(processor))
    if hasattr(model, "peft_config") and rank() == 0:
        names = "lora_r, lora_alpha, lora_dropout, vision_lora_r and vision_lora_alpha"
        print(f"{args.model_name_or_path} is an adapter and keeps its shape: {names} have no effect.")
    inputs = {"model": model, "processing_class": processor, "peft_config": peft_config}
    try:
        return args.make_trainer(
            training_args, train_dataset=datasets["train"], eval_dataset=datasets.get("eval"), **inputs
        )
    except (ValueError, NotImplementedError, ImportError) as error:  # settings that TRL and transformers refuse
        raise UserError(f"Cannot train with these settings: {error}") from error


def load_splits(args: Any, training_args: "TrainingArguments", kind: str) -> "dict[str, Dataset]":
    """The checked datasets that `args` name: `train` and, if there is an evaluation, `eval`."""
    parts = _load(args.dataset, args.train_split, kind)
    datasets = {"train": mix(parts, args.dataset_weights, args.oversample, training_args.seed)}
    if training_args.eval_strategy != "no":
        datasets["eval"] = mix(_load(args.dataset, args.validation_split, kind, is_required=False))
    if args.max_records is not None:
        datasets["train"] = datasets["train"].select(range(min(args.max_records, len(datasets["train"]))))
    return datasets


def _load(names: Sequence[str], split: str, kind: str, is_required: bool = True) -> "list[Dataset]":
    """
    One split of one or several datasets, with the same columns. An id that an earlier dataset has taken gets the
    number of its dataset as a suffix (`17@2`): `<vusr>` turns are sampled by id, and `rejected.jsonl` lists ids.
    """
    datasets, problems = [], Problems()
    for name in names:
        with problems.collect():
            datasets.append(load_records(name, split, kind, identify=False))
    if is_required or not datasets:
        problems.report()
    elif problems.messages and rank() == 0:
        print("Not evaluated on all datasets:", *problems.messages, sep="\n  ")
    if len(datasets) == 1:
        return datasets
    extras = {
        name: value for name, value in KINDS.get(kind).extras.items() if any(name in d.features for d in datasets)
    }
    taken, joined = set(), []
    for number, dataset in enumerate(datasets, start=1):
        for name in extras.keys() - dataset.features.keys():
            dataset = dataset.add_column(name, [extras[name]] * len(dataset))
        ids = [f"{name}@{number}" if name in taken else name for name in dataset["id"]]
        taken.update(ids)
        dataset = dataset.remove_columns("id").add_column("id", ids)
        joined.append(dataset.select_columns([*features_of(kind), *extras]))
    return joined


def save_result(trainer: "Trainer") -> None:
    """Save adapter (or model), processor and the Trainer's state in `output_dir`, each file when it is complete."""
    final = Path(trainer.args.output_dir)
    trainer.save_model(str(final / ".adapter.incomplete"))
    if trainer.args.should_save:
        trainer.save_state()
        move_files(final / ".adapter.incomplete", final)


def describe_run(trainer: "PolicyTrainer", examples: str, counts: dict[str, Any]) -> str:
    """Describe what a finished run trained on and what it rejected, from the counts for `stage.json`."""
    rejected = "".join(f", {count} rejected as {reason}" for reason, count in counts["set_aside"].items())
    evaluation = [usable for name, usable in trainer.usable.items() if name != "train"]
    if rejected_for_evaluation := sum(usable.rejected.total() for usable in evaluation):
        rejected += f", {rejected_for_evaluation} rejected from the evaluation data"
    rejected += " (rejected.jsonl)" if rejected else ""
    truncated = f", {counts['truncated']} truncated at max_length" if counts["truncated"] else ""
    steps = number_of(trainer.state.global_step, "step")
    return f"{steps} on {len(trainer.train_dataset)} {examples}{rejected}{truncated}"


# The policy


def new_adapter(
    args: TrainingStageArguments, model: "PreTrainedModel | PeftModel", vusr_token_id: int | None
) -> "LoraConfig | None":
    """
    A new adapter with the settings of `args`; `None` if the model has one or trains in full.

    Raises:
        UserError: if `use_lora` is false and the model is an adapter.
    """
    from medst_trl.policy.adapters import adapter_config

    is_adapter = hasattr(model, "peft_config")
    if is_adapter and not args.use_lora:
        raise UserError(
            f"use_lora is false, but {args.model_name_or_path} is an adapter. Start from a full model (`medst merge` "
            "makes one), or remove use_lora."
        )
    if is_adapter or not args.use_lora:
        return None
    return adapter_config(
        model,
        vusr_token_id=vusr_token_id if args.train_vusr else None,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        vision_r=args.vision_lora_r if args.train_vision else 0,
        vision_lora_alpha=args.vision_lora_alpha,
    )
