# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Separate learning rates for language model, vision tower and projector.

One `create_optimizer` for both trainers, because TRL's DPOTrainer takes no `optimizer_cls_and_kwargs`. Schedulers
scale each group's own rate, and the groups pass through DDP and DeepSpeed like any others.
"""

from typing import TYPE_CHECKING

from medst_trl.policy.parts import ModelParts, model_parts


if TYPE_CHECKING:
    import torch


class LearningRatesByPart:
    """
    Mixin for a [`~transformers.Trainer`] whose arguments have `vision_learning_rate` and `projector_learning_rate`.
    """

    def model_parts(self) -> ModelParts:
        """The parts of the model under PEFT and distributed wrappers."""
        model = self.accelerator.unwrap_model(self.model)
        return model_parts(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def create_optimizer(self, model=None) -> "torch.optim.Optimizer":
        """The Trainer's optimizer, its groups split by part; a group's `part` names it."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        parts = self.model_parts()
        rates = {"vision": self.args.vision_learning_rate, "projector": self.args.projector_learning_rate}
        names = {id(p): name.removeprefix("module.") for name, p in (model or self.model).named_parameters()}
        groups = {}
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                name = names[id(parameter)]
                # PEFT's trained token rows are stored whole, so decay would pull them towards zero.
                is_token_row = "trainable_tokens" in name
                settings = {**group, "params": [], "part": parts.part_of(name)}
                settings["weight_decay"] = 0.0 if is_token_row else group["weight_decay"]
                rate = rates.get(settings["part"])
                settings["lr"] = group["lr"] if rate is None else rate
                groups.setdefault((index, is_token_row, settings["part"]), settings)["params"].append(parameter)
        # The language model first: the Trainer logs the first group's rate as `learning_rate`.
        optimizer.param_groups = sorted(groups.values(), key=lambda group: group["part"] != "language")
        return optimizer

    def trainable_parameters(self) -> dict[str, int]:
        """Number of trained parameters of each part."""
        parts, counts = self.model_parts(), {}
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            if parameter.requires_grad:
                part = parts.part_of(name)
                counts[part] = counts.get(part, 0) + parameter.numel()
        return counts

    def learning_rates(self) -> dict[str, float]:
        """The current learning rate of each part that trains."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return {group["part"]: group["lr"] for group in groups if "part" in group}

    def _get_learning_rate(self):
        # The Trainer asks before the scheduler goes on, and logs later: the rates of the other parts belong to it.
        self._rates_of_step = self.learning_rates()
        return super()._get_learning_rate()

    def learning_rates_to_log(self) -> dict[str, float]:
        """Rates of the parts beside the language model, whose rate the Trainer itself logs, in the last step."""
        return {f"learning_rate_{part}": rate for part, rate in self._rates_of_step.items() if part != "language"}
