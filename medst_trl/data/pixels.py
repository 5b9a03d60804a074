# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of every mode as 8-bit grey or RGB.

- 1-bit: black and white become 0 and 255.
- Palette, CMYK, YCbCr, LAB and the like: RGB, by PIL's conversion.
- Transparency: laid on black, the background of radiology, so that what nobody was meant to see stays unseen.
- More than 8 bits of grey (16-bit, 32-bit, float): its own minimum..maximum becomes 0..255, linearly. So order is
  kept, and an even picture is black. 16-bit colour is reduced to its high bytes by PIL when it decodes.
"""

import numpy as np
from PIL import Image


def to_8_bit(image: Image.Image) -> Image.Image:
    """
    The picture in mode "L" or "RGB"; one that is so already comes back as it is.

    Raises:
        ValueError: for a mode that PIL cannot convert.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(rescale(np.asarray(image)))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        opaque = Image.new("RGB", image.size)
        opaque.paste(rgba, mask=rgba.getchannel("A"))
        return opaque.convert("L") if image.mode in ("L", "LA", "La", "1") else opaque
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "LAB":
        from PIL import ImageCms

        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        return ImageCms.applyTransform(image, to_rgb)
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def rescale(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """
    Values to bytes, `low`..`high` (by default their own finite minimum..maximum) to 0..255, rounded.

    Args:
        values (`np.ndarray` of any shape): NaN counts as the minimum; what lies outside is clipped.

    Returns:
        `np.ndarray` of the same shape, `uint8`.
    """
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    if low is None or high is None:
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if low == high:
        return np.zeros(values.shape, np.uint8)
    values = np.nan_to_num(values, nan=low, posinf=max(low, high), neginf=min(low, high))
    return np.clip(np.rint((values - low) / (high - low) * 255), 0, 255).astype(np.uint8)
