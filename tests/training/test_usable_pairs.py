# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Pairs are looked at before training without decoding their images, and found as long as they are."""

import io
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, List
from datasets.features.image import Image as ImageFeature
from families import prepared_processor
from PIL import Image
from tiny_dpo import pair

from medst_trl.base.errors import UserError
from medst_trl.training.preference_collator import DataCollatorForMultimodalPreference
from medst_trl.training.usable_pairs import usable_pairs


SIZES = [(32, 16), (16, 48), (24, 40)]


def image(number: int, mode: str = "RGB") -> Image.Image:
    width, height = SIZES[number % 3]
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def rows(n: int = 6) -> list[dict]:
    """Pairs with images of unequal sizes and modes."""
    return [{**pair(i), "images": [image(i, "L" if i % 2 else "RGB")]} for i in range(n)]


def as_image_column(dataset: Dataset) -> Dataset:
    alone = Dataset.from_dict({"image": [images[0] for images in dataset["images"]]})
    dataset = dataset.remove_columns("images")
    return Dataset.from_list([{**row, **image} for row, image in zip(dataset, alone, strict=True)])


def as_files(dataset: Dataset, folder) -> Dataset:
    """The same pairs, their images beside the data and turned by EXIF."""
    exif = Image.Exif()
    exif[0x112] = 6
    paths = []
    for number, images in enumerate(dataset["images"]):
        paths.append([str(folder / f"{number}.jpg")])
        upright = images[0].convert("RGB").transpose(Image.Transpose.ROTATE_90)
        upright.save(paths[-1][0], exif=exif, quality=95)
    dataset = dataset.remove_columns("images").add_column("images", paths)
    return dataset.cast_column("images", List(ImageFeature()))


@pytest.fixture
def decoded(monkeypatch):
    """How many images `datasets` has decoded."""
    count, decode = Counter(), ImageFeature.decode_example

    def counted(self, value, *args, **kwargs):
        count["decoded"] += isinstance(value, dict)
        return decode(self, value, *args, **kwargs)

    monkeypatch.setattr(ImageFeature, "decode_example", counted)
    return count


@pytest.mark.parametrize("kind", ["stored", "image column", "files", "in memory"])
@pytest.mark.parametrize("family", ["vicuna", "qwen3-vl", "idefics3"])
def test_pairs_are_as_long_as_in_the_batch_and_no_image_is_decoded(tmp_path, decoded, kind, family):
    processor, dataset = prepared_processor(family), Dataset.from_list(rows())
    if kind == "image column":
        dataset = as_image_column(dataset)
    elif kind == "files":
        dataset = as_files(dataset, tmp_path)
    elif kind == "in memory":
        pictures = {row["id"]: row["images"] for row in rows()}
        dataset = dataset.remove_columns("images").with_transform(
            lambda batch: {**batch, "images": [pictures[name] for name in batch["id"]]}
        )
    decoded.clear()
    found = usable_pairs(dataset, processor, None)
    assert not decoded and not found.set_aside and len(found.dataset) == 6
    collator = DataCollatorForMultimodalPreference(processor, share_prefix=True)
    lengths = [collator([example])["shared_length"] for example in dataset]
    differences = {ours - theirs for ours, theirs in zip(found.lengths, lengths, strict=True)}
    assert len(differences) == 1  # what stands behind the answer


@pytest.mark.parametrize("what", ["no image", "a cut png", "a cut jpeg", "no file"])
def test_a_pair_whose_image_cannot_be_read_is_set_aside(what):
    dataset = Dataset.from_list(rows())
    broken = [dict(row) for row in dataset.cast_column("images", List(ImageFeature(decode=False)))]
    if what == "no file":
        broken[2]["images"] = [{"bytes": None, "path": "/no/such/file.png"}]
    else:
        file = io.BytesIO()
        image(2).save(file, "JPEG" if what == "a cut jpeg" else "PNG")
        data = b"not an image" if what == "no image" else file.getvalue()[:-30]
        broken[2]["images"] = [{"bytes": data, "path": None}]
    dataset = Dataset.from_list(broken).cast_column("images", List(ImageFeature()))
    found = usable_pairs(dataset, prepared_processor("vicuna"), 512)
    assert found.set_aside == {"p2": "unreadable_image"}
    assert [row["id"] for row in found.dataset] == ["p0", "p1", "p3", "p4", "p5"] and len(found.lengths) == 5
    with pytest.raises(UserError, match="1 because an image of it is missing, cut short"):
        usable_pairs(dataset.select([2]), prepared_processor("vicuna"), 512)
