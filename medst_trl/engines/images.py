# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Images of requests to a server: not too large, and with their true media type."""

import base64
import io
import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from medst_trl.data.image_formats import ImageProblem, image_problem, to_8_bit
from medst_trl.data.images import store_image


# Formats that every server reads. Others are sent as PNG.
_SENT_AS_IS = {"JPEG": "image/jpeg", "PNG": "image/png"}


@dataclass(frozen=True)
class RequestImage:
    """
    One image of a request.

    Args:
        data (`bytes`):
            The image file as stored in the dataset.
        image_size (`int`, *optional*):
            Maximum side in pixels. A larger image is scaled down, a smaller one is sent with its own bytes.
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
        try:
            return cls(image if isinstance(image, bytes) else Path(image).read_bytes(), image_size)
        except (OSError, TypeError, ValueError) as error:
            raise ImageProblem("unreadable", type(error).__name__) from None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the stored bytes. Together with `image_size` it determines what is sent."""
        return sha256(self.data).hexdigest()

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height as sent, from the header alone."""
        width, height = self._open().size
        scale = (self.image_size or math.inf) / max(width, height)
        if scale >= 1:
            return width, height
        return max(1, round(width * scale)), max(1, round(height * scale))

    @cached_property
    def data_url(self) -> str:
        """
        The image as a data URL.

        Raises:
            ImageProblem: if it cannot be decoded.
        """
        image = self._open()
        if image.size == self.size and image.format in _SENT_AS_IS:
            return _data_url(_SENT_AS_IS[image.format], self.data)
        with image_problem("unreadable"):
            small = to_8_bit(image)
            if small.size != self.size:
                small = small.resize(self.size, Image.Resampling.LANCZOS)
        file, sent_as = io.BytesIO(), "JPEG" if image.format == "JPEG" else "PNG"
        small.save(file, sent_as, **({"quality": 90} if sent_as == "JPEG" else {}))
        return _data_url(_SENT_AS_IS[sent_as], file.getvalue())

    def _open(self) -> Image.Image:
        with warnings.catch_warnings(), image_problem("not_an_image"):
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(self.data))


def without_image_bytes(body: Any) -> Any:
    """Return a copy of a request for display, with data URLs replaced by their type and length."""
    if isinstance(body, dict):
        return {key: without_image_bytes(value) for key, value in body.items()}
    if isinstance(body, list):
        return [without_image_bytes(value) for value in body]
    if isinstance(body, str) and body.startswith("data:image/"):
        kind, _, data = body.partition(";base64,")
        return f"<{len(data) * 3 // 4:,} bytes of {kind.removeprefix('data:')}>"
    return body


def _data_url(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
