# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""`push_to_hub` in a stage's settings: what it needs is asked for before the work, and the push comes after it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError


@dataclass
class HubArguments:
    """Where a stage that makes datasets publishes them. The training stages have TRL's arguments for it."""

    push_to_hub: bool = field(default=False, metadata={"help": "Publish what the stage makes, with a data card."})
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Repository for it, OWNER/NAME."})
    hub_private_repo: bool = field(default=True, metadata={"help": "Make it private; false publishes it."})


class PushAfterStage:
    """
    The push that a stage's settings ask for. Checked when made, before hours are spent on what it would publish.

    Args:
        folders (sequence of `str`):
            What the stage makes inside its `output_dir`; `""` for the folder itself.
        arguments (sequence):
            The stage's dataclasses. `push_to_hub` is taken from a trainer's, which would upload its whole folder.
    """

    def __init__(self, folders: Sequence[str], arguments: Sequence[Any]):
        self.settings = next((a for a in arguments if getattr(a, "push_to_hub", False)), None)
        if self.settings is None:
            return
        output_dir = next(a.output_dir for a in arguments if hasattr(a, "output_dir"))
        self.folders = [Path(output_dir, folder) for folder in folders]
        self.key = "hub_dataset_id" if isinstance(self.settings, HubArguments) else "hub_model_id"
        self.repo_id = getattr(self.settings, self.key)
        self.settings.push_to_hub = False
        check_push(self.repo_id, self.key)

    def run(self) -> None:
        """Publishes each folder that is there; several get its name behind theirs."""
        if self.settings is None:
            return
        private = self.settings.hub_private_repo is not False
        for folder in filter(Path.is_dir, self.folders):
            repo_id = self.repo_id if len(self.folders) == 1 else f"{self.repo_id}-{folder.name}"
            push_after_stage(folder, repo_id, private=private, revision=getattr(self.settings, "hub_revision", None))


def check_push(repo_id: str | None, key: str) -> None:
    """
    Refuse a push that could not work before hours are spent on what it would publish.

    Args:
        repo_id (`str` or `None`): The repository.
        key (`str`): The setting that names it: `"hub_model_id"` or `"hub_dataset_id"`.

    Raises:
        UserError: without a repository, a token, or with a name that cannot be one.
    """
    from .push import check_repo_id, check_token

    if repo_id is None:
        raise UserError(f"push_to_hub is set, but not where to: add {key}: OWNER/NAME.")
    check_repo_id(repo_id, key)
    check_token()


def push_after_stage(folder: str | os.PathLike, repo_id: str, **settings: Any) -> None:
    """
    [`push_folder`] for a stage that is finished; under a launcher the first process pushes.

    What the stage made stays finished if the push fails, and its next start pushes again.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        return
    from .push import push_folder

    try:
        pushed = push_folder(folder, repo_id, **settings)
    except UserError as error:
        raise UserError(
            f"What is in {Path(folder)} is finished, but was not pushed. {error}\nThen run the same command, or "
            f"`medst push --source {folder} --repo_id {repo_id}`."
        ) from None
    print(f"The {pushed.title} is at {pushed.url}, revision {pushed.commit[:12]}.")
