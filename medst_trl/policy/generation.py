# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Select and validate the generation settings of a model (`generation_config.json`).

Texts are written by our own settings, so that results depend on nothing else: of the model's, only `USED_SETTINGS`
count. A loaded policy keeps those, and its sampling settings for tools that load a saved model.
"""

import json
import logging
import operator
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, NoBadWordsLogitsProcessor, PreTrainedModel, SequenceBiasLogitsProcessor

from medst_trl.base.errors import UserError, located
from medst_trl.base.processes import rank

from .adapters import find_model_file


logger = logging.getLogger(__name__)

# Which tokens or strings end a text, and which tokens never appear in one.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "bad_words_ids", "sequence_bias")
USED_SETTINGS = (*TOKENS, "stop_strings")
# Each stage has settings for the first four. transformers saves the others only beside `do_sample`.
_SAMPLING = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip
# The length is another setting of a stage, and the cache changes no text.
_WITHOUT_EFFECT = re.compile("_|output_|max_|use_cache|cache_|return_dict|disable_compile|continuous|transformers_")


def read_generation_config(name_or_path: str, revision: str | None = None) -> GenerationConfig | None:
    """
    Read what is used of a model's generation settings, and warn of others that would change a text.

    Args:
        name_or_path (`str`):
            Directory or Hub id.
        revision (`str`, *optional*):
            Hub revision.

    Returns:
        [`~transformers.GenerationConfig`] or `None`: `None` without a file.

    Raises:
        UserError: if the file is damaged, or a setting that is used is invalid.
    """
    path = find_model_file(name_or_path, "generation_config.json", revision, local_files_only=False)
    if path is None:
        return None
    with located(f"generation_config.json of {name_or_path!r}"), _usable("the file"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        config = _reduced(settings)
    unused = GenerationConfig().to_dict().keys() - {*USED_SETTINGS, *_SAMPLING[:4]}
    ignored = [name for name in sorted(unused & settings.keys()) if settings[name] not in (None, 0, 1)]
    ignored = [name for name in ignored if not _WITHOUT_EFFECT.match(name)]
    if ignored and rank() == 0:
        logger.warning(f"Settings in generation_config.json of {name_or_path!r} not used: {', '.join(ignored)}.")
    return config


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

    Raises:
        UserError: if a setting that is used is invalid.
    """
    with located(f"generation_config.json of {model.name_or_path!r}"), _usable("the file"):
        config = model.generation_config = _reduced(vars(model.generation_config))
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        config.eos_token_id = [token for token in dict.fromkeys([*ends, *stop_token_ids]) if token is not None]
        if config.pad_token_id is None:
            config.pad_token_id = pad_token_id
        config.suppress_tokens = sorted({*(config.suppress_tokens or ()), vusr_token_id} - {None}) or None
        ids, scores = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, model.config.get_text_config().vocab_size)
        with _usable("bad_words_ids or sequence_bias"):
            if config.bad_words_ids:
                NoBadWordsLogitsProcessor(config.bad_words_ids, torch.tensor(config.eos_token_id))(ids, scores)
            if config.sequence_bias:
                SequenceBiasLogitsProcessor(config.sequence_bias)(ids, scores)


def _reduced(settings: Mapping[str, Any]) -> GenerationConfig:
    """Return a config of the settings that are used or can always be saved."""
    names = (*USED_SETTINGS, *_SAMPLING, "repetition_penalty")
    kept = {name: value for name in names if (value := settings.get(name)) not in (None, [], "", [""])}
    for name in {"bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens"} & kept.keys():
        is_list = name == "suppress_tokens" or (name != "pad_token_id" and isinstance(kept[name], list))
        with _usable(name):
            kept[name] = list(map(operator.index, kept[name])) if is_list else operator.index(kept[name])
    if kept.get("pad_token_id", 0) < 0:  # the original Llama's is -1
        del kept["pad_token_id"]
    if strings := kept.get("stop_strings"):
        with _usable("stop_strings"):
            kept["stop_strings"] = [strings] if isinstance(strings, str) else list(filter("".__ne__, strings))
            "".join(kept["stop_strings"])
    neutral = GenerationConfig._get_default_generation_params()
    effective = {name for name in _SAMPLING[1:] if kept.get(name, neutral.get(name)) != neutral.get(name)}
    if kept.get("do_sample") is False or kept.get("temperature") == 0:
        kept = {name: value for name, value in kept.items() if name not in effective}
    elif effective:
        kept["do_sample"] = True
    return GenerationConfig(**kept)


@contextmanager
def _usable(what: str) -> Iterator[None]:
    """Name the setting, or the file, that the libraries refuse."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise UserError(f"{what} cannot be used ({error}). Correct or remove {what}.") from error
