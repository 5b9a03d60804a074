# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Sizes and checks of stored images; a batch without images still runs the vision tower and keeps its outputs."""

import io

import numpy as np
import pytest
import tiny_dpo
import torch
from datasets import Dataset
from datasets.features.image import Image as ImageFeature
from families import prepared_processor
from family_models import MODELS, tiny_model
from PIL import Image, ImageFile
from tiny_run import conversation

from medst_trl.policy.families import model_parts
from medst_trl.policy.loading import prepare_policy
from medst_trl.training import collator, preference_collator, rejected
from medst_trl.training.collator import DataCollatorForSelfQuestioning, usable_conversations
from medst_trl.training.images import UnreadableImage, check_image
from medst_trl.training.upstream import encode_blank_images


PIXELS = np.random.default_rng(0).integers(0, 255, (40, 24, 3), dtype=np.uint8)
FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "JPEG2000", "MPO"]


def encoded_image(kind: str, orientation: int | None = None) -> dict:
    file, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x112] = orientation
    Image.fromarray(PIXELS).save(file, kind, exif=exif)
    return {"bytes": file.getvalue(), "path": None}


def saved_to_file(image: dict, directory) -> dict:
    (directory / "image").write_bytes(image["bytes"])
    return {"bytes": None, "path": str(directory / "image")}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_image_size_equals_the_size_of_the_decoded_image(tmp_path, kind, orientation):
    image = encoded_image(kind, orientation)
    decoded = ImageFeature().decode_example(image)
    assert check_image(image) == check_image(saved_to_file(image, tmp_path)) == check_image(decoded) == decoded.size
    assert decoded.size == ((40, 24) if orientation in (6, 8) and kind not in ("BMP", "JPEG2000") else (24, 40))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_size_of_common_formats_is_read_without_decoding(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    in_memory = encoded_image(kind)
    for image in (in_memory, saved_to_file(in_memory, tmp_path)):
        assert check_image(image) == (24, 40)


def test_exif_after_the_pixels_of_a_png_is_read():
    data, rotated = encoded_image("PNG")["bytes"], encoded_image("PNG", 6)["bytes"]
    start = rotated.index(b"eXIf") - 4
    chunk = rotated[start : start + 12 + int.from_bytes(rotated[start : start + 4])]
    image = {"bytes": data[:-12] + chunk + data[-12:], "path": None}
    assert check_image(image) == ImageFeature().decode_example(image).size == (40, 24)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fraction", [0.95, 0.5, 0.02])
def test_a_truncated_image_is_reported(tmp_path, kind, fraction):
    truncated = encoded_image(kind)
    check_image(truncated)
    truncated["bytes"] = truncated["bytes"][: int(len(truncated["bytes"]) * fraction)]
    for image in (truncated, saved_to_file(truncated, tmp_path)):
        try:
            ImageFeature().decode_example(image)
        except Exception:
            with pytest.raises(UnreadableImage, match="cannot be read"):
                check_image(image)
        else:
            assert kind == "JPEG2000"  # some versions of OpenJPEG decode a part of an image
            check_image(image)


def test_bytes_after_the_end_of_an_image_are_accepted():
    image = encoded_image("JPEG")
    check_image({**image, "bytes": image["bytes"] + b"a note of the scanner"})


@pytest.mark.parametrize(
    "image",
    [{"bytes": b"", "path": None}, {"bytes": None, "path": "/no/such.png"}, {"bytes": None, "path": None}, None],
)
def test_data_that_is_not_an_image_is_reported(image):
    with pytest.raises(UnreadableImage, match="cannot be read"):
        check_image(image)


def test_an_error_in_the_check_of_pairs_rejects_no_image(monkeypatch):
    def with_a_bug(image):
        raise TypeError("a bug")

    monkeypatch.setattr(rejected, "check_image", with_a_bug)
    monkeypatch.setattr(collator, "with_decoded_images", with_a_bug)
    processor = prepared_processor("vicuna")
    example, pairs = conversation(0), Dataset.from_list([tiny_dpo.pair(0)])
    for run in (
        lambda: usable_conversations(Dataset.from_list([example]), DataCollatorForSelfQuestioning(processor)),
        lambda: preference_collator.usable_pairs(pairs, processor, None),
        lambda: DataCollatorForSelfQuestioning(processor)([example]),
    ):
        with pytest.raises(TypeError, match="a bug"):
            run()


@pytest.mark.parametrize("family", MODELS)
def test_every_family_encodes_a_blank_image_without_changing_its_outputs(family):
    model, processor = tiny_model(family)
    prepare_policy(model, processor).train()
    collator = DataCollatorForSelfQuestioning(processor)
    with_image, without = (collator([conversation(number, with_image=number == 0)]) for number in (0, 1))
    for batch in (with_image, without):
        batch.pop("question_mask")
    with torch.no_grad():
        expected = [model(**batch).logits for batch in (with_image, without)]
    encode_blank_images(model, processor)

    parts, calls = model_parts(model), []
    model.get_submodule(parts.vision_tower).register_forward_pre_hook(lambda *_: calls.append(True))
    for batch, logits in zip((with_image, without, without), [*expected, expected[1]]):
        model.zero_grad()
        output = model(**batch)
        assert torch.equal(output.logits, logits)
        output.loss.backward()
    assert len(calls) == 3  # once per batch, with or without an image
    gradients = {"vision": [], "projector": [], "language": []}
    for name, parameter in model.named_parameters():
        gradients[parts.part_of(name)].append(parameter.grad)
    assert all(gradient is not None and not gradient.any() for gradient in gradients["projector"])
    existing = [gradient for gradient in gradients["vision"] if gradient is not None]
    assert len(existing) > len(gradients["vision"]) / 2 and not any(gradient.any() for gradient in existing)
    assert any(gradient is not None and gradient.any() for gradient in gradients["language"])
