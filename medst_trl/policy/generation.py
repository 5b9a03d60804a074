# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What of a model's generation config (`generation_config.json`) is used, ignored, repaired or refused.

Texts are written by our own settings, so that results depend on nothing else: of the generation config, only the
settings in `HONOURED` count ([`ignored_settings`] lists the others that would change a text). All others are kept for
tools that load a saved model, unless transformers would refuse to save them.
"""

import operator
import re
import warnings

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
    "max_length", "max_new_tokens", "use_cache", "cache_implementation", "cache_config", "max_cache_len",
    "return_dict_in_generate", "disable_compile", "continuous_batching_config", "transformers_version",
)  # fmt: skip
_ERRORS = (ValueError, TypeError, AttributeError, RuntimeError, IndexError)  # what transformers raises on settings


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

    Raises:
        UserError: if it is invalid even then.
    """
    path = find_model_file(name_or_path, FILE, revision, local_files_only=False)
    settings = read_object(path) if path else {}
    try:
        GenerationConfig(**settings)
        return None
    except _ERRORS as error:
        reason = " ".join(str(error).split())
    kept = {name: settings[name] for name in (*HONOURED, *_SAMPLING) if name in settings}
    ignored = ", ".join(sorted(settings.keys() - kept.keys() - {"transformers_version", "_from_model_config"}))
    problem = f"{FILE} of {name_or_path!r} is invalid ({reason})."
    try:
        reduced = GenerationConfig(**kept)
    except _ERRORS as error:
        raise UserError(f"{problem} Correct or delete it.") from error
    warnings.warn(f"{problem} Ignored: {ignored}.", stacklevel=2)
    return reduced


def prepare_generation_config(
    model: PreTrainedModel, stop_token_ids: list[int], pad_token_id: int, vusr_token_id: int | None
) -> None:
    """
    Add the tokens of a policy to the generation config of its model, in place, and change what transformers would
    refuse to save. It accepts sampling values only beside `do_sample`, which is set unless the config turns it off.
    Other settings without effect are removed.

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
    config = model.generation_config
    of = f"{FILE} of {model.name_or_path!r}" if model.name_or_path else FILE
    _check_honoured(config, of, model.config.get_text_config().vocab_size)
    config.eos_token_id = list(dict.fromkeys([*_listed(config.eos_token_id), *stop_token_ids]))
    if config.pad_token_id is None or config.pad_token_id < 0:  # the original Llama's is -1
        config.pad_token_id = pad_token_id
    if vusr_token_id is not None:
        config.suppress_tokens = sorted({*(config.suppress_tokens or []), vusr_token_id})
    _repair(config, of)


def _check_honoured(config: GenerationConfig, of: str, rows: int) -> None:
    """Refuse settings that are used and that `generate` would refuse in the middle of a run."""
    strings, ends = config.stop_strings, torch.tensor([0])
    config.stop_strings = [strings] if isinstance(strings, str) else strings
    ids, scores = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, rows)
    checks = {
        "eos_token_id": lambda value: [*map(operator.index, _listed(value))],
        "pad_token_id": operator.index,
        "suppress_tokens": lambda value: [*map(operator.index, value)],
        "bad_words_ids": lambda value: NoBadWordsLogitsProcessor(value, ends)(ids, scores),
        "sequence_bias": lambda value: SequenceBiasLogitsProcessor(value)(ids, scores),
        "stop_strings": "".join,
    }
    for name, check in checks.items():
        value = getattr(config, name)
        if value in (None, [], {}, [""]):
            setattr(config, name, None)
            continue
        try:
            check(value)
        except _ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{of}: {name} {str(value)[:100]} cannot be used ({reason}). Correct or remove it."
            ) from error


def _listed(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _repair(config: GenerationConfig, of: str) -> None:
    try:
        return config.validate(strict=True)
    except ValueError as error:
        problems = dict(re.findall(r"^- `(\w+)`: (.*)", str(error), re.MULTILINE))
        if not problems:
            raise UserError(f"{of} cannot be saved with a model: {error} Correct or delete it.") from error
    sampling = sorted(name for name, reason in problems.items() if reason.startswith("`do_sample`"))
    if config.do_sample is not None or config.temperature == 0:
        sampling = []
    removed = sorted(problems.keys() - sampling)
    for name in removed:
        setattr(config, name, None)
    changes = [f"without {', '.join(removed)}"] if removed else []
    if sampling:
        config.do_sample = True
        changes.append(f"with do_sample, because it has {', '.join(sampling)}")
    warnings.warn(f"{of} is invalid. A trained model is saved {' and '.join(changes)}.", stacklevel=4)


def ignored_settings(config: GenerationConfig) -> list[str]:
    """Return the names of the settings of a generation config that would change a text, but are not used."""
    defaults = GenerationConfig().to_dict() | GenerationConfig._get_default_generation_params()
    others = sorted(defaults.keys() - {*HONOURED, *_SAMPLING, *_WITHOUT_EFFECT})
    changed = [name for name in others if getattr(config, name, None) not in (None, False, defaults[name])]
    return [name for name in changed if not name.startswith(("_", "output_"))]
