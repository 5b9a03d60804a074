# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Publishing the output of a stage as a repository on the Hub, by `medst push` or at the end of a stage."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
from huggingface_hub import HfApi, get_token, metadata_load
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HFValidationError

from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import REFERENCE_FOLDER
from medst_trl.base.processes import rank
from medst_trl.base.redaction import hide_secrets
from medst_trl.pipeline.lineage import TRAINING_IMAGES_FILE

from . import PushArguments, check_push
from .cards import KIND, dataset_card, model_card
from .contents import Contents, fill_upload, find_contents, public_base


# Files of an earlier push that a later one may not have: a dataset of fewer shards, a model in fewer files.
REPLACED = {
    "dataset": ["*.parquet", f"{REFERENCE_FOLDER}/*.jsonl"],
    "model": ["*.safetensors", "*.safetensors.index.json", TRAINING_IMAGES_FILE],
}


@dataclass(frozen=True)
class Pushed:
    """
    The result of a push.

    Attributes:
        url (`str`): Address of the repository.
        title (`str`): What it holds, such as `"preferences dataset"`.
        commit (`str`): The revision that holds it, for `org/name@commit`.
        files (`int`), bytes (`int`): What was published, unchanged files of earlier pushes included.
    """

    url: str
    title: str
    commit: str
    files: int
    bytes: int


def push_directory(args: PushArguments) -> Pushed:
    """
    Publish a dataset, an adapter or a model with its card. Nothing that names this machine is uploaded.

    The token comes from `hf auth login` or HF_TOKEN. If a push is interrupted, the same call resumes it: files that
    the Hub already has are not sent again. The repository must be new, empty, or have the card of an earlier push
    of the same kind; other content is not touched.

    Args:
        args ([`PushArguments`]):
            What to publish and where. `source` is the output of a stage: a directory of Parquet files, an adapter or a
            model. If a stage makes a single dataset, the stage's output directory can be given, too.

    Raises:
        UserError: for a directory that cannot be published, a repository that cannot or must not be written, a
            missing or invalid token, or no network; each with what to do next.

    Example:

    ```python
    >>> push_directory(PushArguments("runs/vqa_rad/judge/preferences", "my-org/vqa-rad-preferences"))
    ```
    """
    contents = find_contents(Path(args.source))
    base_model, about = args.base_model_name_or_path, {"repo_id": args.repo_id, "license": args.license}
    if contents.kind == "adapter":
        base_model = public_base(contents.directory, base_model)
    if contents.repo_type == "model":
        card = model_card(contents, **about, base_model=base_model, evaluations=args.evaluation)
    elif args.evaluation:
        raise UserError(
            f"{args.source} is a dataset. Scores (--evaluation) are for the card of a model or an adapter."
        )
    else:
        card = dataset_card(contents, **about)
    check_token()
    with TemporaryDirectory(prefix="medst_push_") as staging, explain_hub_errors(args.repo_id):
        fill_upload(contents, Path(staging), card, base_model)
        return _upload(args, contents, Path(staging))


def check_token() -> None:
    """Raise a [`UserError`] if huggingface_hub finds no token."""
    if get_token() is None:
        raise UserError(
            "No Hub token was found. Log in with `hf auth login` and a token with write access, or set HF_TOKEN."
        )


