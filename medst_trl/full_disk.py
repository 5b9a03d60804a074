# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Tells a full disk, however the library that met it puts it."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medst_trl.errors import UserError


# safetensors and torch.save raise errors of their own kind, which keep the cause in their text or not at all.
_TEXT = re.compile(r"No space left on device|StorageFull|QuotaExceeded|inline_container\.cc|PytorchStreamWriter")


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that there was no space left to write to."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return _TEXT.search(str(error)) is not None


@contextmanager
def explain_full_disk(folder: str | Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" while `folder` is written into a [`UserError`]."""
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise UserError(
            f"The disk that holds {folder} is full. What is finished is kept: make room and run the same command "
            "again, it continues there."
        ) from None
