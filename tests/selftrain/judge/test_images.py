# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import base64
import io

import numpy as np
import pytest
from PIL import Image

from medst_trl.data.image_formats import ImageProblem
from medst_trl.selftrain.judge.images import JudgeImage, without_image_bytes
from medst_trl.selftrain.judge.prompts.paper import paper_messages


def picture(width, height, mode="RGB", format="PNG"):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def sent(image):
    kind, _, data = image.data_url.partition(";base64,")
    return kind, base64.b64decode(data)


@pytest.mark.parametrize(("format", "kind"), [("PNG", "data:image/png"), ("JPEG", "data:image/jpeg")])
def test_a_small_image_is_sent_unchanged(format, kind):
    data = picture(40, 30, format=format)
    assert sent(JudgeImage.read({"bytes": data, "path": None}, 64)) == (kind, data)


@pytest.mark.parametrize(
    ("format", "kind"), [("PNG", "data:image/png"), ("JPEG", "data:image/jpeg"), ("TIFF", "data:image/png")]
)
@pytest.mark.parametrize("size", [(200, 100), (100, 200), (65, 3)])
def test_a_large_image_is_scaled_down(format, kind, size):
    image = JudgeImage.read(picture(*size, format=format), 64)
    type_said, data = sent(image)
    decoded = Image.open(io.BytesIO(data))
    assert type_said == kind == f"data:image/{decoded.format.lower()}"
    assert decoded.size == image.size and max(decoded.size) == 64
    assert decoded.size[0] / decoded.size[1] == pytest.approx(size[0] / size[1], rel=0.4)


def test_every_form_of_an_image_is_read(tmp_path):
    data = picture(20, 20)
    (tmp_path / "a.png").write_bytes(data)
    for image in (
        data,
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        tmp_path / "a.png",
    ):
        assert sent(JudgeImage.read(image, 64))[1] == data
    as_pil = JudgeImage.read(Image.open(io.BytesIO(data)), 64)
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(sent(as_pil)[1]))), np.asarray(Image.open(io.BytesIO(data)))
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_every_mode_can_be_scaled_down(mode):
    assert max(Image.open(io.BytesIO(sent(JudgeImage.read(picture(90, 90, mode), 32))[1])).size) == 32


@pytest.mark.parametrize(
    "image", [b"", b"no image", picture(90, 90)[:200], {"bytes": None, "path": "/nowhere.png"}, None, 7]
)
def test_unreadable_images_raise_an_image_problem(image):
    with pytest.raises(ImageProblem):
        _ = JudgeImage.read(image, 32).data_url


def test_a_displayed_request_has_no_image_bytes():
    body = {"messages": paper_messages("Q?", ["a", "b"], [JudgeImage.read(picture(20, 20), 64).data_url])}
    shown = str(without_image_bytes(body))
    assert "base64" not in shown and "bytes of image/png" in shown and "[Question]" in shown
