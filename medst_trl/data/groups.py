# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Groups: what must not be divided between training and test, such as all images of a patient.

A record's `group_id` is a keyed hash of a patient, a study or a directory. Without one, the image is its own group.
What belongs together is never divided, see [`Grouping`].
"""

import hashlib
import hmac
import os
import re
import secrets
import sys
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from types import MappingProxyType

from medst_trl.base.errors import UserError


GROUP_LEVELS = ("patient", "study", "directory")
DISJOINT = ("none", "image", "group")
NEAR_COPY_BITS, MOST_BITS = 10, 64  # of `near_copy_bits`, see `near_copies.py`: default, and above it all are alike
SALT_VARIABLE = "MEDST_GROUP_SALT"
GROUP_ID = re.compile("[0-9a-f]{6}-[0-9a-f]{20}")  # see `group_id`
_SALT_BYTES = 32


class GroupIds:
    """
    Turns patients, studies and directories into group ids, from which they cannot be recovered without the salt.

    The salt is read, and created if it is missing, when the first id is made.

    Args:
        salt_file (`str` or `Path`, *optional*):
            File of the salt. Defaults to the one that `MEDST_GROUP_SALT` names, otherwise to one of the user.
        group_by (`str`, *optional*, defaults to `"patient"`):
            What makes a group of images: `"patient"` or `"study"` in DICOM headers, or `"directory"`; with
            `"directory:1"` its first level, and so on.
        column (`str`, *optional*):
            Column that names the groups of records. Those of any column count as patients.
    """

    def __init__(self, salt_file: str | Path | None = None, group_by: str = "patient", column: str | None = None):
        self.salt_file, self.kind = salt_file, "patient" if column else group_by
        self.level, _, self.depth = group_by.partition(":")

    @cached_property
    def salt(self) -> bytes:
        """Return the salt. See [`read_salt`]."""
        return read_salt(self.salt_file)

    def of_key(self, key: str | None) -> str | None:
        """Return the group id of a patient, study or directory; None for None."""
        return None if key is None else group_id(self.salt, key, self.kind)

    def of_image(self, name: str, header: Mapping[str, str]) -> str | None:
        """
        Return the group id of an image.

        Args:
            name (`str`): Path of its file, relative to the directory of images.
            header (`dict`): Its `patient`, `study` and `series`, see [`~medst_trl.data.images.StoredImage`].
        """
        if self.level != "directory":
            return self.of_key(header.get(self.level))
        parents = PurePosixPath(name.replace("\\", "/")).parent.parts[: int(self.depth or sys.maxsize)]
        return self.of_key("/".join(parents) or header.get("series"))


def group_id(salt: bytes, key: str, kind: str = "") -> str:
    """
    Return the group id of a patient, study or directory: 6 hexadecimal digits that identify the salt and the kind of
    groups, a dash, and 20 digits of the HMAC-SHA256 of the key.
    """
    check = hashlib.sha256(b"check" + salt + kind.encode(errors="surrogatepass")).hexdigest()[:6]
    return f"{check}-{hmac.new(salt, key.strip().encode(errors='surrogatepass'), hashlib.sha256).hexdigest()[:20]}"


def salt_of(group: str) -> str:
    """Return the digits of a group id that identify its salt and kind. Only groups with the same can be compared."""
    return group.rpartition("-")[0]


def salt_path(path: str | os.PathLike | None = None) -> Path:
    """Return the path of the salt: the given one, or else the default. See [`GroupIds`]."""
    default = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share", "medst_trl", "group_salt")
    # Leaves `~` if there is no home directory. `Path.expanduser` would fail.
    return Path(os.path.expanduser(path or os.environ.get(SALT_VARIABLE) or default))


def read_salt(path: str | os.PathLike | None = None) -> bytes:
    """
    Read the salt of group ids. A missing file is created with random bytes, readable by the user only.

    Raises:
        UserError: if the file cannot be read or created, is not a regular file, or is too short for a salt.
    """
    path = salt_path(path)
    if path.parts[0].startswith("~"):
        raise UserError(f"group_salt is {path}, but there is no home directory. Set --group_salt to another file.")
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError), NamedTemporaryFile(dir=path.parent, buffering=0) as file:
                file.write(secrets.token_bytes(_SALT_BYTES))
                os.link(file.name, path)  # with all bytes, unless another process was faster
                print(f"Group ids are hashed with the new salt {path}. Keep it private, and use it for all datasets.")
        if not path.is_file():
            raise UserError(f"group_salt is not a regular file: {path}. Set --group_salt to a file of your own.")
        salt = path.read_bytes()
    except OSError as error:
        raise UserError(f"group_salt {path}: {error.strerror}. Set --group_salt to a file of your own.") from None
    if len(salt) < _SALT_BYTES // 2:
        raise UserError(f"group_salt {path} has only {len(salt)} bytes. Name a file that does not exist.")
    if path.stat().st_mode & 0o077:
        print(f"WARNING: other users have access to the salt {path}. Run `chmod 600 {path}`.")
    return salt


class Grouping:
    """
    Joins records that share a group, an image or a near copy.

    Plain images (such as black slices) and near copies of images in another group (such as pages of a report) do not
    join groups, because they occur in the data of many patients.

    Near copies are joined in chains: of the slices of a volume, each is a near copy of the next. That is right for
    what must not be divided. To find what two splits share, compare the images directly, see
    [`~medst_trl.data.overlap.Inventory`].

    Args:
        records (iterable of `tuple`):
            For each record its `image_id`s and its group ids. A group id may be None.
        near (`dict`, *optional*):
            `image_id` to its near copies, see [`~medst_trl.data.near_copies.near_copies`].
        plain (collection of `str`, *optional*):
            `image_id`s of plain images.
    """

    def __init__(
        self,
        records: Iterable[tuple[Collection[str], Collection[str | None]]],
        near: Mapping[str, Iterable[str]] = MappingProxyType({}),
        plain: Collection[str] = (),
    ) -> None:
        records, groups_of = list(records), defaultdict(set)
        for image_ids, groups in records:
            for image_id in image_ids:
                groups_of[image_id] |= {*groups} - {None}
        keys = [_keys(image_ids, groups, plain) for image_ids, groups in records]
        self._same = representatives(keys)
        groups = sorted((key for key in self._same if key.startswith("~")), reverse=True)
        self._groups = {self._same[key]: key[1:] for key in groups}  # the smallest one wins
        self.near = defaultdict(set)  # without those of another group
        for one, other in ((one, other) for one, copies in near.items() for other in copies):
            if not (groups_of[one] and groups_of[other]) or groups_of[one] & groups_of[other]:
                self.near[one].add(other)
        self._joined = representatives([*keys, *([one, *copies] for one, copies in self.near.items())])

    def of(self, image_ids: Collection[str], group: str | None, default: str, near: bool = True) -> str:
        """
        Return the name of all that is joined with a record, by default also by near copies; `default` if it has
        neither image nor group.
        """
        return next(((self._joined if near else self._same)[key] for key in _keys(image_ids, [group])), default)

    def group(self, image_ids: Collection[str], groups: Collection[str | None]) -> str | None:
        """
        Return one group for all records that share a group or an image: the smallest of theirs. So an image that two
        groups have does not hide one of them. Near copies do not count.
        """
        return next((self._groups.get(self._same[key]) for key in _keys(image_ids, groups)), None)


def _keys(image_ids: Collection[str], groups: Collection[str | None], plain: Collection[str] = ()) -> list[str]:
    # `~` sorts after hexadecimal digits, so that `min` prefers an image id, which does not depend on the salt.
    names = [f"~{group}" for group in groups if group is not None]
    return [*names, *(image_id for image_id in image_ids if not (names and image_id in plain))]


def representatives(groups: Iterable[Collection[Hashable]]) -> dict[Hashable, Hashable]:
    """
    Join groups that share a member, and return for each member the smallest one of its joined group. The order of the
    groups does not matter.
    """
    parents: dict[Hashable, Hashable] = {}

    def find(member: Hashable) -> Hashable:
        while (parent := parents.setdefault(member, member)) != member:
            parents[member] = parents[parent]  # shorten the path for the next search
            member = parent
        return member

    for group in groups:
        if found := [find(member) for member in group]:
            parents.update(dict.fromkeys(found, min(found)))
    return {member: find(member) for member in list(parents)}
