# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Resized and re-encoded copies are found, other images are not."""

import io
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medst_trl.data.groups import NEAR_COPY_BITS
from medst_trl.data.images import image_id
from medst_trl.data.near_copies import near_copies, perceptual_hash
from medst_trl.demo.phantoms import make_phantoms
from medst_trl.pipeline.stages.prepare import PrepareArguments, main


def drawn(seed: int, size=(300, 240)) -> Image.Image:
    """Return a smooth drawing: noise of a few pixels, enlarged."""
    pixels = np.random.default_rng(seed).integers(0, 256, (18, 24), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, **options) -> Image.Image:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", **options)
    return Image.open(file)


def pairs(near: dict[str, set[str]]) -> set[tuple[str, str]]:
    return {(one, other) for one, copies in near.items() for other in copies}


def distance(one: Image.Image, other: Image.Image) -> int:
    return (int(perceptual_hash(one), 16) ^ int(perceptual_hash(other), 16)).bit_count()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([0.4, 0.5, 0.75, 1, 1.6, 2]), st.integers(30, 95), st.booleans())
def test_resized_and_reencoded_copies_are_near(seed, scale, quality, is_squeezed):
    image = drawn(seed)
    size = (224, 224) if is_squeezed else tuple(round(side * scale) for side in image.size)
    copy = encoded(image.resize(size, Image.Resampling.BILINEAR), quality=quality)
    assert image_id(copy) != image_id(image)
    assert distance(image, copy) <= NEAR_COPY_BITS
    assert distance(image, drawn(seed + 1)) > 3 * NEAR_COPY_BITS


def test_noise_like_that_of_the_shared_cases_is_told_apart():
    noise, other = (Image.effect_noise((512, 640), 60).convert("RGB") for _ in range(2))
    assert distance(noise, encoded(noise.resize((256, 320)), quality=85)) <= NEAR_COPY_BITS
    assert distance(noise, encoded(noise, quality=70)) <= NEAR_COPY_BITS
    assert distance(noise, other) > 3 * NEAR_COPY_BITS


@pytest.mark.parametrize("sigma", [6, 8, 12])
def test_smooth_images_whose_copies_would_be_missed_have_no_hash(sigma):
    """Half of the bits of such an image depend only on compression noise."""
    y, x = np.mgrid[:128, :128]
    centers = np.random.default_rng(sigma).uniform(30, 98, (5, 2))
    pixels = sum(np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * sigma**2)) for a, b in centers)
    image = Image.fromarray((pixels / pixels.max() * 200).astype(np.uint8))
    copy = encoded(image.resize((96, 96)), quality=60)
    assert perceptual_hash(image) is None or distance(image, copy) <= NEAR_COPY_BITS


@pytest.mark.parametrize("size", [(1, 1), (40, 40), (700, 3), (1200, 1600)])
@pytest.mark.parametrize("gray", [0, 20, 255])
def test_images_without_structure_have_no_hash(size, gray):
    """Otherwise every two of them would be near copies."""
    plain = Image.new("L", size, gray)
    assert perceptual_hash(plain) is None and perceptual_hash(encoded(plain, quality=30)) is None
    assert perceptual_hash(Image.linear_gradient("L").resize(size)) is None  # varies in one direction only


def test_the_mode_of_an_image_makes_no_difference():
    image = drawn(3)
    assert len(perceptual_hash(image)) == 64
    assert perceptual_hash(image.convert("RGB")) == perceptual_hash(image) == perceptual_hash(image.copy())


def test_phantoms_are_not_near_copies_of_each_other():
    """The demo must keep all of its pairs."""
    phantoms = [*make_phantoms(300, 0, "test"), *make_phantoms(225, 0), *make_phantoms(600, 0, "unlabelled")]
    hashes = {phantom.id: perceptual_hash(phantom.image) for phantom in phantoms}
    assert None not in hashes.values() and near_copies(hashes, hashes, NEAR_COPY_BITS) == {}


codes = st.integers(0, 2**256 - 1)


@settings(deadline=None, max_examples=60)
@given(st.lists(codes, max_size=6), st.lists(st.tuples(codes, st.integers(0, 30)), max_size=6), st.integers(0, 24))
def test_pairs_are_those_of_a_loop(first, changes, bits):
    rng = random.Random(0)
    second = [code ^ sum(1 << bit for bit in rng.sample(range(256), flips)) for code, flips in changes]
    second += [code ^ sum(1 << bit for bit in rng.sample(range(256), bits)) for code in first]  # exactly at the limit
    one, other = (
        {f"{name}{n}": f"{code:064x}" for n, code in enumerate(codes)} for name, codes in (("a", first), ("b", second))
    )
    one["plain"] = other["plain"] = None
    expected = {
        (f"a{n}", f"b{m}") for n, x in enumerate(first) for m, y in enumerate(second) if (x ^ y).bit_count() <= bits
    }
    assert pairs(near_copies(one, other, bits)) == (expected if bits else set())
    assert near_copies(one, one, bits) == near_copies(one, dict(one), bits)


