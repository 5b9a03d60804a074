# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a reference model, kept in a file that a later run, also of other people, can trust.

A number is found by what it was computed for: the file's name is the hash of the reference and of all settings it
hangs on, a row's key that of messages and pixels. Whatever has changed is simply not found.
"""

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from medst_trl.base.errors import UserError
from medst_trl.base.files import explain_full_disk
from medst_trl.data.images import image_id


logger = logging.getLogger(__name__)

FORMAT = 1  # to be raised when numbers of earlier files must not be used any more
_METADATA = b"medst_trl"
_WHAT = (
    "Log-probabilities of preference pairs under a reference model: natural logarithm, summed over the tokens of the "
    "answer, its prompt given. A pair's key is the SHA-256 of its messages and pixels (medst_trl pair_key); the file "
    "is named by the SHA-256 of `settings`."
)


class ReferenceLogProbs(NamedTuple):
    """
    A pair under the reference.

    Args:
        id (`str`): Its id when it was computed, for people; it is looked up by [`pair_key`].
        chosen, rejected (`float`): Log-probability of each answer given the prompt, in nats.
    """

    id: str
    chosen: float
    rejected: float


def pair_key(example: Mapping[str, Any]) -> str:
    """
    What a preference pair is, whatever it is called: SHA-256, in hexadecimal, of its messages and decoded pixels.

    Args:
        example (`dict`):
            `prompt`, `chosen`, `rejected` (messages) and `images` or `image` (PIL), as a dataset gives them.
    """
    images = [example["image"]] if "image" in example else list(example.get("images") or [])
    content = [example["prompt"], example["chosen"], example["rejected"], [image_id(image) for image in images]]
    return sha256_of(content)


def sha256_of(content: Any) -> str:
    """SHA-256, in hexadecimal, of anything JSON can hold; the order of keys and of sets does not count."""
    text = json.dumps(
        content, sort_keys=True, default=lambda item: sorted(item) if isinstance(item, set) else str(item)
    )
    return hashlib.sha256(text.encode()).hexdigest()


class ReferenceCache:
    """
    The file of one reference.

    Args:
        folder (`str` or `os.PathLike`):
            Where the files of all references lie; made when something is written.
        settings (`dict`):
            All that the numbers hang on beside the pair: the reference's weights, template, length, ...
        about (`dict`, *optional*):
            What a person wants to know of the file. Not compared.

    Attributes:
        path (`pathlib.Path`): The file. It appears complete under this name.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any], about: Mapping[str, Any] | None = None):
        self.settings = {"format": FORMAT, **settings}
        self.about = dict(about or {})
        self.key = sha256_of(self.settings)[:32]
        self.folder = Path(folder)
        self.path = self.folder / f"{self.key}.parquet"

    def read(self) -> dict[str, ReferenceLogProbs]:
        """
        What is known, by pair key: the file's rows and those that runs cut short have left. A file that cannot be
        read, or is not what its name says, is set aside as `*.broken`.
        """
        known = self._read_file()
        for part in self.parts():
            known |= _read_part(part)
        return known

    def parts(self) -> list[Path]:
        """What runs that did not come to [`ReferenceCache.write`] have left."""
        return sorted(self.folder.glob(f".{self.key}.*.part"))

    @contextmanager
    def append(self) -> Iterator[TextIO]:
        """A file of this process alone for [`write_lines`], which stays if the process dies."""
        with self._explain_folder():
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=f".{self.key}.", suffix=".part", dir=self.folder)
        with open(descriptor, "w", encoding="utf-8") as file:
            yield file
            path = Path(name)
            if file.tell() == 0:
                path.unlink(missing_ok=True)

    def write_lines(self, file: TextIO, rows: Mapping[str, ReferenceLogProbs]) -> None:
        """Adds what was just computed, so that a process that is killed now has not computed it for nothing."""
        with explain_full_disk(self.folder):
            file.writelines(json.dumps([key, *row]) + "\n" for key, row in rows.items())
            file.flush()

    def write(self, rows: Mapping[str, ReferenceLogProbs]) -> None:
        """Puts `rows`, and what else is known, into the file, and clears the parts away."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        parts = self.parts()
        rows = dict(rows) | {key: row for key, row in self.read().items() if key not in rows}
        metadata = {"what": _WHAT, "settings": self.settings, "about": self.about}
        table = pa.table(
            {
                "pair": pa.array(rows),
                "id": pa.array([row.id for row in rows.values()], pa.string()),
                "chosen": pa.array([row.chosen for row in rows.values()], pa.float32()),
                "rejected": pa.array([row.rejected for row in rows.values()], pa.float32()),
            },
            metadata={_METADATA: json.dumps(metadata, ensure_ascii=False)},
        )
        with self._explain_folder(), explain_full_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f".{self.key}.{os.getpid()}.tmp"
            pq.write_table(table, temporary, write_page_checksum=True)
            os.replace(temporary, self.path)
        for part in parts:
            with suppress(OSError):  # somebody else's, or gone
                part.unlink()

    def _read_file(self) -> dict[str, ReferenceLogProbs]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self.path.exists():
            return {}
        try:
            table = pq.read_table(self.path, page_checksum_verification=True)
            written_for = json.loads(table.schema.metadata[_METADATA])["settings"]
            columns = (table[name].to_pylist() for name in ("pair", "id", "chosen", "rejected"))
            rows = {key: ReferenceLogProbs(*row) for key, *row in zip(*columns, strict=True)}
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            return self._set_aside(f"it cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:100]})")
        if sha256_of(written_for) != sha256_of(self.settings):
            return self._set_aside("it was written for another reference, and renamed")
        return {key: row for key, row in rows.items() if _is_sound(key, row)}

    def _set_aside(self, problem: str) -> dict[str, ReferenceLogProbs]:
        broken = self.path.with_name(f"{self.path.name}.broken")
        with self._explain_folder():
            os.replace(self.path, broken)
        logger.warning("Set %s aside as %s: %s. It is computed again.", self.path, broken.name, problem)
        return {}

    @contextmanager
    def _explain_folder(self) -> Iterator[None]:
        try:
            yield
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(
                f"The reference's log-probabilities cannot be kept in {self.folder} ({error.strerror}). Name another "
                "folder with ref_log_probs_dir."
            ) from None


def _read_part(path: Path) -> dict[str, ReferenceLogProbs]:
    """The whole lines of a part; the last may be cut."""
    rows = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # the run it is from has just finished
        return {}
    for line in lines:
        try:
            key, *row = json.loads(line)
            row = ReferenceLogProbs(*row)
        except (ValueError, TypeError):
            continue
        if _is_sound(key, row):
            rows[key] = row
    return rows


def _is_sound(key: Any, row: ReferenceLogProbs) -> bool:
    numbers = (row.chosen, row.rejected)
    return isinstance(key, str) and len(key) == 64 and all(isinstance(n, float) and math.isfinite(n) for n in numbers)
