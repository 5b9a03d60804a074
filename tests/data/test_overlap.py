# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Ids and near hashes of the images in datasets are those that `prepare` would give, with none for what cannot be read.
The closest relation between a record and a benchmark or another split is reported.
"""

from io import BytesIO

import numpy as np
import pytest
from datasets import Dataset, Features, List
from datasets import Image as ImageColumn
from PIL import Image
from random_images import random_image

from medst_trl.base.errors import UserError
from medst_trl.data.images import identify, image_id, load_image, store_image
from medst_trl.data.near_copies import perceptual_hash
from medst_trl.data.overlap import (
    Inventory,
    hash_images,
    image_ids_of,
    normalized,
    why_groups_not_compared,
    with_image_ids,
)


def stored(shade: int) -> dict:
    return {"bytes": store_image(Image.new("L", (5, 4), shade)).bytes, "path": None}


def test_ids_of_images_are_computed_once_per_image_and_equal_those_of_prepare(tmp_path, monkeypatch):
    deep = Image.fromarray((np.arange(20, dtype=np.uint16) * 1000).reshape(4, 5))
    deep.save(tmp_path / "deep.png")
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG nothing")
    paths = ["deep.png", "deep.png", "damaged.png", "missing.png"]
    images = [[{"bytes": None, "path": str(tmp_path / path)}] for path in paths] + [[stored(3), stored(4)], []]
    given = [None] * 5 + [["ab" * 32]]
    dataset = Dataset.from_dict({"images": images, "image_ids": given}).cast_column("images", List(ImageColumn()))
    decoded, stored_by_prepare = [], store_image(deep).image_id
    monkeypatch.setattr("medst_trl.data.overlap.cores", lambda: 1)  # two threads may decode one image at once
    monkeypatch.setattr("medst_trl.data.images.image_id", lambda image: decoded.append(image) or image_id(image))
    found = image_ids_of(dataset)
    assert found[0] == found[1] == [stored_by_prepare] and len(decoded) == 3
    assert found[2] == found[3] == [None]
    assert found[4] == [image_id(Image.new("L", (5, 4), shade)) for shade in (3, 4)]
    assert found[5] == ["ab" * 32]
    filled = with_image_ids(dataset)["image_ids"][:]
    assert [filled[row] for row in (0, 1, 4, 5)] == [found[row] for row in (0, 1, 4, 5)]
    assert len({*filled[2], *filled[3]}) == 2 and {len(filled[2][0]), len(filled[3][0])} == {64}


def in_16_bits(image: Image.Image) -> bytes:
    file = BytesIO()
    Image.fromarray(np.asarray(image).astype(np.uint16) * 16 + 1000).save(file, "PNG")
    return file.getvalue()


def turned(image: Image.Image) -> bytes:
    """The file of a camera that was held on its side: the picture is turned, and its orientation says so."""
    file, exif = BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("encoded", [in_16_bits, turned])
def test_the_near_hash_is_of_the_picture_that_prepare_stores(encoded):
    image = random_image(0).convert("L").resize((200, 120))
    data = encoded(image)
    found, own = load_image(data), int(perceptual_hash(image), 16)
    assert identify(data) == (found.image_id, found.near_hash)
    assert (int(found.near_hash, 16) ^ own).bit_count() <= 4
    rows = [{"images": [{"bytes": data, "path": None}], "image_ids": ["ab" * 32]}]
    assert hash_images(Dataset.from_list(rows).cast_column("images", List(ImageColumn()))) == {
        "ab" * 32: found.near_hash
    }


def test_a_file_that_cannot_be_decoded_has_neither_id_nor_hash():
    assert identify(b"") == identify(b"\x89PNG\r\n") == (None, None)


def test_questions_about_an_image_that_cannot_be_decoded_are_left_out(capsys):
    images = [stored(1), {"bytes": b"no image", "path": None}, stored(2)]
    rows = [{"image": image, "image_id": None, "n": place} for place, image in enumerate(images)]
    dataset = Dataset.from_list(rows, Features.from_arrow_schema(
        Dataset.from_list([rows[0] | {"image_id": ""}]).cast_column("image", ImageColumn()).features.arrow_schema
    ))  # fmt: skip
    found = with_image_ids(dataset)
    assert found["n"][:] == [0, 2] and found["image_id"][:] == [identify(stored(n)["bytes"])[0] for n in (1, 2)]
    assert "1 of 3 rows cannot be used. The first: row 1: its image is missing or damaged" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of its 1 rows can be used"):
        with_image_ids(dataset.select([1]))


def test_images_of_datasets_are_hashed_once_whatever_their_columns_are():
    images = [random_image(n) for n in range(3)]
    ids = list(map(image_id, images))
    rows = [{"images": [images[0], images[1]], "image_ids": ids[:2]}, {"images": [images[1]], "image_ids": [ids[1]]}]
    several = Dataset.from_list(rows).cast_column("images", List(ImageColumn()))
    one = Dataset.from_list(
        [{"image": images[2], "image_id": ids[2]}],
        Features(image=ImageColumn(), image_id=several.features["image_ids"].feature),
    )
    expected = {name: perceptual_hash(image) for name, image in zip(ids, images)}
    assert hash_images(several) | hash_images(one) == expected


# What two datasets share


def inventory(*records) -> Inventory:
    made = Inventory()
    for image_ids, group, *questions in records:
        made.add_record(image_ids, group, questions)
    return made


def test_the_closest_relation_is_found():
    held = inventory((["a"], "s-P", "normal"), (["b", "c"], None, "where"))
    held.near = {"d": {"b", "c"}, "e": {"d"}}
    assert held.relation(["x", "a"], "s-P") == ("image", "a")
    assert held.relation(["x", "d"], "s-P") == ("near_copy", "b")
    assert held.relation(["x"], "s-P") == ("group", "s-P")
    assert held.relation(["e"], None) == held.relation([], "s-Q") == ("nothing", None)  # no chains of copies
    assert held.relation(["x"], "r-P") == ("nothing", None)  # of another salt or kind
    assert held.relation(["x", "d"], "s-P", "where") == ("question", "where")
    assert held.relation(["a"], None, "where") == ("image", "a") and held.texts == {"normal", "where"}


@pytest.mark.parametrize(
    ("training", "reason"),
    [
        (inventory((["t"], "s-1"), (["u"], "s-2")), None),
        (inventory((["t"], None)), "the training data has no groups"),
        (inventory((["t"], "r-1")), "groups of another kind, or hashed with another salt"),
        (inventory((["t"], "s-1"), (["v"], "r-1")), "groups of another kind, or hashed with another salt"),
        (inventory((["t"], "s-1"), (["u"], None)), "1 training image without a group"),
    ],
)
def test_groups_are_compared_only_if_all_would_be_found(training, reason):
    assert why_groups_not_compared(inventory((["a"], "s-1")), training) == reason
    assert why_groups_not_compared(inventory((["a"], None)), training) == "the benchmark has no groups"
    two_salts = inventory((["a"], "s-1"), (["b"], "t-1"))
    assert why_groups_not_compared(two_salts, training) is not None


@pytest.mark.parametrize("spelling", ["Is there a fracture ?", "is there  a fracture", "Is there a \ufb01racture?\n"])
def test_spellings_of_a_question_are_equal(spelling):
    assert normalized(spelling.replace("\ufb01r", "fr")) == normalized("Is there a fracture?")
