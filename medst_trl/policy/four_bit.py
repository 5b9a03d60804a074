# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""QLoRA (https://huggingface.co/papers/2305.14314): the frozen language model in 4 bits."""

import importlib.util
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError

from .parts import model_parts


if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig


def four_bit_config(name_or_path: str, dtype: "str | torch.dtype", **kwargs: Any) -> "BitsAndBytesConfig":
    """
    NF4 with double quantisation for the linear layers of a model's language model, and for these alone.

    The vision tower is small beside it, and errors there are in all that is said of an image. The projector is trained
    in full, which weights of 4 bits cannot be, and the output layer counts in every softmax.

    Args:
        name_or_path (`str`): Folder or Hub id of a vision-language model.
        dtype (`str` or `torch.dtype`): Type to compute in; `"auto"` for bfloat16.
        **kwargs: `revision`, `trust_remote_code`, as for `from_pretrained`.

    Raises:
        UserError: if bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError('load_in_4bit needs bitsandbytes, which is not installed: pip install "medst_trl[qlora]"')
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

    config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    parts = model_parts(model)
    left = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.startswith(f"{parts.language_model}.")
    ]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
        llm_int8_skip_modules=left,
    )
