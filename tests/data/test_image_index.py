# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import dataclass, field

import pytest
from PIL import Image

from medst_trl.data.image_formats import ImageProblem
from medst_trl.data.image_index import index_images
from medst_trl.data.images import FolderImages, MemoryImages


@dataclass
class Images:
    """Names that begin with "bad" cannot be used; reading `stops_at` ends the run."""

    stops_at: str | None = None
    read: list[str] = field(default_factory=list)

    def image_id(self, name: str) -> str:
        if name == self.stops_at:
            raise KeyboardInterrupt
        self.read.append(name)
        if name.startswith("bad"):
            raise ImageProblem("truncated", "cut")
        return "id of " + name


def test_each_name_is_read_once_into_a_file_that_appears_complete(tmp_path):
    images = Images()
    good, bad = index_images(["a", "bad", "a", "b\udc80"], images, tmp_path / "index.jsonl", num_workers=2)
    assert good == {"a": "id of a", "b\udc80": "id of b\udc80"}
    assert bad["bad"].reason == "truncated" and set(images.read) == {"a", "b\udc80", "bad"} and len(images.read) == 3
    entries = map(json.loads, (tmp_path / "index.jsonl").read_text().splitlines())
    assert [entry["image"] for entry in entries] == ["a", "bad", "b\udc80"]


def test_an_interrupted_run_resumes_where_it_stopped(tmp_path):
    names, path = [f"image {n}" for n in range(50)], tmp_path / "index.jsonl"
    with pytest.raises(KeyboardInterrupt):
        index_images(names, Images(stops_at="image 30"), path, num_workers=2)
    assert not path.exists()
    with open(tmp_path / ".index.jsonl.tmp", "a") as file:
        file.write('{"image": "image 29", "ima')  # as a killed process leaves it
    again = Images()
    good, _ = index_images(names, again, path, num_workers=2)
    assert list(good) == names and 0 < len(again.read) < 45
    third = Images()
    assert index_images(names, third, path, num_workers=1) == (good, {}) and third.read == []


def test_the_room_for_images_does_not_change_the_bytes(tmp_path):
    pictures = {f"{n}.jpg": Image.new("RGB", (9, 9), (n, n, n)) for n in range(4)}
    for name, picture in pictures.items():
        picture.save(tmp_path / name, comment=b"SECRET")
    readers = [FolderImages(tmp_path, 100, room) for room in (0, 700, 10**6)]
    for name in pictures:
        assert len({reader.image_id(name) for reader in readers}) == 1
        (stored,) = {reader.stored_bytes(name) for reader in readers}
        assert b"SECRET" not in stored
    in_memory = MemoryImages(pictures)
    assert in_memory.image_id("0.jpg") == readers[0].image_id("0.jpg")
    assert in_memory.stored_bytes("0.jpg").startswith(b"\x89PNG")
