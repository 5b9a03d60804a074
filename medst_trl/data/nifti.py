# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
NIfTI volumes (`.nii`, `.nii.gz`), shown as axial slices from the feet up, as radiologists see them: the patient's
right is on the left, the front is at the top.

The volume is turned to the closest of the standard orientations (RAS+), not resampled. If it was acquired in sagittal
or coronal slices (a single one, or more than three times as thick as their pixels), these are shown. Gray values are
scaled by the window of the settings, else by the header's (`cal_min`, `cal_max`), else by the minimum..maximum of the
volume, so that slices can be compared.
"""

import gzip
import io
import math
import zlib
from functools import cache

import numpy as np
from PIL import Image

from medst_trl.base.errors import UserError

from .image_formats import (
    Frame,
    Frames,
    ImageProblem,
    check_pixels,
    finite_range,
    image_problem,
    max_bytes,
    rescale,
)
from .image_settings import ImageSettings
from .source import NIFTI_SUFFIXES


def is_nifti(data: bytes, name: str) -> bool:
    """Whether a file is a NIfTI volume, by its name or its first bytes."""
    if name.lower().endswith(NIFTI_SUFFIXES):
        return True
    try:
        head = _unpacked(data, 348)
    except ImageProblem:
        return False
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


def open_nifti(data: bytes, settings: ImageSettings) -> Frames:
    """
    Open a volume. Its frames are the slices; those of a series of volumes (4D) follow each other.

    Raises:
        ImageProblem: `not_an_image`, `too_large`, `unsupported` (complex values, an invalid orientation); when a frame
            is read, `truncated`.
        UserError: if nibabel is not installed.
    """
    try:
        import nibabel
    except ImportError:
        raise UserError(
            "There are NIfTI files among the images, and reading them needs nibabel. "
            "Install it with `pip install 'medst_trl[nifti]'`."
        ) from None
    with image_problem("not_an_image"):
        head = _unpacked(data, 540)
        is_second = head[4:8] == b"n+2\0"
        header = nibabel.Nifti2Header(head) if is_second else nibabel.Nifti1Header(head[:348])
        shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), int(header.get_data_offset())
        slope, intercept = (1.0, 0.0) if None in header.get_slope_inter() else header.get_slope_inter()
        if not shape or min(shape) < 1 or offset < 0:
            raise ImageProblem("not_an_image", f"shape {shape}")
    if dtype.kind == "c":
        raise ImageProblem("unsupported", "complex values")
    space = (*shape, 1, 1)[:3]
    with image_problem("unsupported"):
        orientation = nibabel.io_orientation(header.get_best_affine())
        order = [int(np.flatnonzero(orientation[:, 0] == axis)[0]) for axis in range(3)]  # fails if one is missing
        turned, sizes = [space[axis] for axis in order], nibabel.affines.voxel_sizes(header.get_best_affine())[order]
    axis = next((axis for axis in range(3) if turned[axis] == 1 or sizes[axis] > 3 * np.delete(sizes, axis).max()), 2)
    check_pixels(*np.delete(turned, axis), settings.max_pixels)
    number = math.prod(shape)
    end = offset + number * dtype.itemsize
    if end > max_bytes(settings.max_pixels):
        raise ImageProblem("too_large", f"{end} bytes")

    @cache
    def volumes() -> np.ndarray:
        """Stored values of shape (right, front, up, volumes), with the axis of the slices at position 2."""
        with image_problem("truncated"):
            values = np.frombuffer(_unpacked(data, end), dtype, number, offset).reshape((*space, -1), order="F")
        return np.moveaxis(nibabel.apply_orientation(values, orientation), axis, 2)

    own = float(header["cal_min"]), float(header["cal_max"])
    window = settings.shown_range or (own if own[0] < own[1] else None)

    @cache
    def range_of(volume: int) -> list[float]:
        return sorted(end * slope + intercept for end in finite_range(volumes()[..., volume]))

    def read(index: int) -> Frame:
        volume, slice_index = divmod(index, turned[axis])
        values = volumes()[:, :, slice_index, volume][::-1, ::-1].T
        if dtype.names:
            return Frame(Image.fromarray(np.stack([values[name] for name in "RGB"], axis=-1)))
        gray = rescale(values * slope + intercept, *(window or range_of(volume)))
        return Frame(Image.fromarray(gray), note="" if window else "NIfTI_images_without_window")

    count = number // math.prod(space) * turned[axis]
    middle = count // turned[axis] // 2 * turned[axis] + turned[axis] // 2
    return Frames(count, read, middle)


def _unpacked(data: bytes, size: int) -> bytes:
    """Return the first bytes of a file that may be compressed. No more is unpacked, whatever the file claims."""
    if not data.startswith(b"\x1f\x8b"):
        return data[:size]
    with image_problem("truncated", (OSError, EOFError, zlib.error)), gzip.open(io.BytesIO(data)) as file:
        return file.read(size)
