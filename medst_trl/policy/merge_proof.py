# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether two models say the same: log-probabilities over the whole vocabulary, on answers and on questions."""

from collections.abc import Iterable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin


def batches_of(processor: "ProcessorMixin", examples: Iterable[dict[str, Any]]) -> list[dict[str, "torch.Tensor"]]:
    """Each example as training renders it: to be answered, and to be asked and answered. Without empty answers."""
    from medst_trl.training.collator import DataCollatorForSelfQuestioning

    processor = deepcopy(processor)
    collators = [DataCollatorForSelfQuestioning(processor, sq_ratio=ratio) for ratio in (0.0, 1.0)]
    batches = [collator([example]) for example in examples for collator in collators]
    for batch in batches:
        for name in ("question_mask", "set_aside", "truncated", "neutralised"):
            batch.pop(name, None)
    batches = [batch for batch in batches if (batch["labels"] != -100).any()]
    if not batches:
        raise UserError("The examples to compare the merged model on have no answer to compare. Give another dataset.")
    return batches


def log_probs(model: "PreTrainedModel", batches: list[dict[str, "torch.Tensor"]]) -> list["torch.Tensor"]:
    """For each batch float32 of shape (trained tokens, vocabulary)."""
    import torch

    rows = []
    for batch in batches:
        inputs = {
            name: value.to(model.dtype) if value.is_floating_point() else value
            for name, value in batch.items()
            if name != "labels"
        }
        with torch.inference_mode():
            logits = model(**inputs, use_cache=False).logits[:, :-1]
        rows.append(logits[batch["labels"][:, 1:] != -100].float().log_softmax(-1))
    return rows


def difference(found: list["torch.Tensor"], expected: list["torch.Tensor"]) -> float:
    """The largest, in nats; NaN where anything is."""
    import torch

    return torch.stack([(one - other).abs().max() for one, other in zip(found, expected, strict=True)]).max().item()


def require(difference: float, tolerance: float, how: str) -> None:
    if not difference <= tolerance:  # NaN is no agreement
        raise UserError(
            f"The merged model ({how}) does not agree with the adapter: log-probabilities differ by up to "
            f"{difference:.2g}, more than {tolerance:.2g}. Nothing was written. Try --dtype float32, and report it."
        )


def require_same_inputs(batches: list[dict], again: list[dict]) -> None:
    import torch

    for one, other in zip(batches, again, strict=True):
        if one.keys() != other.keys() or not all(torch.equal(one[name], other[name]) for name in one):
            raise UserError(
                "The processor that was saved with the merged model makes other inputs than the adapter's. Nothing "
                "was written. Please report it with the name of the base."
            )
