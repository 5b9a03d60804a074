# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A vision-language model and its processor as transformers loads them, with what is wrong of a folder told."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError

from .base_weights import hub_commit
from .families import check_family
from .four_bit import four_bit_config


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

# What the libraries raise on files that are damaged, or valid JSON of something else.
DAMAGED = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError)
SHOWN = 3  # tensors in a message
# Keys of config.json in the original code's layout, which transformers does not read.
_ORIGINAL = ("mm_projector_type", "mm_vision_tower")


def check_family_of(name_or_path: str, kwargs: dict[str, Any]) -> None:
    """[`check_family`] of what a folder or Hub repository holds, where that can be read."""
    from transformers import AutoConfig, PreTrainedConfig

    try:
        content, _ = PreTrainedConfig.get_config_dict(name_or_path, revision=kwargs.get("revision"))
        if any(content.get(key) for key in _ORIGINAL):
            raise UserError(
                f"{name_or_path!r} is in the layout of the original LLaVA code. Convert it first: medst convert "
                f"--source {name_or_path} --output_dir FOLDER, and give that folder."
            )
        config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    except DAMAGED:
        return  # said when processor and model are loaded
    check_family(config, name_or_path, remote_code=kwargs["trust_remote_code"])


def load_processor(name_or_path: str, kwargs: dict[str, Any]) -> "ProcessorMixin":
    """
    Loads a processor.

    Raises:
        UserError: if there is none, it is damaged, or lacks a package.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(name_or_path, **kwargs)
    except ImportError as error:
        what = " ".join(str(error).partition(".")[0].split())
        raise UserError(
            f"The processor of {name_or_path!r} lacks a package: {what}. The video half of Qwen-VL, InternVL and "
            'SmolVLM needs torchvision: pip install "medst_trl[video]"'
        ) from error
    except DAMAGED as error:
        raise UserError(f"No processor could be loaded from {name_or_path!r}: {_told(error)}") from error


def load_base(
    name_or_path: str, dtype: "str | torch.dtype", kwargs: dict[str, Any], adapter: str | None = None
) -> "PreTrainedModel":
    """
    Loads a model without adapter, every weight of it.

    transformers draws weights that the files lack at random and only logs it.

    Args:
        name_or_path (`str`):
            Folder or Hub id, without revision.
        dtype (`str` or `torch.dtype`):
            Weights' type.
        kwargs (`dict`):
            Further arguments of `from_pretrained`, and `load_in_4bit`.
        adapter (`str`, *optional*):
            The adapter whose base it is, for messages.

    Raises:
        UserError: if there is none, it is damaged, or weights are missing or of another shape.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    of = f" (the base that the adapter {adapter!r} names; pass base_model_name_or_path if it has moved)"
    failed = f"No vision-language model could be loaded from {name_or_path!r}{of if adapter else ''}: "
    if kwargs.pop("load_in_4bit", False):
        kwargs["quantization_config"] = four_bit_config(
            name_or_path, dtype, **{name: kwargs[name] for name in ("revision", "trust_remote_code") if name in kwargs}
        )
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            name_or_path, dtype=dtype, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except torch.OutOfMemoryError:
        raise
    except (*DAMAGED, ImportError, SafetensorError) as error:
        raise UserError(failed + _told(error)) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"{failed}some of its weights have other shapes than config.json says (listed above). Download it again."
        ) from error
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise UserError(f"{failed}its files lack {', '.join(missing[:SHOWN])}{more}. Download it again.")
    # transformers 5 no longer keeps it, and an adapter's base has to be found again.
    model.hub_commit = hub_commit(name_or_path, "config.json", kwargs.get("revision"))
    return model


def _told(error: Exception) -> str:
    """A message of transformers' own stands alone; that of Python on odd content needs its kind."""
    return str(error) if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: {error}"


def has_file(name_or_path: str, name: str, revision: str | None) -> bool:
    """Whether a folder or a Hub repository has a file of this name."""
    if Path(name_or_path).is_dir():
        return (Path(name_or_path) / name).is_file()
    from transformers.utils import cached_file

    try:
        found = cached_file(
            name_or_path,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise UserError(f"{name_or_path!r} is neither a folder nor a model on the Hub: {error}") from error
    return found is not None
