# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which layers FSDP divides among the GPUs one by one."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import Trainer


def name_fsdp_layers(trainer: "Trainer") -> None:
    """
    Names the layers for FSDP, unless the accelerate configuration does, in place; nothing without FSDP.

    accelerate (1.15) takes what the model's `_no_split_modules` names, and fails where the model has no such layer:
    LLaVA's also name the text embeddings of CLIP (transformers 5.23). To be removed once either is mended.
    """
    if not trainer.is_fsdp_enabled:
        return
    from accelerate.utils.dataclasses import get_module_class_from_name

    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        names = sorted(trainer.model._no_split_modules or ())
        plugin.transformer_cls_names_to_wrap = [n for n in names if get_module_class_from_name(trainer.model, n)]
