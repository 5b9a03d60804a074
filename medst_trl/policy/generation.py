# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What of a model's generation config (`generation_config.json`) is used, ignored, repaired or refused.

Texts are written by our own settings, so that results depend on nothing else: of the generation config, only the
settings in `HONOURED` count ([`ignored_settings`] lists the others that would change a text). All others are kept for
tools that load a saved model, unless transformers would refuse to save them ([`repair_generation_config`]).
"""

import re
import warnings
from typing import Any

import torch
from transformers import GenerationConfig, NoBadWordsLogitsProcessor, PreTrainedModel, SequenceBiasLogitsProcessor

from medst_trl.base.errors import UserError
from medst_trl.base.files import read_object

from .adapters import find_model_file


FILE = "generation_config.json"
# Which tokens or strings end a text, and which tokens never appear in one.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "bad_words_ids", "sequence_bias")
HONOURED = (*TOKENS, "stop_strings")
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p")  # each stage has settings for these
# The length is another setting of a stage, and the cache changes no text.
_WITHOUT_EFFECT = (
    "max_length",
    "max_new_tokens",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
)


def reduced_generation_config(name_or_path: str, revision: str | None = None) -> GenerationConfig | None:
    """
    Read the generation config of a model if transformers would refuse it, reduced to the settings that are used and
    those of sampling, with a warning.

    Args:
        name_or_path (`str`):
            Directory or Hub id.
        revision (`str`, *optional*):
            Hub revision.

    Returns:
        [`~transformers.GenerationConfig`] or `None`: `None` for a file that transformers can read.
    """
    path = find_model_file(name_or_path, FILE, revision, local_files_only=False)
    settings = read_object(path) if path else {}
    try:
        GenerationConfig(**settings)
        return None
    except (ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
    kept = {name: settings[name] for name in (*HONOURED, *_SAMPLING) if name in settings}
    ignored = ", ".join(sorted(settings.keys() - kept.keys() - {"transformers_version", "_from_model_config"}))
    warnings.warn(f"{FILE} of {name_or_path!r} is invalid, so {ignored} are ignored: {reason}", stacklevel=2)
    return GenerationConfig(**kept)


def repair_generation_config(model: PreTrainedModel) -> None:
    """
    Change what transformers refuses to save in the generation config of a model, in place.

    It accepts sampling values only beside `do_sample`, so that is set unless the config turns it off. Other settings
    that have no effect are removed.

    Raises:
        UserError: if a setting that is used is invalid.
    """
    config, changed = model.generation_config, []
    _check_honoured(config, model)
    samples = config.do_sample is None and config.temperature != 0
    for _ in range(2):  # with and without `do_sample`, other settings have no effect
        try:
            config.validate(strict=True)
        except ValueError as error:
            problems = re.findall(r"^- `(\w+)`: (.*)", str(error), re.MULTILINE)
            if not problems:
                raise UserError(f"{FILE} of {model.name_or_path!r} cannot be saved: {error}") from error
            needs = {name for name, reason in problems if reason.startswith("`do_sample`")}
            if samples and needs:
                config.do_sample = True
                changed.append(f"do_sample is set to true, as {', '.join(sorted(needs))} imply")
            for name in {name for name, _ in problems} - (needs if samples else set()):
                setattr(config, name, None)
                changed.append(f"{name} is removed")
    if changed:
        of = f" of {model.name_or_path!r}" if model.name_or_path else ""
        warnings.warn(f"{FILE}{of} is invalid as it is: {'; '.join(changed)}.", stacklevel=3)


def _check_honoured(config: GenerationConfig, model: PreTrainedModel) -> None:
    """Refuse settings that are used and that `generate` would refuse in the middle of a run."""
    strings = config.stop_strings
    config.stop_strings = [strings] if isinstance(strings, str) else strings
    ids, rows = torch.zeros(1, 1, dtype=torch.long), model.config.get_text_config().vocab_size
    scores, ends = torch.zeros(1, rows), torch.tensor(0)
    checks = {
        "stop_strings": "".join,
        "eos_token_id": torch.tensor,
        "suppress_tokens": torch.tensor,
        "bad_words_ids": lambda value: NoBadWordsLogitsProcessor(value, ends)(ids, scores),
        "sequence_bias": lambda value: SequenceBiasLogitsProcessor(value)(ids, scores),
    }
    for name, check in checks.items():
        value = getattr(config, name)
        try:
            if value is not None:
                check(value)
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            raise UserError(
                f"{FILE} of {model.name_or_path!r}: {name} is {str(value)[:100]}, which cannot be used "
                f"({' '.join(str(error).split())[:200]}). Correct or remove it."
            ) from error


def ignored_settings(config: GenerationConfig) -> dict[str, Any]:
    """Return the settings of a generation config that would change a text, but are not used."""
    defaults = GenerationConfig().to_dict() | GenerationConfig._get_default_generation_params()
    others = defaults.keys() - {*HONOURED, *_SAMPLING, *_WITHOUT_EFFECT}
    found = {name: getattr(config, name, None) for name in sorted(others) if not name.startswith(("_", "output_"))}
    return {name: value for name, value in found.items() if value not in (None, False, defaults[name])}
