# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
DICOM files, shown as a radiologist sees them. The header is dropped.

Gray values go through the modality LUT and a window (linear, exact or sigmoid), whose two ends become 0 and 255: the
one that the settings give, or one of the file's. Without a window they go through the VOI LUT if there is one. Without
either, CT in Hounsfield units (HU) is shown as soft tissue (center 40, width 400), because the range from air to metal
leaves organs the same gray; other images by their own minimum..maximum. Padding around the image is black and does not
count. MONOCHROME1 is inverted, so that white is dense. Color (RGB, YBR, palette) of 8 bits is taken as it is, of 16
bits by its high bytes.
"""

import io
import warnings
from contextlib import suppress
from functools import partial

import numpy as np
from PIL import Image

from .image_formats import Frame, Frames, ImageProblem, check_pixels, image_problem, rescale
from .image_settings import ImageSettings


SOFT_TISSUE = (-160.0, 240.0)  # HU


def open_dicom(data: bytes, settings: ImageSettings) -> Frames:
    """
    Open a DICOM file.

    Raises:
        ImageProblem: `not_an_image` (no pixels, or not a DICOM file), `too_large`, `burned_in_annotation`; when a
            frame is read, `truncated`, `bad_window`, `unsupported` (a compression without a decoder, an unknown color
            space).
        ImportError: if pydicom is not installed.
    """
    import pydicom

    # Warnings about details of headers may quote them. Not `catch_warnings`, which is not for several threads.
    warnings.filterwarnings("ignore", module="pydicom")
    try:
        header = pydicom.dcmread(io.BytesIO(data), force=True)
        width, height = int(header.get("Columns") or 0), int(header.get("Rows") or 0)
        count, is_marked = int(header.get("NumberOfFrames") or 1), _text(header, "BurnedInAnnotation").upper() == "YES"
    except Exception as error:  # the message of pydicom may quote the header
        raise ImageProblem("not_an_image", type(error).__name__) from None
    pixels = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
    if min(width, height, count) < 1 or not any(name in header for name in pixels):
        raise ImageProblem("not_an_image", "not a DICOM file with pixels")
    check_pixels(width, height, settings.max_pixels)
    if is_marked and not settings.accept_burned_in:
        raise ImageProblem("burned_in_annotation", "text in the picture; --accept_burned_in true accepts it")
    return Frames(count, partial(_read, header, settings), count // 2, _groups(header))


def _text(header, name: str) -> str:
    return str(header.get(name) or "").strip()


def _groups(header) -> dict[str, str]:
    """Return what the header says; of what it lacks, the smaller group, so that a series stays together anyway."""
    groups, value = {}, ""
    for group, name in (("series", "SeriesInstanceUID"), ("study", "StudyInstanceUID"), ("patient", "PatientID")):
        if value := _text(header, name) or value:
            groups[group] = value
    return groups


def _read(header, settings: ImageSettings, index: int) -> Frame:
    from pydicom.pixels import apply_color_lut, pixel_array

    colors = _text(header, "PhotometricInterpretation")
    if not colors.startswith(("MONOCHROME", "PALETTE", "RGB", "YBR")):
        raise ImageProblem("unsupported", "unknown photometric interpretation")
    with image_problem("truncated"), image_problem("unsupported", (NotImplementedError, RuntimeError, AttributeError)):
        values = pixel_array(header, index=index)  # turns YBR into RGB
    with image_problem("bad_window"):
        if colors == "PALETTE COLOR":
            values = apply_color_lut(values, header)
        if values.ndim == 3 and values.shape[2] == 3:
            return Frame(Image.fromarray((values >> (8 * (values.dtype.itemsize - 1))).astype(np.uint8)))
        gray, note = _gray(values, _attributes(header, index), _text(header, "Modality").upper(), settings)
    return Frame(Image.fromarray(gray), note=note)


def _attributes(header, index: int):
    """Return what decides how a frame is shown. The functional groups of an enhanced object take precedence."""
    shared = list(header.get("SharedFunctionalGroupsSequence") or ())[:1]
    own = list(header.get("PerFrameFunctionalGroupsSequence") or ())[index : index + 1]
    names = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
    items = [group.get(name)[0] for group in shared + own for name in names if group.get(name)]
    if not items:
        return header
    attributes = header.group_dataset(0x0028)
    attributes.file_meta = header.file_meta
    for item in items:
        attributes.update(item)
    return attributes


def _gray(values: np.ndarray, header, modality: str, settings: ImageSettings) -> tuple[np.ndarray, str]:
    """Return the stored values (height, width) of a frame as bytes of the same shape, and a note."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    padding, kind = _padding(values, header), modality if modality.isalpha() else "DICOM"
    # Neither unsigned values without an intercept nor 8 bits (a screen shot) can be in HU, where air is negative.
    can_be_hounsfield = values.dtype.itemsize > 1 and ("RescaleIntercept" in header or values.dtype.kind != "u")
    is_hounsfield = can_be_hounsfield and modality == "CT" and (_text(header, "RescaleType") or "HU").upper() == "HU"
    if header.get("RescaleSlope") == 0:
        raise ImageProblem("unsupported", "RescaleSlope is 0")
    values, note = apply_modality_lut(values, header), ""
    if settings.shown_range and is_hounsfield:
        gray = rescale(values, *settings.shown_range)
    else:
        gray = _windowed(values, header, settings.window_index)
        if gray is None and settings.window_index:
            gray, note = _windowed(values, header, 0), f"{kind}_images_without_window_{settings.window}"
        if gray is None:
            has_lut = bool(header.get("VOILUTSequence"))
            note = "" if has_lut else f"{kind}_images_without_window"
            shown = np.where(padding, np.nan, apply_voi(values, header))  # the values themselves without a LUT
            gray = rescale(shown, *(SOFT_TISSUE if is_hounsfield and not has_lut else ()))
        if settings.shown_range and modality in ("CT", ""):
            note = f"{kind}_images_not_in_HU"
    gray = 255 - gray if header.PhotometricInterpretation == "MONOCHROME1" else gray
    return np.where(padding, np.uint8(0), gray), note


def _windowed(values: np.ndarray, header, index: int) -> np.ndarray | None:
    """Apply one of the file's windows; None if there is none, or it cannot be used (a width of 0)."""
    from pydicom.pixels import apply_windowing

    numbers = [header[name].VM if name in header else 0 for name in ("WindowCenter", "WindowWidth")]
    if not all(numbers) or index >= max(numbers):
        return None
    # The range of the result depends on the header in many ways, so ask the window itself for its two ends.
    with suppress(Exception), np.errstate(over="ignore"):
        ends = apply_windowing(np.array([-1e12, 1e12]), header, index)
        return rescale(apply_windowing(values, header, index), *ends)
    return None


def _padding(values: np.ndarray, header) -> np.ndarray:
    """Return which stored values are outside the image, such as the corners around a round field of view."""
    kind = "" if values.dtype.kind in "iu" else "Float"
    value = header.get(f"{kind}PixelPaddingValue")
    if value is None:
        return np.zeros(values.shape, bool)
    limit = header.get(f"{kind}PixelPaddingRangeLimit")
    # A signed padding value may be written as unsigned (63536 for -2000), and the reverse.
    ends = np.array([value, value if limit is None else limit]).astype(values.dtype)
    return (ends.min() <= values) & (values <= ends.max())
