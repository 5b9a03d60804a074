# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of several frames: which frames become images, and under which names."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medst_trl.data.image_formats import ImageProblem
from medst_trl.data.image_index import choose_frames
from medst_trl.data.image_settings import ImageSettings
from medst_trl.data.images import FolderImages, load_image, open_image
from medst_trl.data.schema import dialogue
from medst_trl.data.source import Conversation, Question, Records


def picture(seed: int, mode: str = "RGB", size=(9, 7)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def save_frames(path, count: int, **options):
    """Save a file whose frames are `picture(0)`, `picture(1)`, ... and return their pixels."""
    first, *others = pictures = [picture(seed) for seed in range(count)]
    first.save(path, save_all=True, append_images=others, **options)
    return list(map(np.asarray, pictures))


def pixels(stored) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(stored.bytes)).convert("RGB"))


def problem_of(path, options=None, frame=None) -> str:
    with pytest.raises(ImageProblem) as error:
        load_image(path, options or ImageSettings(), frame)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.webp"])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_every_frame_can_be_read(tmp_path, name, count):
    expected = save_frames(tmp_path / name, count, **{"lossless": True} if name == "a.webp" else {})
    assert open_image(tmp_path / name, ImageSettings()).count == count
    for number in range(1, count + 1):
        assert np.array_equal(pixels(load_image(tmp_path / name, ImageSettings(), number)), expected[number - 1])
    middle = load_image(tmp_path / name, ImageSettings(frames="middle"))
    assert np.array_equal(pixels(middle), expected[count // 2]) and middle.bytes.startswith(b"\x89PNG")
    for wrong in (0, count + 1):
        assert problem_of(tmp_path / name, frame=wrong) == f"missing: frame {wrong} of {count}"
    assert problem_of(tmp_path / name).endswith(
        f"{count} frames: name one (FILE#N), or set --frames to middle, all or every:N"
    )
    assert problem_of(tmp_path / name, ImageSettings(frames="all")).startswith("several_frames")
    assert load_image(tmp_path / name, ImageSettings(), 1).groups == middle.groups != {}


def test_an_animation_shows_what_a_viewer_shows(tmp_path):
    frames = [Image.new("P", (8, 8), 0) for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
        frame.putpixel((number, number), number + 1)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    for number, color in enumerate(colors):
        shown = pixels(load_image(tmp_path / "a.gif", ImageSettings(), number + 1))
        assert tuple(shown[number, number]) == color and (shown.reshape(-1, 3).sum(0) == color).all()


def test_pages_of_one_file_may_differ_and_smaller_copies_are_skipped(tmp_path):
    pages = [picture(0, "L", (20, 10)), picture(1, "RGB", (5, 6)), picture(2, "1", (30, 30))]
    deep = Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000)
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=[*pages[1:], deep])
    for number, page in enumerate(pages, start=1):
        assert np.array_equal(pixels(load_image(tmp_path / "a.tif", ImageSettings(), number)), page.convert("RGB"))
    assert pixels(load_image(tmp_path / "a.tif", ImageSettings(), 4)).max() == 255
    assert problem_of(tmp_path / "a.tif", ImageSettings(max_pixels=200), 3).startswith("too_large")

    from PIL import TiffImagePlugin

    with TiffImagePlugin.AppendingTiffWriter(tmp_path / "pyramid.tif", new=True) as file:
        for side, kind in ((40, 0), (20, 1), (10, 1)):  # a whole slide with smaller copies
            tags = TiffImagePlugin.ImageFileDirectory_v2()
            tags[254] = kind
            picture(side, "RGB", (side, side)).save(file, "TIFF", tiffinfo=tags)
            file.newFrame()
    assert pixels(load_image(tmp_path / "pyramid.tif")).shape == (40, 40, 3)


def test_names_of_frames(tmp_path):
    expected = save_frames(tmp_path / "a.tif", 4)
    (tmp_path / "sub").mkdir()
    picture(9).save(tmp_path / "sub" / "a.tif#2", "PNG")  # a file with such a name is itself
    save_frames(tmp_path / "sub" / "a.tif", 2)
    images = FolderImages(tmp_path)
    for number in (3, 1, 4, 2):
        name = f"a.tif#{number}"
        assert np.array_equal(pixels(images.load(name)), expected[number - 1])
        assert images.load(name, identify=False).bytes == FolderImages(tmp_path).load(name).bytes
    assert np.array_equal(pixels(images.load("sub/a.tif#2")), np.asarray(picture(9)))
    names = ["a.tif#1", "a.tif#3", "sub/a.tif#2", "sub/a.tif#1", "../x#1"]
    assert list(images.files(names)) == ["a.tif", "a.tif", "sub/a.tif#2", "sub/a.tif"]
    for name, reason in (
        ("b.tif#1", "missing"),
        ("a.tif#0", "missing: frame 0 of 4"),
        ("../a.tif#1", "outside_image_folder"),
    ):
        with pytest.raises(ImageProblem, match=reason):
            images.load(name)


def test_a_file_is_opened_once_for_all_its_frames_by_any_number_of_threads(tmp_path, monkeypatch):
    from medst_trl.base.processes import ordered_map
    from medst_trl.data import images as module

    expected = [save_frames(tmp_path / f"{name}.tif", 12)[number] for name in "ab" for number in range(12)]
    opened, open_once = [], module.open_image
    monkeypatch.setattr(module, "open_image", lambda path, *rest: opened.append(path.name) or open_once(path, *rest))
    reader = FolderImages(tmp_path)
    names = [f"{name}.tif#{number + 1}" for name in "ab" for number in range(12)]
    found = list(ordered_map(reader.load, names, num_workers=8))
    assert all(np.array_equal(pixels(one), other) for one, other in zip(found, expected))
    assert sorted(opened) == ["a.tif", "b.tif"]


def records_about(*names: str) -> Records:
    records = Records("made")
    records.conversations = [Conversation(f"unlabelled {name}", (name,), []) for name in names]
    for number, name in enumerate(names):
        records.conversations.append(Conversation(f"talk {number}", (name,), dialogue([("What?", "That.")], 1)))
        records.questions += [
            Question(f"{split} {number}", (name,), split, "What?", "That.", "open") for split in ("train", "test")
        ]
    both = dialogue([("Which?", "This.")], len(names))
    records.conversations.append(Conversation("all", names, both))
    return records


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 9), step=st.integers(1, 10))
def test_chosen_frames_become_unlabeled_images_and_a_text_about_them_is_rejected(tmp_path_factory, count, step):
    directory = tmp_path_factory.mktemp("frames")
    save_frames(directory / "film.tif", count)
    picture(0).save(directory / "still.png")
    (directory / "bad.tif").write_bytes(b"II*\0")
    records = records_about("film.tif", "still.png", "bad.tif")
    for frames in ("middle", None):
        assert choose_frames(records, FolderImages(directory, ImageSettings(frames=frames)), 2) is records
    frames = "all" if step == 1 else f"every:{step}"
    chosen = choose_frames(records, FolderImages(directory, ImageSettings(frames=frames)), 2)

    shown = tuple(f"film.tif#{number}" for number in range(1, count + 1, step))
    conversations = {conversation.id: conversation for conversation in chosen.conversations}
    unlabelled = [conversation.images for conversation in chosen.conversations if not conversation.messages]
    assert unlabelled == [(name,) for name in (*shown, "still.png", "bad.tif")]
    texts = [conversation for conversation in records.conversations if conversation.messages]
    assert [conversations[text.id] for text in texts] == texts and chosen.questions == records.questions
    with pytest.raises(ImageProblem, match=f"several_frames: {count} frames: name one .*, or set --frames to middle,"):
        FolderImages(directory, ImageSettings(frames=frames)).load("film.tif")


def test_a_row_of_several_unlabeled_files_becomes_an_image_for_each_frame(tmp_path):
    save_frames(tmp_path / "a.tif", 2)
    picture(0).save(tmp_path / "b.png")
    records = Records("made", conversations=[Conversation("x", ("b.png", "a.tif"), [], group="P")])
    found = choose_frames(records, FolderImages(tmp_path, ImageSettings(frames="all")), 1).conversations
    assert [(one.images, one.group) for one in found] == [(("b.png",), "P"), (("a.tif#1",), "P"), (("a.tif#2",), "P")]
