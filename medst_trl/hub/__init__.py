# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Publishing datasets, adapters and models on the Hub, with their cards.

This file holds the settings and checks that other stages need before there is anything to publish. It imports no
library, so that help and validation stay fast.
"""

from dataclasses import dataclass, field
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.hub_ids import is_repo_id
from medst_trl.base.settings import documented


@documented
@dataclass
class HubArguments:
    """
    Where a stage that makes datasets publishes them. The training stages use TRL's arguments instead.

    Args:
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Publish the datasets of the stage on the Hub, each with a card.
        hub_dataset_id (`str`, *optional*):
            Hub repository to publish to, OWNER/NAME.
        hub_private_repo (`bool`, *optional*, defaults to `True`):
            Make the repository private.
    """

    push_to_hub: bool = False
    hub_dataset_id: str | None = None
    hub_private_repo: bool = True


@documented
@dataclass
class PushArguments:
    """
    Arguments of `medst push`. The token comes from `hf auth login`, or from HF_TOKEN in the environment.

    Args:
        source (`str`):
            Directory of a dataset, an adapter or a model.
        repo_id (`str`):
            Hub repository, OWNER/NAME. It is created if it does not exist.
        private (`bool`, *optional*, defaults to `True`):
            Create a private repository, and refuse to push to a public one. Set it to false to make the repository
            public.
        evaluation (`list[str]`, *optional*, defaults to `[]`):
            Output directories of `medst evaluate`. Their scores are added to the card of a model.
        base_model_name_or_path (`str`, *optional*):
            Hub id of the base model, if the adapter or merged model was made from a local directory.
        license (`str`, *optional*):
            Identifier of a license on the Hub, such as cc-by-4.0.
        revision (`str`, *optional*):
            Branch to push to. It is created if it does not exist.
        replace_content (`bool`, *optional*, defaults to `False`):
            Replace the other content of a repository that is in use. Older revisions keep it.
        output_dir (`str`, *optional*):
            Directory for the record of the push. Recipes set it. Default: no record.
        overwrite (`bool`, *optional*, defaults to `False`):
            Push again even if output_dir has the record of an earlier push.
    """

    source: str
    repo_id: str
    private: bool = True
    evaluation: list[str] = field(default_factory=list)
    base_model_name_or_path: str | None = None
    license: str | None = None
    revision: str | None = None
    replace_content: bool = False
    output_dir: str | None = None
    overwrite: bool = False


def check_repo_id(repo_id: str | None, key: str) -> None:
    """Raise a [`UserError`] if the setting `key` is missing, or not an owner and a name."""
    if not is_repo_id(repo_id or ""):
        raise UserError(f"{key} is {repo_id!r}. It must be OWNER/NAME, such as my-org/vqa-rad-preferences.")


def check_push(settings: Any) -> str:
    """
    Return the repository that a stage's dataclass names, its own [`HubArguments`] or a trainer's arguments.

    Raises:
        UserError: if it is missing or not an owner and a name.
    """
    key = "hub_dataset_id" if isinstance(settings, HubArguments) else "hub_model_id"
    check_repo_id(getattr(settings, key), key)
    return getattr(settings, key)