@pytest.fixture
def rad_with_copies(shared_data, tmp_path):
    """
    A table of VQA-RAD's test questions, with 100 copies of test images in train: 40 resized, 40 re-encoded, 20 without
    5% of their width and height. The other test images are not in train.
    """
    rows = [row for row in json.loads((shared_data / "vqa_rad" / "mevf_testset.json").read_text()) if row["answer"]]
    names = sorted({row["image_name"] for row in rows})
    (tmp_path / "images").mkdir()
    for name in {path.name for path in (shared_data / "vqa_rad" / "images").iterdir()}:
        (tmp_path / "images" / name).symlink_to(shared_data / "vqa_rad" / "images" / name)
    table = [
        {"image": row["image_name"], "question": row["question"], "answer": str(row["answer"]), "split": "test"}
        for row in rows
    ]
    for number, name in enumerate(random.Random(1).sample(names, 100)):
        with Image.open(tmp_path / "images" / name) as original:
            image, (width, height) = original.convert("RGB"), original.size
        if number < 40:
            size = ((width // 2, height // 2), (224, 224), (width * 3 // 2, height * 3 // 2))[number % 3]
            image.resize(size, Image.Resampling.LANCZOS).save(tmp_path / "images" / f"copy{number}.png")
        elif number < 80:
            image.save(tmp_path / "images" / f"copy{number}.jpg", quality=(30, 50, 70, 90)[number % 4])
        else:
            edge = (width // 40, height // 40)
            image.crop((*edge, width - edge[0], height - edge[1])).save(tmp_path / "images" / f"copy{number}.png")
        image_name = next((tmp_path / "images").glob(f"copy{number}.*")).name
        table.append({"image": image_name, "question": f"Copy {number}?", "answer": "yes", "split": "train"})
    others = sorted({path.name for path in (shared_data / "vqa_rad" / "images").iterdir()} - set(names))
    table += [{"image": name, "question": "Other?", "answer": "no", "split": "train"} for name in others]
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path, len(others)


@pytest.mark.slow
def test_copies_of_vqa_rad_are_found_and_no_original_is_taken_for_one(rad_with_copies, tmp_path, capsys):
    table, num_others = rad_with_copies
    from medst_trl.data.image_settings import ImageSettings

    arguments = {"source": "images", "data_path": str(table), "image_folder": str(table.parent / "images")}
    main(PrepareArguments(str(tmp_path / "out"), disjoint="image", **arguments), ImageSettings(follow_symlinks=True))
    notes = json.loads((tmp_path / "out" / "stage.json").read_text())["counts"]
    index = [json.loads(line) for line in (tmp_path / "out" / "image_index.jsonl").read_text().splitlines()]
    hashes = {row["image"]: row["near_hash"] for row in index}
    found = {tuple(sorted(pair)) for pair in pairs(near_copies(hashes, hashes, NEAR_COPY_BITS))}
    copies = {name for pair in found for name in pair if name.startswith("copy")}
    assert {f"copy{n}" for n in range(80)} <= {name.split(".")[0] for name in copies}
    assert all(pair[0].startswith("copy") for pair in found), "two originals count as copies"
    cropped = len(copies) - 80
    print(f"{cropped} of 20 cropped copies are found")
    assert notes["notes"]["near_copies_in_train_and_test"] == len(copies)
    assert notes["datasets"]["instruct/train"]["images"] == num_others + 20 - cropped


def slices(count: int) -> list[Image.Image]:
    """Return slices of a volume: blobs that move and grow from each to the next."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:128, :128]
    blobs = [(rng.uniform(20, 108, 2), rng.uniform(-25, 25, 2), rng.uniform(2, 12)) for _ in range(40)]
    found = []
    for height in np.linspace(0, 1, count):
        pixels = np.zeros((128, 128))
        for start, move, size in blobs:
            a, b = start + height * move
            pixels += np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * size**2))
        found.append(Image.fromarray((pixels / pixels.max() * 255).astype(np.uint8)))
    return found


@pytest.mark.parametrize("disjoint", ["none", "image", "group"])
def test_only_near_copies_of_test_slices_leave_the_training_set(tmp_path, monkeypatch, disjoint):
    monkeypatch.setenv("MEDST_GROUP_SALT", str(tmp_path / "salt"))
    images, lines = slices(100), ["image,question,answer,split"]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,Is the liver visible?,yes,{'test' if number >= 85 else 'train'}")
    (tmp_path / "volume.csv").write_text("\n".join(lines))
    codes = [int(perceptual_hash(image), 16) for image in images]
    apart = np.array([[(one ^ other).bit_count() for other in codes] for one in codes])
    near = np.flatnonzero((apart[:85, 85:] <= NEAR_COPY_BITS).any(axis=1)).tolist()
    assert 0 < len(near) < 40 and apart.diagonal(1).max() <= NEAR_COPY_BITS  # a chain from the first to the last
    arguments = {"source": "images", "data_path": str(tmp_path / "volume.csv"), "disjoint": disjoint}
    main(PrepareArguments(str(tmp_path / "out"), **arguments))
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {row["value"].partition(",")[0] for row in rejected} == {f"{number}.png" for number in near}
    counts = json.loads((tmp_path / "out" / "stage.json").read_text())["counts"]
    assert counts["datasets"]["instruct/train"]["images"] == 85 - len(near)
    assert counts["notes"]["near_copies_in_train_and_test"] == len(near)
