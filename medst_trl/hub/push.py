# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Publishing what a stage wrote, as a repository on the Hub."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError

from .cards import KIND, dataset_card, model_card
from .contents import Contents, find_contents
from .hub_errors import explain_hub_errors
from .staging import public_base, stage_files


if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# Files of an earlier push that this one may have no more: a dataset of fewer shards, a model in fewer files.
REPLACED = {"dataset": ["*.parquet"], "model": ["*.safetensors", "*.safetensors.index.json"]}


@dataclass(frozen=True)
class Pushed:
    """
    What a push did.

    Attributes:
        url (`str`): Address of the repository.
        title (`str`): What it is, such as `"preferences dataset"`.
        commit (`str`): The revision that holds it, for `org/name@commit`.
        files (`int`), bytes (`int`): What was published, unchanged files of earlier pushes included.
    """

    url: str
    title: str
    commit: str
    files: int
    bytes: int


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = True,
    evaluation: Sequence[str | os.PathLike] = (),
    run: str | os.PathLike | None = None,
    base_model_name_or_path: str | None = None,
    license: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    replace_content: bool = False,
) -> Pushed:
    """
    Publish a dataset, an adapter or a model with its card. Nothing that names this machine is uploaded.

    The token comes from `hf auth login` or HF_TOKEN. Interrupted, the same call goes on: what the Hub has already is
    not sent again. A repository that holds something else is left alone: it has to be new, empty, or have the card of
    an earlier push of the same kind. `upload_folder` sends the files; it commits large folders in parts by itself.

    Args:
        folder (`str` or `os.PathLike`):
            What a stage wrote: a folder with Parquet files, an adapter or a model; of `medst judge` and `medst
            generate` also the output folder.
        repo_id (`str`):
            `"org/name"`. The repository is made if there is none.
        private (`bool`, *optional*, defaults to `True`):
            Whether a new repository is private. With `True`, an existing public one is refused.
        evaluation (sequence of `str` or `os.PathLike`, *optional*):
            Folders of `medst evaluate` whose scores go onto a model's card.
        run (`str` or `os.PathLike`, *optional*):
            Folder of the run, to find the records of inputs that have moved.
        base_model_name_or_path (`str`, *optional*):
            Hub id of the base of an adapter or of a merged model (`"org/name"`, `"org/name@revision"`), where that
            names a local folder.
        license (`str`, *optional*):
            The Hub's name of a licence, such as `"cc-by-4.0"`.
        revision (`str`, *optional*):
            Branch to push to; made if there is none.
        commit_message (`str`, *optional*):
            Of the commit.
        replace_content (`bool`, *optional*, defaults to `False`):
            Push into a repository of other content all the same, and delete that there (older revisions keep it).

    Raises:
        UserError: for a folder that cannot be published, a repository that may not or must not be written, no or a
            wrong token, no network; each with what to do next.

    Example:

    ```python
    >>> push_folder("runs/vqa_rad/judge/preferences", "my-org/vqa-rad-preferences")
    ```
    """
    from huggingface_hub import HfApi

    check_repo_id(repo_id, "repo_id")
    contents = find_contents(Path(folder))
    base_model = base_model_name_or_path
    if contents.kind == "adapter":
        base_model = public_base(contents.folder, base_model_name_or_path)
    run = Path(run) if run else None
    if contents.repo_type == "dataset":
        if evaluation:
            raise UserError(f"{folder} is a dataset; scores (--evaluation) go onto the card of a model or an adapter.")
        card = dataset_card(contents, repo_id, license=license, run=run)
    else:
        evaluations = [Path(path) for path in evaluation]
        card = model_card(contents, repo_id, base_model=base_model, evaluations=evaluations, license=license, run=run)
    check_token()
    with TemporaryDirectory(prefix="medst_push_") as staging, explain_hub_errors(repo_id):
        stage_files(contents, Path(staging), card, base_model)
        api = HfApi(library_name="medst_trl")
        url, is_new = _open_repository(api, contents, repo_id, private, revision, replace_content)
        target = {"repo_id": repo_id, "repo_type": contents.repo_type, "revision": revision}
        if is_new:
            # The card first: if the upload of a large folder is cut short, the repository is known as ours.
            message = "Add the card"
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", commit_message=message, **target)
        api.upload_folder(
            folder_path=staging,
            commit_message=commit_message or f"Upload {contents.title} with medst_trl",
            delete_patterns=["*"] if replace_content else REPLACED[contents.repo_type],
            **target,
        )
        commit = api.repo_info(repo_id, repo_type=contents.repo_type, revision=revision).sha
        files = [path for path in Path(staging).rglob("*") if path.is_file()]
        return Pushed(url, contents.title, commit, len(files), sum(path.stat().st_size for path in files))


def check_repo_id(repo_id: str, key: str) -> None:
    """Raise a [`UserError`] if the setting `key` is not an owner and a name."""
    if not _REPO_ID.fullmatch(repo_id):
        raise UserError(f"{key} is {repo_id!r}; it has to be OWNER/NAME, such as my-org/vqa-rad-preferences.")


def check_token() -> None:
    """Raise a [`UserError`] if huggingface_hub finds no token."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(
            "There is no Hub token. Make one with write access at https://huggingface.co/settings/tokens, then log in "
            "with `hf auth login`, or set HF_TOKEN in the environment."
        )


def _open_repository(
    api: "HfApi", contents: Contents, repo_id: str, private: bool, revision: str | None, replace_content: bool
) -> tuple[str, bool]:
    """Its address, and whether it has no content yet. Makes it where there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    where = {"repo_id": repo_id, "repo_type": contents.repo_type}
    try:
        info = api.repo_info(**where)
    except RepositoryNotFoundError:
        url = str(api.create_repo(**where, private=private, exist_ok=True))
        info = api.repo_info(**where)
    else:
        url = f"{api.endpoint}/{'datasets/' if contents.repo_type == 'dataset' else ''}{repo_id}"
    if private and info.private is False:
        raise UserError(
            f"{repo_id} is public, and pushes are private unless told otherwise. Make the repository private in its "
            f"settings, push to another one, or publish with --private false."
        )
    if revision is not None:
        try:
            info = api.repo_info(**where, revision=revision)
        except RevisionNotFoundError:
            api.create_branch(**where, branch=revision, exist_ok=True)
            info = api.repo_info(**where, revision=revision)
    names = {file.rfilename for file in info.siblings or ()} - {".gitattributes"}
    if names and not replace_content:
        _check_ours(api, contents, repo_id, info.sha, names)
    return url, not names


def _check_ours(api: "HfApi", contents: Contents, repo_id: str, revision: str, names: set[str]) -> None:
    """Refuse a repository whose content no push of this kind has made."""
    kind = None
    if "README.md" in names:
        from huggingface_hub import metadata_load

        with TemporaryDirectory() as folder:
            path = api.hf_hub_download(
                repo_id, "README.md", repo_type=contents.repo_type, revision=revision, local_dir=folder
            )
            kind = (metadata_load(path) or {}).get(KIND)
    if kind == contents.kind:
        return
    what = (
        f"another kind of content ({kind})" if kind else f"content of another origin ({', '.join(sorted(names)[:3])})"
    )
    raise UserError(
        f"{repo_id} holds {what}, which a push of {contents.kind} would mix with or replace. Nothing was touched. "
        "Choose another --repo_id, or replace what it holds with --replace_content true (older revisions keep it)."
    )
