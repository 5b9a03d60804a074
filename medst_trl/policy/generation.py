# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Select and validate the generation settings of a model (`generation_config.json`).

Texts are written by our own settings, so that results depend on nothing else: of the model's, only `USED_SETTINGS`
count. A loaded policy keeps those, and its sampling settings for tools that load a saved model.
"""

import json
import operator
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from medst_trl.base.errors import UserError

from .adapters import find_model_file


# Which tokens or strings end a text, and which tokens never appear in one.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "bad_words_ids", "sequence_bias")
USED_SETTINGS = (*TOKENS, "stop_strings")
# Each stage has settings for the first four. transformers saves the others only beside `do_sample`.
_SAMPLING = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip


def read_generation_config(name_or_path: str, revision: str | None = None) -> GenerationConfig | None:
    """
    Read what is used of a model's generation settings.

    Args:
        name_or_path (`str`):
            Directory or Hub id.
        revision (`str`, *optional*):
            Hub revision.

    Returns:
        [`~transformers.GenerationConfig`] or `None`: `None` without a file.

    Raises:
        UserError: if the file is damaged, or a token is not a number.
    """
    path = find_model_file(name_or_path, "generation_config.json", revision, local_files_only=False)
    try:
        return None if path is None else _reduced(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"generation_config.json of {name_or_path!r} cannot be used ({error}). Correct or remove the file."
        ) from error


def prepare_generation_config(
    model: PreTrainedModel, stop_token_ids: list[int], pad_token_id: int, vusr_token_id: int | None
) -> None:
    """
    Reduce the generation config of a model to what is used or can always be saved, and add the tokens of a policy.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        stop_token_ids (`list[int]`):
            Tokens that end a text, added to the config's own.
        pad_token_id (`int`):
            Padding token, if the config has none.
        vusr_token_id (`int`, *optional*):
            Token id of `<vusr>`, which is read and never written.
    """
    config = model.generation_config = _reduced(vars(model.generation_config))
    config.eos_token_id = list(dict.fromkeys([*(config.eos_token_id or ()), *stop_token_ids]))
    if config.pad_token_id is None:
        config.pad_token_id = pad_token_id
    config.suppress_tokens = sorted({*(config.suppress_tokens or ()), vusr_token_id} - {None}) or None


def _reduced(settings: Mapping[str, Any]) -> GenerationConfig:
    """Return a config of the settings that are used or can always be saved."""
    names = (*USED_SETTINGS, *_SAMPLING, "repetition_penalty")
    kept = {name: value for name in names if (value := settings.get(name)) not in (None, [], "", [""])}
    for name in {"eos_token_id", "suppress_tokens", "stop_strings"} & kept.keys():
        if not isinstance(kept[name], list):
            kept[name] = [kept[name]]
    for name in {"eos_token_id", "suppress_tokens"} & kept.keys():
        kept[name] = [operator.index(token) for token in kept[name]]  # raises for anything but an integer
    if operator.index(kept.get("pad_token_id", 0)) < 0:  # the original Llama's is -1
        del kept["pad_token_id"]
    neutral = GenerationConfig._get_default_generation_params()
    effective = {name for name in _SAMPLING[1:] if kept.get(name, neutral.get(name)) != neutral.get(name)}
    if kept.get("do_sample") is False or kept.get("temperature") == 0:
        kept = {name: value for name, value in kept.items() if name not in effective}
    elif effective:
        kept["do_sample"] = True
    return GenerationConfig(**kept)
