# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Find near copies: resized or re-encoded copies of an image, which have other pixels and so another `image_id`.

A perceptual hash describes an image by its coarse structure. Measured on the 315 images of VQA-RAD: copies (half to
double size, squeezed to 224 x 224, JPEG of quality 30) differ from their originals by at most 8 of 256 bits, and two
originals by at least 76. Copies that lost 5% of width and height differ by 50 bits on average and are not found.
Mirrored, rotated, padded, inverted and brighter copies are not found either.
"""

from collections.abc import Mapping
from functools import cache
from itertools import chain

import numpy as np
from PIL import Image

from medst_trl.base.processes import cores, ordered_map


_SIDE, _WAVES = 64, 16  # pixels of the reduced image; frequencies in each direction
_MIN_CONTRAST = 1.0  # gray levels; a fifth of the frequencies of a plain image has less, only noise of compression
_AT_ONCE = 1 << 20  # comparisons, which need 8 bytes each


def perceptual_hash(image: Image.Image) -> str | None:
    """
    Describe an image by the signs of its 16 x 16 lowest frequencies that vary in both directions.

    Returns:
        `str` or `None`: 256 bits as 64 hexadecimal digits. None for a plain image: bits of only noise would differ
        between an image and its copy.
    """
    gray = image.convert("L")
    # By whole factors first: the image as floats would need four times the memory.
    gray = gray.reduce(tuple(max(1, side // (8 * _SIDE)) for side in gray.size))
    pixels = np.asarray(gray.convert("F").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS))
    waves = _waves() @ pixels @ _waves().T
    waves -= np.median(waves)
    if np.quantile(np.abs(waves), 1 / 5) < _MIN_CONTRAST:
        return None
    return np.packbits(waves > 0).tobytes().hex()


@cache
def _waves() -> np.ndarray:
    """Return the rows 1 to 16 of the orthonormal cosine transform of 64 values."""
    angles = np.pi / _SIDE * (np.arange(_SIDE) + 0.5) * np.arange(1, _WAVES + 1)[:, None]
    return np.sqrt(2 / _SIDE) * np.cos(angles)


def near_copies(first: Mapping[str, str | None], second: Mapping[str, str | None], bits: int) -> dict[str, set[str]]:
    """
    Find the images of two collections whose hashes differ by at most `bits`.

    Args:
        first, second (`dict`):
            `image_id` to hash; images without a hash are left out. They may be the same object.
        bits (`int`):
            Largest number of different bits. 0 finds nothing.

    Returns:
        `dict`: an `image_id` of `first` to its near copies in `second`, if it has any. An image is not its own copy.
    """
    from tqdm.auto import tqdm

    near: dict[str, set[str]] = {}
    names, others = ([name for name, code in hashes.items() if code] for hashes in (first, second))
    if not bits or not names or not others:
        return near
    codes, other_codes = (
        np.frombuffer(bytes.fromhex("".join(hashes[name] for name in kept)), np.uint64).reshape(len(kept), -1)
        for hashes, kept in ((first, names), (second, others))
    )
    rows = max(1, _AT_ONCE // len(others))

    def compare(start: int) -> list[list[int]]:
        from_column = start if first is second else 0
        # The first 64 bits exclude almost all pairs.
        different = np.bitwise_count(codes[start : start + rows, None, 0] ^ other_codes[from_column:, 0])
        row, column = np.nonzero(different <= bits)
        row, column = row + start, column + from_column
        is_near = np.bitwise_count(codes[row] ^ other_codes[column]).sum(axis=1) <= bits
        return np.stack((row, column), axis=1)[is_near].tolist()

    starts = range(0, len(names), rows)
    found = tqdm(ordered_map(compare, starts, cores()), "near copies", len(starts), disable=len(starts) < 1000 or None)
    for row, column in chain.from_iterable(found):
        pairs = [(names[row], others[column])]
        pairs += [(others[column], names[row])] if first is second else []
        for one, other in pairs:
            if one != other:
                near.setdefault(one, set()).add(other)
    return near
