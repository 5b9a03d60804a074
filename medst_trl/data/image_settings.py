# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""How image files are read: size limit, frames, window, links."""

import re
from dataclasses import dataclass

from medst_trl.base.errors import UserError
from medst_trl.base.settings import check_bounds, documented


_FRAMES = re.compile(r"middle|all|every:([1-9]\d*)")
_WINDOW = re.compile(r"\s*(-?\d*\.?\d+)\s*,\s*(?=[\d.]*[1-9])(\d*\.?\d+)\s*|[1-9]\d*")


@documented
@dataclass(frozen=True)
class ImageSettings:
    """
    Settings of `medst prepare` for image files.

    Args:
        max_pixels (`int`, *optional*, defaults to `100000000`):
            Reject images with more pixels before decoding them.
        frames (`str`, *optional*):
            Frames to use of a file with several (DICOM, TIFF, GIF, NIfTI): middle, all, or every:N for each N-th. With
            all and every:N, each frame of an unlabeled file is an image, and files with a text are rejected as
            several_frames, because which frame the text is about is unknown. Default: all such files are rejected. A
            table can name one frame: scan.dcm#12.
        window (`str`, *optional*):
            Gray values to show as black to white. CENTER,WIDTH in Hounsfield units (HU), for example 40,400 or
            -600,1500, for CT in HU and for NIfTI; or N for the N-th window in each DICOM file. Default: the file's
            first window; CT without one, 40,400; other images without one, their own minimum to maximum.
        accept_burned_in (`bool`, *optional*, defaults to `False`):
            Accept DICOM files whose header says that text, such as the patient's name, is part of the picture
            (BurnedInAnnotation). Default: they are rejected.
        follow_symlinks (`bool`, *optional*, defaults to `False`):
            Follow symbolic links that lead out of the directory of images, as in DataLad datasets and snapshots of the
            Hub.
    """

    max_pixels: int = 100_000_000
    frames: str | None = None
    window: str | None = None
    accept_burned_in: bool = False
    follow_symlinks: bool = False

    def check(self) -> None:
        """Raise a [`UserError`] for an invalid value."""
        check_bounds(self, at_least={"max_pixels": 1})
        if self.frames is not None and not _FRAMES.fullmatch(self.frames):
            raise UserError(f"Unknown frames {self.frames!r}. Choose middle, all, or every:N, for example every:10.")
        if self.window is not None and not _WINDOW.fullmatch(self.window):
            raise UserError(
                f"Invalid window {self.window!r}. Give CENTER,WIDTH, for example 40,400, or N for the N-th window of "
                "each file."
            )

    @property
    def max_bytes(self) -> int:
        """Size of the largest file to read into memory: 16 bytes per pixel, of an image or of a volume."""
        return 16 * max(self.max_pixels, 100_000_000)

    @property
    def frame_step(self) -> int | None:
        """The step from one chosen frame to the next, 1 for `all`; None if at most one frame is used."""
        match = _FRAMES.fullmatch(self.frames or "middle")
        return None if match[0] == "middle" else int(match[1] or 1)

    @property
    def shown_range(self) -> tuple[float, float] | None:
        """The lowest and highest value of a `window` as CENTER,WIDTH."""
        if not self.window or "," not in self.window:
            return None
        center, width = map(float, self.window.split(","))
        return center - width / 2, center + width / 2

    @property
    def window_index(self) -> int:
        """Which of a file's windows to use, from 0."""
        return int(self.window) - 1 if self.window and "," not in self.window else 0
