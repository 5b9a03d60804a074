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
    """
    path = find_model_file(name_or_path, "generation_config.json", revision, local_files_only=False)
    settings = read_object(path) if path else {}
    try:
        GenerationConfig(**settings)
        return None
    except _ERRORS as error:
        kept = {name: settings[name] for name in (*HONOURED, *_SAMPLING) if name in settings}
        ignored = ", ".join(sorted(settings.keys() - kept.keys() - {*_WITHOUT_EFFECT[-1:], "_from_model_config"}))
        warnings.warn(
            f"generation_config.json of {name_or_path!r} is invalid ({error}). Ignored: {ignored}.", stacklevel=2
        )
        return GenerationConfig(**kept)


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
    config, rows = model.generation_config, model.config.get_text_config().vocab_size
    try:
        ends, strings = config.eos_token_id, config.stop_strings
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        config.eos_token_id = list(dict.fromkeys(map(operator.index, [*ends, *stop_token_ids])))
        if config.pad_token_id is None or config.pad_token_id < 0:  # the original Llama's is -1
            config.pad_token_id = pad_token_id
        never = {*map(operator.index, config.suppress_tokens or ()), vusr_token_id} - {None}
        config.suppress_tokens = sorted(never) or None
        config.stop_strings = list(filter("".__ne__, [strings] if isinstance(strings, str) else strings or ())) or None
        "".join(config.stop_strings or ())
        config.bad_words_ids, config.sequence_bias = config.bad_words_ids or None, config.sequence_bias or None
        ids, scores = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, rows)
        if config.bad_words_ids:
            NoBadWordsLogitsProcessor(config.bad_words_ids, torch.tensor(config.eos_token_id))(ids, scores)
        if config.sequence_bias:
            SequenceBiasLogitsProcessor(config.sequence_bias)(ids, scores)
        _repair(config, model.name_or_path)
    except _ERRORS as error:
        raise UserError(
            f"The generation_config.json of {model.name_or_path!r} cannot be used ({error}). Correct or remove "
            f"{', '.join(HONOURED)}, or what the message names."
        ) from error


def _repair(config: GenerationConfig, name: str) -> None:
    """Change what transformers refuses to save, with a warning."""
    try:
        return config.validate(strict=True)
    except ValueError as error:
        problems = dict(re.findall(r"^- `(\w+)`: (.*)", str(error), re.MULTILINE))
        if not problems:
            raise
    samples = config.do_sample is None and config.temperature != 0
    sampling = {key for key, reason in problems.items() if samples and reason.startswith("`do_sample`")}
    changes = ["with do_sample"] if sampling else []
    config.do_sample = True if sampling else config.do_sample
    for key in sorted(problems.keys() - sampling):
        setattr(config, key, None)
        changes.append(f"without {key}")
    problem = f"The generation_config.json of {name!r} is invalid."
    warnings.warn(f"{problem} A trained model is saved {', '.join(changes)}.", stacklevel=4)


def ignored_settings(config: GenerationConfig) -> list[str]:
    """Return the names of the settings of a generation config that would change a text, but are not used."""
    defaults = GenerationConfig().to_dict() | GenerationConfig._get_default_generation_params()
    others = sorted(defaults.keys() - {*HONOURED, *_SAMPLING, *_WITHOUT_EFFECT})
    changed = [name for name in others if getattr(config, name, None) not in (None, False, defaults[name])]
    return [name for name in changed if not name.startswith(("_", "output_"))]
