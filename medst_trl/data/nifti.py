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
import logging
import math
import zlib
from functools import cache

import numpy as np
from PIL import Image

from .cells import NIFTI_SUFFIXES
from .image_formats import Frame, Frames, ImageProblem, check_pixels, finite_range, image_problem, rescale
from .image_settings import ImageSettings


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
        ImageProblem: `not_an_image`, `too_large`, `truncated`, `unsupported` (complex values, an invalid orientation).
        ImportError: if nibabel is not installed.
    """
    import nibabel

    nibabel.imageglobals.logger.setLevel(logging.CRITICAL)  # it prints values of headers to stderr
    data = _unpacked(data, settings.max_bytes + 1)
    with image_problem("not_an_image"):
        image = (nibabel.Nifti2Image if data[4:8] == b"n+2\0" else nibabel.Nifti1Image).from_bytes(data)
        stored, affine = image.dataobj, image.affine
        if not stored.shape or min(stored.shape) < 1:
            raise ImageProblem("not_an_image", f"shape {stored.shape}")
    number = math.prod(stored.shape)
    if max(len(data), stored.offset + number * stored.dtype.itemsize) > settings.max_bytes:
        raise ImageProblem("too_large", f"more than {settings.max_bytes} bytes")
    if stored.dtype.kind == "c":
        raise ImageProblem("unsupported", "complex values")
    with image_problem("truncated"):  # as stored: scaled values would need up to eight times the memory
        values = np.frombuffer(data, stored.dtype, number, stored.offset)
        values = values.reshape((*(*stored.shape, 1, 1)[:3], -1), order="F")
    with image_problem("unsupported"):
        orientation = nibabel.io_orientation(affine)
        turned = nibabel.apply_orientation(values, orientation)
        back = nibabel.orientations.inv_ornt_aff(orientation, values.shape[:3])
        sizes = nibabel.affines.voxel_sizes(affine @ back)
    flat = (axis for axis in range(3) if turned.shape[axis] == 1 or sizes[axis] > 3 * np.delete(sizes, axis).max())
    volumes = np.moveaxis(turned, next(flat, 2), 2)
    check_pixels(*volumes.shape[:2], settings.max_pixels)
    own = float(image.header["cal_min"]), float(image.header["cal_max"])
    return _slices(volumes, stored, settings.shown_range or (own if own[0] < own[1] else None))


def _slices(volumes: np.ndarray, scale, window: tuple[float, float] | None) -> Frames:
    """Return the frames of stored values of shape (right, front, slices, volumes); `scale` has `slope` and `inter`."""

    @cache
    def range_of(volume: int) -> list[float]:
        return sorted(end * scale.slope + scale.inter for end in finite_range(volumes[..., volume]))

    def read(index: int) -> Frame:
        volume, place = divmod(index, slices)
        values = volumes[:, :, place, volume][::-1, ::-1].T
        if values.dtype.names:
            return Frame(Image.fromarray(np.stack([values[name] for name in "RGB"], axis=-1)))
        gray = rescale(values * scale.slope + scale.inter, *(window or range_of(volume)))
        return Frame(Image.fromarray(gray), note="" if window else "NIfTI_images_without_window")

    slices, count = volumes.shape[2:]
    return Frames(slices * count, read, count // 2 * slices + slices // 2)


def _unpacked(data: bytes, size: int) -> bytes:
    """Return the first bytes of a file that may be compressed. No more is unpacked, whatever the file claims."""
    if not data.startswith(b"\x1f\x8b"):
        return data[:size]
    with image_problem("truncated", (OSError, EOFError, zlib.error)), gzip.open(io.BytesIO(data)) as file:
        return file.read(size)