class PushAfterStage:
    """
    The push that a stage's settings ask for. Created before the stage runs, so that a push that cannot work is refused
    before hours are spent on what it would publish.

    Args:
        directories (sequence of `str`):
            What the stage makes inside its `output_dir`; `""` for `output_dir` itself.
        arguments (sequence):
            The stage's dataclasses. `push_to_hub` is cleared in a trainer's, which would upload its whole directory.
    """

    def __init__(self, directories: Sequence[str], arguments: Sequence[Any]):
        self.settings = next((a for a in arguments if getattr(a, "push_to_hub", False)), None)
        if self.settings is None:
            return
        output_dir = next(a.output_dir for a in arguments if hasattr(a, "output_dir"))
        self.directories = [Path(output_dir, directory) for directory in directories]
        self.settings.push_to_hub = False
        self.repo_id = check_push(self.settings)
        check_token()

    def run(self) -> None:
        """
        Publish each directory that exists. Of a stage with several, each goes to a repository of its own. Under a
        launcher, only the first process pushes.

        If a push fails, the stage stays finished, and running it again repeats the push only.
        """
        if self.settings is None or rank() != 0:
            return
        for directory in filter(Path.is_dir, self.directories):
            repo_id = self.repo_id if len(self.directories) == 1 else f"{self.repo_id}-{directory.name}"
            args = PushArguments(str(directory), repo_id, private=self.settings.hub_private_repo is not False)
            args.revision = getattr(self.settings, "hub_revision", None)
            try:
                pushed = push_directory(args)
            except UserError as error:
                advice = f"Then run `medst push --source {directory} --repo_id {repo_id}`."
                raise UserError(f"{directory} is finished, but was not pushed. {error}\n{advice}") from None
            print(f"The {pushed.title} is at {pushed.url}, revision {pushed.commit[:12]}.")


def _upload(args: PushArguments, contents: Contents, staging: Path) -> Pushed:
    api = HfApi(library_name="medst_trl")
    repository = {"repo_id": args.repo_id, "repo_type": contents.repo_type}
    url = api.create_repo(**repository, private=args.private, exist_ok=True)
    if args.private and api.repo_info(**repository).private is False:
        raise UserError(f"{args.repo_id} is public. Push to a private repository, or publish with --private false.")
    if args.revision is not None:
        api.create_branch(**repository, branch=args.revision, exist_ok=True)
    target = repository | {"revision": args.revision}
    names = set(api.list_repo_files(**target)) - {".gitattributes"}
    if names and not args.replace_content:
        _check_ours(api, contents, target, names)
    if not names:
        # The card first: if the upload of a large directory is interrupted, the repository is recognized as ours.
        card = staging / "README.md"
        api.upload_file(path_or_fileobj=card, path_in_repo=card.name, commit_message="Add the card", **target)
    patterns = ["*"] if args.replace_content else REPLACED[contents.repo_type]
    message = f"Upload {contents.title} with medst_trl"
    api.upload_folder(folder_path=staging, commit_message=message, delete_patterns=patterns, **target)
    sizes = [path.stat().st_size for path in staging.rglob("*") if path.is_file()]
    return Pushed(str(url), contents.title, api.repo_info(**target).sha, len(sizes), sum(sizes))


def _check_ours(api: HfApi, contents: Contents, target: dict[str, Any], names: set[str]) -> None:
    """Refuse a repository whose content was not pushed by us as the same kind."""
    kind = None
    if "README.md" in names:
        with TemporaryDirectory() as directory:
            path = api.hf_hub_download(filename="README.md", local_dir=directory, **target)
            kind = (metadata_load(path) or {}).get(KIND)
    if kind == contents.kind:
        return
    what = f"another kind of content ({kind})" if kind else f"other content ({', '.join(sorted(names)[:3])})"
    raise UserError(
        f"{target['repo_id']} holds {what} and was not changed. Choose another --repo_id, or replace its content with "
        "--replace_content true (older revisions keep it)."
    )


@contextmanager
def explain_hub_errors(repo_id: str) -> Iterator[None]:
    """Turn the errors of a push to `repo_id` into a [`UserError`]. Files that were uploaded are not lost."""
    try:
        yield
    except (OSError, HFValidationError, RuntimeError, httpx2.TransportError) as error:
        # HfHubHTTPError and OfflineModeIsEnabled are OSErrors. Uploads wrap such errors in a RuntimeError.
        cause = error.__cause__ or error if isinstance(error, RuntimeError) else error
        raise UserError(
            f"The push to {repo_id} on {ENDPOINT} failed ({type(cause).__name__}): {hide_secrets(str(cause))}\n"
            "Check the name, the token (`hf auth login` or HF_TOKEN, with write access) and the network, and push "
            "again: uploaded files are kept."
        ) from error
