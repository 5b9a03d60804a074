# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Pixels are kept, metadata is removed, and malicious files are rejected."""

import hashlib
import io
import os
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin

from medst_trl.data.image_formats import ImageProblem
from medst_trl.data.image_settings import ImageSettings
from medst_trl.data.images import FolderImages, image_id, load_image, publishable, resolve_inside, store_image


MARKER = b"PATIENT-DOE-1970"


def random_image(mode: str = "RGB", size=(37, 23), seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    width, height = size
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode == "I":
        return Image.fromarray(rng.integers(-(2**31), 2**31, (height, width), dtype=np.int32))
    if mode == "F":
        return Image.fromarray(rng.normal(0, 1e6, (height, width)).astype(np.float32))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def rejection_reason(path, **options) -> str:
    with pytest.raises(ImageProblem) as error:
        load_image(path, ImageSettings(**options))
    return error.value.reason


def exif(orientation: int = 1) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010E], tags[0x0112] = MARKER.decode(), orientation
    return tags


SAVED = {
    "grey.jpg": ("L", {}), "rgb.jpg": ("RGB", {}), "progressive.jpg": ("RGB", {"progressive": True}),
    "subsampled.jpg": ("RGB", {"subsampling": 2}), "restarts.jpg": ("RGB", {"restart_marker_rows": 1}),
    "grey.png": ("L", {}), "rgb.png": ("RGB", {}), "palette.png": ("P", {}), "bit.png": ("1", {}),
    "rgb.bmp": ("RGB", {}), "grey.bmp": ("L", {}), "still.gif": ("P", {}),
    "rgb.tif": ("RGB", {"compression": "tiff_lzw"}), "bit.tif": ("1", {}),
    "rgb.webp": ("RGB", {"lossless": True}), "lossy.webp": ("RGB", {}), "rgb.ppm": ("RGB", {}),
    "rgb.tga": ("RGB", {}), "cmyk.jpg": ("CMYK", {}), "cmyk.tif": ("CMYK", {}), "rgb.jp2": ("RGB", {}),
    "ycbcr.tif": ("YCbCr", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_8_bit_images_keep_their_pixels(tmp_path, name):
    mode, options = SAVED[name]
    path = tmp_path / name
    random_image(mode).save(path, **options)
    stored = load_image(path)
    expected = Image.open(path).convert("RGB")
    assert np.array_equal(pixels(stored.bytes), np.asarray(expected))
    assert Image.open(io.BytesIO(stored.bytes)).size == expected.size
    assert stored.image_id == image_id(expected)
    assert load_image(path, identify=False).bytes == stored.bytes
    kept = Image.open(io.BytesIO(stored.bytes))
    assert kept.mode in ("L", "RGB") and kept.format in ("JPEG", "PNG")
    if name in ("grey.jpg", "rgb.jpg", "progressive.jpg", "subsampled.jpg", "restarts.jpg"):
        assert kept.format == "JPEG", "the JPEG is encoded again"


@pytest.mark.parametrize(("mode", "name"), [("I;16", "a.png"), ("I;16", "a.tif"), ("I", "a.tif"), ("F", "a.tif")])
def test_16_and_32_bit_grey_is_rescaled_to_8_bits_in_order(tmp_path, mode, name):
    source = random_image(mode)
    source.save(tmp_path / name)
    stored = np.asarray(Image.open(io.BytesIO(load_image(tmp_path / name).bytes)))
    order = np.argsort(np.asarray(source).ravel(), kind="stable")
    assert stored.dtype == np.uint8 and (stored.min(), stored.max()) == (0, 255)
    assert (np.diff(stored.ravel()[order].astype(int)) >= 0).all()


def test_uniform_and_non_finite_grey_values_can_be_stored():
    assert np.asarray(Image.open(io.BytesIO(store_image(Image.new("I;16", (4, 4), 900)).bytes))).max() == 0
    non_finite = Image.fromarray(np.array([[np.nan, 0, 1, np.inf, -np.inf]], np.float32))
    assert pixels(store_image(non_finite).bytes)[0, :, 0].tolist() == [0, 0, 255, 255, 0]


@pytest.mark.parametrize(("mode", "name"), [("RGBA", "a.png"), ("LA", "a.png"), ("RGBA", "a.tif"), ("RGBA", "a.webp")])
def test_transparent_pixels_become_black(tmp_path, mode, name):
    source = Image.new("RGBA", (2, 1), (200, 200, 200, 255))
    source.putpixel((1, 0), (90, 90, 90, 0))
    source.convert(mode).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    assert pixels(load_image(tmp_path / name).bytes)[0].tolist() == [[200] * 3, [0] * 3]


def test_pixels_of_a_transparent_color_become_black(tmp_path):
    source = Image.new("RGB", (2, 1), (1, 2, 3))
    source.putpixel((0, 0), (9, 9, 9))
    source.save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert pixels(load_image(tmp_path / "key.png").bytes)[0].tolist() == [[9, 9, 9], [0, 0, 0]]


def test_an_image_has_the_same_id_in_every_format(tmp_path):
    grey = random_image("L")
    ids = {image_id(grey), image_id(grey.convert("RGB")), store_image(grey).image_id}
    for name in ("a.png", "a.bmp", "a.tif", "a.gif"):
        grey.convert("RGB" if name == "a.bmp" else "L").save(tmp_path / name)
        ids.add(load_image(tmp_path / name).image_id)
    assert len(ids) == 1
    rgb = grey.convert("RGB")
    assert ids == {hashlib.sha256(struct.pack(">II", *rgb.size) + rgb.tobytes()).hexdigest()}


def test_the_id_depends_on_pixels_and_shape():
    flat = np.zeros(24, np.uint8)
    shapes = [(4, 6), (6, 4), (2, 12), (24, 1)]
    assert len({image_id(Image.fromarray(flat.reshape(shape))) for shape in shapes}) == len(shapes)
    wide = random_image("L", (3000, 600))  # more than one band of rows
    assert image_id(wide) == hashlib.sha256(struct.pack(">II", 3000, 600) + wide.convert("RGB").tobytes()).hexdigest()


def test_all_metadata_of_a_jpeg_is_removed(tmp_path):
    path, source = tmp_path / "a.jpg", random_image()
    source.save(path, exif=exif(), comment=MARKER, icc_profile=MARKER * 50, xmp=MARKER, quality=95)
    data = path.read_bytes()
    jfif_with_thumbnail = b"\xff\xe0" + struct.pack(">H", 16 + 48) + b"JFIF\0\1\1\0\0\1\0\1\4\4" + MARKER * 3
    jfxx = b"\xff\xe0" + struct.pack(">H", 2 + 6 + 16) + b"JFXX\0\x13" + MARKER
    path.write_bytes(data[:2] + jfif_with_thumbnail + jfxx + data[20:] + MARKER + data)
    assert path.read_bytes().count(MARKER) > 50
    stored = load_image(path).bytes
    assert MARKER not in stored and b"Exif" not in stored
    assert np.array_equal(pixels(stored), pixels(data))


def test_all_metadata_of_a_png_is_removed(tmp_path):
    path, source, text = tmp_path / "a.png", random_image(), PngImagePlugin.PngInfo()
    text.add_text("Comment", MARKER.decode())
    text.add_text("Compressed", MARKER.decode() * 20, zip=True)
    text.add_itxt("XML:com.adobe.xmp", MARKER.decode())
    text.add(b"prIv", MARKER)
    source.save(path, pnginfo=text, exif=exif(), icc_profile=MARKER * 9, dpi=(300, 300))
    path.write_bytes(path.read_bytes() + MARKER)
    stored = load_image(path).bytes
    kinds = [stored[position + 4 : position + 8] for position in png_chunks(stored)]
    assert set(kinds) == {b"IHDR", b"IDAT", b"IEND"} and MARKER not in stored
    assert np.array_equal(pixels(stored), np.asarray(source))


@pytest.mark.parametrize("name", ["a.tif", "a.webp", "a.gif", "a.jp2"])
def test_all_metadata_of_other_formats_is_removed(tmp_path, name):
    options = {"a.tif": {"description": MARKER.decode()}, "a.webp": {"exif": exif(), "xmp": MARKER}}
    comment = {"comment": MARKER} if name in ("a.gif", "a.jp2") else {}
    random_image("P" if name == "a.gif" else "RGB").save(tmp_path / name, **options.get(name, {}), **comment)
    assert MARKER in (tmp_path / name).read_bytes()
    assert MARKER not in load_image(tmp_path / name).bytes


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_orientation_is_applied(tmp_path, name, orientation):
    from PIL import ImageOps

    random_image().save(tmp_path / name, exif=exif(orientation))
    upright = ImageOps.exif_transpose(Image.open(tmp_path / name))
    stored = load_image(tmp_path / name)
    assert np.array_equal(pixels(stored.bytes), np.asarray(upright))
    assert upright.size == Image.open(io.BytesIO(stored.bytes)).size
    assert MARKER not in stored.bytes


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_metadata_segment_at_any_position_in_a_jpeg_is_removed(data):
    file = io.BytesIO()
    random_image(data.draw(st.sampled_from(["L", "RGB"]))).save(file, "JPEG", progressive=data.draw(st.booleans()))
    clean = file.getvalue()
    starts = jpeg_segments(clean)
    dirty = bytearray(clean)
    for position in sorted(data.draw(st.lists(st.sampled_from(starts), max_size=4)), reverse=True):
        kind = data.draw(st.sampled_from([*range(0xE1, 0xEE), 0xEF, 0xFE]))
        body = MARKER + data.draw(st.binary(max_size=30))
        dirty[position:position] = (
            b"\xff" * data.draw(st.integers(1, 3)) + bytes([kind]) + struct.pack(">H", len(body) + 2) + body
        )
    from medst_trl.data.image_formats import strip_jpeg

    stored = strip_jpeg(bytes(dirty) + MARKER)
    assert MARKER not in stored
    assert np.array_equal(pixels(stored), pixels(clean))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 2**16), st.sampled_from(["JPEG", "PNG"]))
