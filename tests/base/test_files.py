# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import errno
import resource
import signal

import pytest
import torch
from safetensors import SafetensorError

from medst_trl.base.errors import UserError
from medst_trl.base.files import explain_full_disk, is_full_disk


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: Os { code: 28, kind: StorageFull }"),
    ],
)
def test_a_full_disk_is_told_and_explained(error, tmp_path):
    assert is_full_disk(error)
    with pytest.raises(UserError, match=rf"holds {tmp_path} is full.*it resumes"), explain_full_disk(tmp_path):
        raise error


def test_torch_hides_why_it_cannot_write(tmp_path):
    """Under a limit on the size of files, `torch.save` fails in the words it has for a full disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.save(torch.zeros(100_000), tmp_path / "optimizer.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert is_full_disk(caught.value)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("no space"), KeyError(28)])
def test_other_errors_stay_what_they_are(error, tmp_path):
    assert not is_full_disk(error)
    with pytest.raises(type(error)), explain_full_disk(tmp_path):
        raise error
