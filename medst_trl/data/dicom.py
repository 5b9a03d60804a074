# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""One DICOM file as an 8-bit picture: modality LUT, then its first window, then 8 bits. Nothing of its header
survives.

What is burned into the pixels stays: names drawn into a screenshot have to be removed before.
"""

import io

import numpy as np
from PIL import Image

from medst_trl.base.errors import UserError

from .images import ImageProblem, check_pixels
from .pixels import rescale


def read_dicom(data: bytes, max_pixels: int) -> Image.Image:
    """
    The picture of a DICOM file, mode "L" or "RGB".

    Grey values go through the modality LUT and the first window (linear, exact or sigmoid), whose two ends become 0
    and 255. Without a window, the VOI LUT if there is one, and their own minimum..maximum. MONOCHROME1 is inverted, so
    that white is dense. Colour (RGB, YBR, palette) of 8 bits is taken as it is, of 16 bits by its high bytes.

    Raises:
        ImageProblem: `several_frames`, `too_large`, `truncated`, `bad_window`, `unsupported` (a compression without a
            decoder, an unknown colour space), `not_an_image` (no pixels, or no DICOM at all).
        UserError: if pydicom is not installed.
    """
    try:
        import pydicom
    except ImportError:
        raise UserError(
            "There are DICOM files among the images, and reading them needs pydicom. "
            "Install it with `pip install 'medst_trl[dicom]'`."
        ) from None
    try:
        header = pydicom.dcmread(io.BytesIO(data), force=True)
        if "Rows" not in header or not {"PixelData", "FloatPixelData", "DoubleFloatPixelData"} & set(header.dir()):
            raise ImageProblem("not_an_image", "no DICOM file with pixels")
        check_pixels(int(header.Columns), int(header.Rows), max_pixels)
        several = int(header.get("NumberOfFrames") or 1) > 1
    except ImageProblem:
        raise
    except Exception as error:  # pydicom raises almost anything on a damaged header
        raise ImageProblem("not_an_image", type(error).__name__) from None
    if several:
        raise ImageProblem("several_frames")
    return Image.fromarray(_pixels(header))


def _pixels(header) -> np.ndarray:
    """Bytes of shape (height, width) or (height, width, 3)."""
    from pydicom.pixels import apply_color_lut, pixel_array

    try:
        values = pixel_array(header)  # turns YBR into RGB
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        raise ImageProblem("unsupported", str(error)) from None
    except Exception as error:
        raise ImageProblem("truncated", str(error)) from None
    colours = header.get("PhotometricInterpretation", "")
    try:
        if colours == "PALETTE COLOR":
            values = apply_color_lut(values, header)
        if values.ndim == 3 and values.shape[2] == 3:
            return (values >> (8 * (values.dtype.itemsize - 1))).astype(np.uint8)
        if values.ndim != 2 or not colours.startswith("MONOCHROME"):
            raise ImageProblem("unsupported", f"photometric interpretation {colours!r}")
        grey = _window(values, header)
    except ImageProblem:
        raise
    except Exception as error:
        raise ImageProblem("bad_window", str(error)) from None
    return 255 - grey if colours == "MONOCHROME1" else grey


def _window(values: np.ndarray, header) -> np.ndarray:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing

    values = apply_modality_lut(values, header)
    if header.get("WindowWidth") is None or header.get("WindowCenter") is None:
        return rescale(apply_voi_lut(values, header) if "VOILUTSequence" in header else values)
    # What comes out lies in a range that follows from the header in many ways; ask the window itself for its two ends.
    with np.errstate(over="ignore"):
        low, high = apply_windowing(np.array([-1e12, 1e12]), header)
        return rescale(apply_windowing(values, header), low, high)