def test_stripping_does_not_fail_on_damaged_files(noise, position, kind):
    from medst_trl.data.image_formats import strip_jpeg, strip_png

    file = io.BytesIO()
    random_image().save(file, kind)
    data = bytearray(file.getvalue())
    position %= len(data)
    data[position : position + len(noise)] = noise
    assert isinstance((strip_jpeg if kind == "JPEG" else strip_png)(bytes(data)), bytes | None)


def test_unusable_files_have_a_reason(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "directory.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    frames = [random_image("L", seed=seed) for seed in range(3)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "film.png", save_all=True, append_images=frames[1:])
    (tmp_path / "script.eps").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    expected = {
        "none.png": "missing", "empty.png": "empty", "text.png": "not_an_image", "directory.png": "not_a_file",
        "pipe.png": "not_a_file", "film.gif": "several_frames", "pages.tif": "several_frames",
        "film.png": "several_frames", "script.eps": "not_an_image", "text.png/x.png": "missing",
    }  # fmt: skip
    assert {name: rejection_reason(tmp_path / name) for name in expected} == expected


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_umlauts_are_the_same_in_the_spelling_of_a_mac(tmp_path, form):
    random_image("L").save(tmp_path / unicodedata.normalize("NFD" if form == "NFC" else "NFC", "Größe 1.png"))
    assert FolderImages(tmp_path).load(unicodedata.normalize(form, "Größe 1.png")).image_id


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.tif", "a.webp", "a.gif", "progressive.jpg"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_truncated_files_are_rejected(tmp_path, name, fraction):
    random_image("RGB", (200, 150)).save(tmp_path / name, **({"progressive": True} if name[0] == "p" else {}))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * fraction)])
    assert rejection_reason(tmp_path / name) in ("truncated", "not_an_image")


