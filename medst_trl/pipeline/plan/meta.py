# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Models without weights: built from a configuration alone on torch's meta device, where tensors have only a shape."""

from pathlib import Path
from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import split_revision
from medst_trl.policy.parts import on_meta

from .hub import hub_answers, is_hub_id


if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


class NotKnownYet(UserError):
    """A configuration that is not here: made by a step that has not run, or on a Hub that cannot be asked."""


def meta_model(name_or_path: str, trust_remote_code: bool = False) -> "PreTrainedModel":
    """
    Builds a vision-language model on the meta device from its configuration: no weights are read or downloaded.

    Args:
        name_or_path (`str`):
            Folder with a `config.json`, or Hub id (`org/name`, `org/name@revision`).
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the model's repository may run.

    Raises:
        UserError: if there is no configuration of a vision-language model, or it is not available offline.
    """
    from transformers import AutoConfig

    name, revision = split_revision(name_or_path)
    common = {"trust_remote_code": trust_remote_code}
    here = Path(name).is_dir()
    try:
        config = AutoConfig.from_pretrained(
            name, revision=revision, local_files_only=not here and not hub_answers(), **common
        )
    except (OSError, ValueError) as error:
        if not here and not is_hub_id(name_or_path):
            raise NotKnownYet(f"not on this machine: {name_or_path}") from None
        if not here and not hub_answers():
            raise NotKnownYet(f"config not available offline: {name_or_path}") from None
        raise UserError(f"No configuration could be loaded from {name_or_path!r}: {error}") from None
    try:
        return on_meta(config, **common)
    except ValueError as error:
        raise UserError(f"{name_or_path!r} is no vision-language model: {error}") from None


def adapter_config_of(name_or_path: str) -> "LoraConfig | None":
    """The configuration of an adapter that exists; None for anything else."""
    from peft import PeftConfig
    from transformers.utils import cached_file

    folder = Path(name_or_path)
    if not folder.is_dir():
        name, revision = split_revision(name_or_path)
        try:
            found = cached_file(
                name,
                "adapter_config.json",
                revision=revision,
                local_files_only=not hub_answers(),
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        except (OSError, ValueError):  # neither a folder nor on the Hub
            return None
        folder = Path(found).parent if found else folder
    return PeftConfig.from_pretrained(folder) if (folder / "adapter_config.json").is_file() else None


def asks_by_words(folder: str) -> bool:
    """Whether the model in a folder was saved with the text role, for which no token is trained."""
    from medst_trl.policy.chat_template import has_text_role

    template = Path(folder, "chat_template.jinja")
    return template.is_file() and has_text_role(template.read_text(encoding="utf-8"))


def make_room_for_vusr(model: "PreTrainedModel", name_or_path: str) -> None:
    """Adds the row for `<vusr>` where the vocabulary has none to spare; a folder without a tokenizer does not tell."""
    from transformers import AutoTokenizer

    from medst_trl.policy.chat_template import VUSR
    from medst_trl.policy.loading import add_embedding_row

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, local_files_only=not hub_answers())
    except (OSError, ValueError):
        return
    token_id = tokenizer.get_vocab().get(VUSR, len(tokenizer))
    add_embedding_row(model, token_id)
