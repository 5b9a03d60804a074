# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from random_images import random_image

from medst_trl.data.image_formats import ImageProblem
from medst_trl.engines.images import RequestImage, without_image_bytes
from medst_trl.selftrain.judge.prompts.paper import paper_messages


def image_bytes(width, height, mode="RGB", format="PNG"):
    file = io.BytesIO()
    random_image(0, (width, height)).convert(mode).save(file, format)
    return file.getvalue()


def decode_data_url(image):
    """Return the media type and the bytes of the image as they are sent."""
    kind, _, data = image.data_url.partition(";base64,")
    return kind, base64.b64decode(data)


@pytest.mark.parametrize(("format", "kind"), [("PNG", "data:image/png"), ("JPEG", "data:image/jpeg")])
def test_a_small_image_is_sent_unchanged(format, kind):
    data = image_bytes(40, 30, format=format)
    assert decode_data_url(RequestImage.read({"bytes": data, "path": None}, 64)) == (kind, data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("image_size", [None, 20])
def test_an_image_is_sent_upright_and_without_metadata(format, image_size):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x010E], exif[0x0112] = "PATIENT DOE", 6
    random_image(0, (40, 30)).save(file, format, exif=exif)
    image = RequestImage.read({"bytes": file.getvalue(), "path": None}, image_size)
    sent = decode_data_url(image)[1]
    assert b"PATIENT" in file.getvalue() and b"PATIENT" not in sent
    size = (15, 20) if image_size else (30, 40)
    assert image.size == Image.open(io.BytesIO(sent)).size == size


@pytest.mark.parametrize(
    ("format", "kind"), [("PNG", "data:image/png"), ("JPEG", "data:image/jpeg"), ("TIFF", "data:image/png")]
)
@pytest.mark.parametrize("size", [(200, 100), (100, 200), (65, 3)])
def test_a_large_image_is_scaled_down(format, kind, size):
    image = RequestImage.read(image_bytes(*size, format=format), 64)
    media_type, data = decode_data_url(image)
    decoded = Image.open(io.BytesIO(data))
    assert media_type == kind == f"data:image/{decoded.format.lower()}"
    assert decoded.size == image.size and max(decoded.size) == 64
    assert decoded.size[0] / decoded.size[1] == pytest.approx(size[0] / size[1], rel=0.4)


def test_images_are_read_from_bytes_rows_files_and_pil_images(tmp_path):
    data = image_bytes(20, 20)
    (tmp_path / "a.png").write_bytes(data)
    for image in (
        data,
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        tmp_path / "a.png",
    ):
        assert decode_data_url(RequestImage.read(image, 64))[1] == data
    as_pil = RequestImage.read(Image.open(io.BytesIO(data)), 64)
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(decode_data_url(as_pil)[1]))), np.asarray(Image.open(io.BytesIO(data)))
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_every_mode_can_be_scaled_down(mode):
    assert max(Image.open(io.BytesIO(decode_data_url(RequestImage.read(image_bytes(90, 90, mode), 32))[1])).size) == 32


@pytest.mark.parametrize(
    "image", [b"", b"no image", image_bytes(90, 90)[:200], {"bytes": None, "path": "/nowhere.png"}, None, 7]
)
def test_unreadable_images_raise_an_image_problem(image):
    with pytest.raises(ImageProblem):
        _ = RequestImage.read(image, 32).data_url


def test_a_displayed_request_has_no_image_bytes():
    body = {"messages": paper_messages("Q?", ["a", "b"], [RequestImage.read(image_bytes(20, 20), 64).data_url])}
    shown = without_image_bytes(json.dumps(body))
    assert "base64" not in shown and "bytes of image/png" in shown and "[Question]" in shown