def test_decompression_bombs_are_rejected_by_their_header(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 10**6))
        + chunk(b"IEND", b"")
    )
    assert rejection_reason(tmp_path / "bomb.png") == "too_large"
    random_image("L", (101, 100)).save(tmp_path / "large.png")
    assert rejection_reason(tmp_path / "large.png", max_pixels=10_000) == "too_large"
    assert pixels(load_image(tmp_path / "large.png", ImageSettings(max_pixels=10_100)).bytes).shape[1] == 101
    with open(tmp_path / "padded.png", "wb") as file:  # a very large file of zeros
        file.truncate(2_000_000_000)
    assert rejection_reason(tmp_path / "padded.png") == "too_large"


def test_names_stay_in_their_directory(tmp_path):
    directory, outside = tmp_path / "images", tmp_path / "secret.png"
    (directory / "sub").mkdir(parents=True)
    random_image().save(outside)
    random_image().save(directory / "sub" / "a.png")
    (directory / "link.png").symlink_to(outside)
    (directory / "inner.png").symlink_to(directory / "sub" / "a.png")
    (directory / "up").symlink_to(tmp_path)
    (directory / "loop").symlink_to(directory / "loop")
    (tmp_path / "images_too").mkdir()
    for name in (
        "../secret.png",
        "sub/../../secret.png",
        str(outside),
        "link.png",
        "up/secret.png",
        "../images_too/a",
        "..\\secret.png",
        "/",
    ):
        with pytest.raises(ImageProblem, match="outside_image_folder"):
            resolve_inside(directory, name)
    for name in ("a\0b.png", "x" * 5000 + ".png", "loop/a.png"):
        with pytest.raises(ImageProblem):
            load_image(resolve_inside(directory, name))
    names = ("sub/a.png", "sub\\a.png", "sub/../sub/a.png", "inner.png", str(directory / "sub/a.png"), "./sub//a.png")
    for name in names:
        assert pixels(load_image(resolve_inside(directory, name)).bytes).shape[1] == 37


