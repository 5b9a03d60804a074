# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Images of random pixels."""

import numpy as np
from PIL import Image


def random_image(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Return an RGB image of random pixels. `size` is (width, height)."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))
