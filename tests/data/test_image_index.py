# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import dataclass, field

import pytest
from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.data.assemble import assemble
from medst_trl.data.groups import GroupIds
from medst_trl.data.image_formats import ImageProblem
from medst_trl.data.image_index import index_images
from medst_trl.data.image_settings import ImageSettings
from medst_trl.data.images import FolderImages, MemoryImages, StoredImage
from medst_trl.data.source import Conversation, Records


@dataclass
class FakeImages:
    """Image reader of version 0.1.0. Names that begin with "bad" are rejected, and `interrupt_at` interrupts."""

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
    found = index_images(["a", "bad", "a", "b\udc80"], images, tmp_path / "index.jsonl", num_workers=2)
    assert {name: entry.get("image_id") for name, entry in found.items()} == {
        "a": "id of a", "bad": None, "b\udc80": "id of b\udc80",
    }  # fmt: skip
    assert (
        found["bad"]["reason"] == "truncated" and set(images.read) == {"a", "b\udc80", "bad"} and len(images.read) == 3
    )
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
    assert list(index) == names and 0 < len(resumed.read) < 45
    finished = FakeImages()
    assert index_images(names, finished, path, num_workers=1) == index and finished.read == []
    assert all("image_id" in entry for entry in index.values())


def test_a_directory_with_some_of_the_images_is_read_whatever_is_near_it(tmp_path):
    names = [f"{n}.png" for n in range(40)]
    for name, directory in zip(names, 20 * ["other"] + 20 * ["images"], strict=True):
        (tmp_path / directory).mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / directory / name)
    found = index_images(
        names,
        FolderImages(tmp_path / "images", ImageSettings(max_pixels=100)),
        tmp_path / "index.jsonl",
        num_workers=2,
    )
    assert [entry.get("reason", "") for entry in found.values()] == 20 * ["missing"] + 20 * [""]


def test_images_are_stored_as_they_were_identified(tmp_path):
    images = {f"{n}.jpg": Image.new("RGB", (9, 9), (n, n, n)) for n in range(4)}
    for name, image in images.items():
        image.save(tmp_path / name, comment=b"SECRET")
    reader, in_memory = FolderImages(tmp_path, ImageSettings(max_pixels=100)), MemoryImages(images)
    for name in images:
        stored = reader.load(name)
        assert stored.bytes == reader.load(name, identify=False).bytes and b"SECRET" not in stored.bytes
        made = in_memory.load(name)
        assert (made.image_id, made.near_hash) == (stored.image_id, stored.near_hash)
        assert made.bytes.startswith(b"\x89PNG")


@dataclass
class Scans:
    """Image reader: the file of "P1 3.dcm" is about the patient P1, and its pixels say 3."""

    read: list[str] = field(default_factory=list)

    def load(self, name: str, identify: bool = True) -> StoredImage:
        self.read.append(name)
        patient, number = name.removesuffix(".dcm").split()
        note = "dark" if number > "3" else ""
        return StoredImage(b"", f"id {number}", {"patient": patient}, f"{int(number):064x}", note)


def test_an_index_of_another_salt_or_version_is_read_again_or_refused(tmp_path):
    names, path = [f"P{n % 2} {n}.dcm" for n in range(6)], tmp_path / "index.jsonl"
    groups, others = (GroupIds(tmp_path / salt) for salt in ("salt", "other"))
    index = index_images(names, Scans(), path, 1, groups)
    assert len({entry["group_id"] for entry in index.values()}) == 2
    with pytest.raises(UserError, match="index.jsonl was written with another group_salt.* add --overwrite"):
        index_images(names, Scans(), path, 1, others)
    lines = path.read_text().splitlines()
    partial = path.rename(tmp_path / ".index.jsonl.tmp")
    partial.write_text("\n".join([*lines[:3], ""]))
    reader = Scans()
    mixed = index_images(names, reader, path, 1, others)
    assert len({entry["group_id"] for entry in mixed.values()}) == 2 and reader.read == names

    old = [json.dumps({"image": name, "image_id": "of other pixels"}) for name in names[:3]]
    path.rename(partial).write_text("\n".join([*old, *lines[3:4], ""]))  # begun by version 0.1.0
    reader = Scans()
    assert index_images(names, reader, path, 1, groups) == index and reader.read == [*names[:3], *names[4:]]
    path.write_text("\n".join([*old, *lines[3:], ""]))  # its datasets may be there
    with pytest.raises(UserError, match="by an earlier version that reads DICOM files differently"):
        index_images(names, Scans(), path, 1, groups)
    path.write_text(path.read_text().replace(".dcm", ".png"))
    found = index_images([name.replace(".dcm", ".png") for name in names], Scans(), path, 1, groups)
    assert found["P0 0.png"]["image_id"] == "of other pixels" and "near_hash" in found["P1 3.png"]


def test_notes_count_images_and_not_their_copies(tmp_path):
    names, groups = ["a 3.dcm", "a 4.dcm", "b 4.dcm", "c 5.dcm"], GroupIds(tmp_path / "salt")
    index = index_images(names, Scans(), tmp_path / "index.jsonl", 1, groups)
    records = Records("own", conversations=[Conversation(name, (name,), []) for name in names])
    assert assemble(records, index, groups=groups).counts["notes"] == {"dark": 2}


def test_groups_by_directory_do_not_depend_on_how_a_table_spells_a_path(tmp_path):
    for name in ("P/1.png", "P/2.png", "Q/3.png"):
        (tmp_path / "scans" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / "scans" / name)
    names = ["P/1.png", str(tmp_path / "scans" / "P" / "2.png"), "./Q/../P/1.png", "Q/3.png"]
    groups = GroupIds(tmp_path / "salt", "directory:1")
    found = index_images(names, FolderImages(tmp_path / "scans"), tmp_path / "index.jsonl", 1, groups)
    assert list(found) == names
    assert [entry["group_id"] for entry in found.values()] == [groups.of_key("P")] * 3 + [groups.of_key("Q")]
