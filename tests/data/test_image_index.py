# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import dataclass, field

import pytest
from PIL import Image

from medst_trl.data.image_formats import ImageProblem
from medst_trl.data.image_index import FolderImages, MemoryImages, index_images
from medst_trl.data.image_settings import ImageSettings


@dataclass
class FakeImages:
    """Image reader: names that start with "bad" are rejected, and reading `interrupt_at` interrupts the run."""

    interrupt_at: str | None = None
    read: list[str] = field(default_factory=list)

    def image_id(self, name: str) -> str:
        if name == self.interrupt_at:
            raise KeyboardInterrupt
        self.read.append(name)
        if name.startswith("bad"):
            raise ImageProblem("truncated", "cut")
        return "id of " + name

    def stored_bytes(self, name: str) -> bytes:
        return b""


def test_each_name_is_read_once(tmp_path):
    images = FakeImages()
    good, bad, *_ = index_images(["a", "bad", "a", "b\udc80"], images, tmp_path / "index.jsonl", num_workers=2)
    assert good == {"a": "id of a", "b\udc80": "id of b\udc80"}
    assert bad["bad"].reason == "truncated" and set(images.read) == {"a", "b\udc80", "bad"} and len(images.read) == 3
    entries = map(json.loads, (tmp_path / "index.jsonl").read_text().splitlines())
    assert [entry["image"] for entry in entries] == ["a", "bad", "b\udc80"]


def test_an_interrupted_run_resumes_where_it_stopped(tmp_path):
    names, path = [f"image {n}" for n in range(50)], tmp_path / "index.jsonl"
    with pytest.raises(KeyboardInterrupt):
        index_images(names, FakeImages(interrupt_at="image 30"), path, num_workers=2)
    assert not path.exists()
    with open(tmp_path / ".index.jsonl.tmp", "a") as file:
        file.write("\0\0\0\n")  # left by a power cut
        file.write('{"image": "image 29", "ima')  # left by a killed process
    resumed = FakeImages()
    index = index_images(names, resumed, path, num_workers=2)
    assert list(index.image_ids) == names and 0 < len(resumed.read) < 45
    finished = FakeImages()
    assert index_images(names, finished, path, num_workers=1) == index and not index.problems and finished.read == []


def test_a_directory_with_some_of_the_images_is_read_whatever_is_near_it(tmp_path):
    names = [f"{n}.png" for n in range(40)]
    for name, directory in zip(names, 20 * ["other"] + 20 * ["images"], strict=True):
        (tmp_path / directory).mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / directory / name)
    good, bad, *_ = index_images(
        names,
        FolderImages(tmp_path / "images", ImageSettings(max_pixels=100)),
        tmp_path / "index.jsonl",
        num_workers=2,
    )
    assert list(good) == names[20:] and {item.reason for item in bad.values()} == {"missing"}


def test_the_cache_size_does_not_change_the_stored_bytes(tmp_path):
    images = {f"{n}.jpg": Image.new("RGB", (9, 9), (n, n, n)) for n in range(4)}
    for name, image in images.items():
        image.save(tmp_path / name, comment=b"SECRET")
    readers = [FolderImages(tmp_path, ImageSettings(max_pixels=100), cache_size) for cache_size in (0, 700, 10**6)]
    for name in images:
        assert len({reader.image_id(name) for reader in readers}) == 1
        (stored,) = {reader.stored_bytes(name) for reader in readers}
        assert b"SECRET" not in stored
    in_memory = MemoryImages(images)
    assert in_memory.image_id("0.jpg") == readers[0].image_id("0.jpg")
    assert in_memory.stored_bytes("0.jpg").startswith(b"\x89PNG")
    (tmp_path / "0.jpg").unlink()
    assert b"SECRET" not in readers[-1].stored_bytes("0.jpg")  # its bytes are kept
