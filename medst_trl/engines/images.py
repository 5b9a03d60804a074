# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Images of requests to a server: not too large, and with their true media type."""

import base64
import io
import math
import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from medst_trl.data.image_formats import image_problem
from medst_trl.data.images import publishable, store_image


@dataclass(frozen=True)
class RequestImage:
    """
    One image of a request.

    Args:
        data (`bytes`):
            The image file as stored in the dataset. It is sent upright and without metadata, as PNG or JPEG.
        image_size (`int`, *optional*):
            Maximum side in pixels. A larger image is scaled down.
    """

    data: bytes
    image_size: int | None = None

    @classmethod
    def read(cls, image: Any, image_size: int | None = None) -> "RequestImage":
        """
        Read an image in any form that a dataset gives: PIL, `{"bytes", "path"}`, bytes or a path.

        Raises:
            ImageProblem: if its file cannot be read.
        """
        if isinstance(image, Image.Image):
            return cls(store_image(image).bytes, image_size)
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        with image_problem("unreadable", (OSError, TypeError, ValueError)):
            return cls(image if isinstance(image, bytes) else Path(image).read_bytes(), image_size)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the stored bytes. Together with `image_size` it determines what is sent."""
        return sha256(self.data).hexdigest()

    @cached_property
    def _stored(self) -> bytes:
        """The image as stages store it: a PNG or JPEG file of upright 8-bit pixels, without metadata."""
        return publishable({"bytes": self.data})["bytes"]

    def _open(self) -> Image.Image:
        with warnings.catch_warnings(), image_problem("not_an_image"):
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(self._stored))

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height as sent."""
        width, height = self._open().size
        scale = min(1.0, (self.image_size or math.inf) / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))

    @cached_property
    def data_url(self) -> str:
        """
        The image as a data URL.

        Raises:
            ImageProblem: if it cannot be decoded.
        """
        image, data = self._open(), self._stored
        if image.size != self.size:
            file = io.BytesIO()
            with image_problem("unreadable"):
                small = image.resize(self.size, Image.Resampling.LANCZOS)
            small.save(file, image.format, quality=90)  # PNG has no quality
            data = file.getvalue()
        return f"data:image/{image.format.lower()};base64,{base64.b64encode(data).decode()}"


def without_image_bytes(text: str) -> str:
    """Return the text of a request for display, with data URLs replaced by their type and length."""
    return re.sub(
        r"data:(image/\w+);base64,([\w+/=]*)", lambda url: f"<{len(url[2]) * 3 // 4:,} bytes of {url[1]}>", text
    )