def test_links_out_of_the_directory_are_followed_if_asked_for_and_names_stay_in_it_anyway(tmp_path):
    directory, store = tmp_path / "images", tmp_path / "blobs"
    directory.mkdir()
    store.mkdir()
    random_image().save(store / "0a1b2c", "PNG")  # as the Hub's cache and DataLad store them
    (tmp_path / "secret.png").write_bytes((store / "0a1b2c").read_bytes())
    (directory / "a.png").symlink_to("../blobs/0a1b2c")
    (directory / "linked").symlink_to(store)
    (directory / "broken.png").symlink_to("../blobs/none")
    (directory / "inner.png").symlink_to("a.png")
    (directory / "null.png").symlink_to("/dev/null")
    os.mkfifo(directory / "pipe.png")
    (directory / "pipe_link.png").symlink_to("pipe.png")
    (directory / "circle.png").symlink_to("circle.png")
    for name in ("a.png", "linked/0a1b2c", "broken.png", "inner.png", "null.png"):
        with pytest.raises(ImageProblem, match="outside_image_folder: .*--follow_symlinks true"):
            resolve_inside(directory, name)
    for name in ("a.png", "linked/0a1b2c", "inner.png", str(directory / "a.png")):
        path = resolve_inside(directory, name, follow_symlinks=True)
        assert path.name == name.split("/")[-1]  # keeps its suffix, by which DICOM files may be recognized
        assert pixels(load_image(path).bytes).shape[1] == 37
    for name in ("../secret.png", "linked/../../secret.png", str(tmp_path / "secret.png"), "/dev/null"):
        with pytest.raises(ImageProblem, match="outside_image_folder"):
            resolve_inside(directory, name, follow_symlinks=True)
    reasons = {"broken.png": "missing", "null.png": "not_a_file", "circle.png": "unreadable", "linked": "not_a_file"}
    for name, reason in (reasons | {"pipe.png": "not_a_file", "pipe_link.png": "not_a_file"}).items():
        assert rejection_reason(resolve_inside(directory, name, follow_symlinks=True)) == reason


def jpeg_segments(data: bytes) -> list[int]:
    """Return the positions of the segments before the first scan, and of the scan."""
    starts, position = [], 2
    while data[position + 1] != 0xDA:
        starts.append(position)
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return [*starts, position]


def png_chunks(data: bytes) -> list[int]:
    starts, position = [], 8
    while position < len(data):
        starts.append(position)
        position += 12 + struct.unpack_from(">I", data, position)[0]
    return starts


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_a_publishable_image_has_the_pixels_without_metadata_and_path(tmp_path, format, mode):
    if mode == "I;16" and format == "JPEG":
        pytest.skip("no such files")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    image = deep if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "Meier"
    path = tmp_path / f"Meier.{format.lower()}"
    image.save(path, format, exif=exif)
    for stored in ({"bytes": None, "path": str(path)}, {"bytes": path.read_bytes(), "path": "Meier"}):
        found = publishable(stored)
        assert found["path"] is None and b"Meier" not in found["bytes"]
        assert image_id(Image.open(io.BytesIO(found["bytes"]))) == load_image(path).image_id
        assert publishable(found) == found
