# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""NIfTI volumes become axial slices as radiologists see them, in every orientation in which they can be stored."""

import gzip
import io
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.data.image_formats import ImageProblem
from medst_trl.data.image_settings import ImageSettings
from medst_trl.data.images import FolderImages, load_image, open_image


nibabel = pytest.importorskip("nibabel")

RAS = np.diag([0.7, 0.7, 5.0, 1.0])


def save_volume(path, values: np.ndarray, affine=RAS, kind="Nifti1Image", **header):
    image = getattr(nibabel, kind)(values, affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def slice_of(path, frame: int | None = None, **options) -> np.ndarray:
    stored = load_image(path, ImageSettings(**{"frames": "middle"} | options), frame)
    return np.asarray(Image.open(io.BytesIO(stored.bytes)))


def reason_of(path, **options) -> str:
    with pytest.raises(ImageProblem) as error:
        slice_of(path, **options)
    return error.value.reason


def volume_of(shape, seed: int = 0) -> np.ndarray:
    """Return values with all of 0..255, in RAS+, so that they are not rescaled."""
    values = np.random.default_rng(seed).integers(0, 256, shape).astype(np.int16)
    values.flat[:2] = 0, 255
    return values


def as_seen(volume: np.ndarray, slice_index: int) -> np.ndarray:
    """Show a slice of a RAS+ volume: the first row is the front, the first column is the patient's right."""
    right, front, _ = volume.shape
    return np.array([[volume[x, y, slice_index] for x in reversed(range(right))] for y in reversed(range(front))])


@settings(max_examples=40, deadline=None)
@given(
    codes=st.tuples(st.permutations(["LR", "PA", "IS"]), st.tuples(*3 * [st.integers(0, 1)])),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
    kind=st.sampled_from(["Nifti1Image", "Nifti2Image"]),
    oblique=st.floats(-0.3, 0.3),
)
def test_slices_look_the_same_in_every_orientation(tmp_path_factory, codes, suffix, kind, oblique):
    volume = volume_of((5, 4, 3))
    wanted = nibabel.orientations.axcodes2ornt([axis[end] for axis, end in zip(*codes)])
    turn = np.array([[np.cos(oblique), -np.sin(oblique), 0], [np.sin(oblique), np.cos(oblique), 0], [0, 0, 1]])
    image = nibabel.Nifti1Image(volume, nibabel.affines.from_matvec(turn, [9, 8, 7]))
    change = nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), wanted)
    stored = image.as_reoriented(change)
    path = tmp_path_factory.mktemp("volumes") / f"scan{suffix}"
    save_volume(path, np.asarray(stored.dataobj), stored.affine, kind)
    assert open_image(path, ImageSettings()).count == 3
    for index in range(3):
        assert np.array_equal(slice_of(path, index + 1), as_seen(volume, index))
    assert np.array_equal(slice_of(path), as_seen(volume, 1))


def test_gray_values_are_those_of_the_volume_not_of_the_slice(tmp_path):
    volume = np.zeros((4, 4, 2))
    volume[..., 0], volume[..., 1] = 100, 200
    volume[0, 0] = 0, 400
    path = save_volume(tmp_path / "a.nii", volume.astype(np.float32))
    assert slice_of(path, 1)[0, 0] == 64 and slice_of(path, 2)[0, 0] == 128  # 100 and 200 of 400
    scaled = save_volume(tmp_path / "b.nii.gz", volume.astype(np.int16), scl_slope=-2, scl_inter=5)
    assert slice_of(scaled, 1)[0, 0] == 255 - 64


def test_hounsfield_units_stay_apart_with_a_window(tmp_path):
    volume = np.full((2, 2, 3), -1000, np.int16)
    volume[0, 0], volume[1, 1] = (40, 80, 3000), (80, 40, -3000)
    path = save_volume(tmp_path / "ct.nii.gz", volume)
    shown = slice_of(path, 1, window="40,400").astype(int)
    assert (shown[1, 1], shown[0, 0], shown[0, 1]) == (128, 153, 0)
    assert load_image(path, ImageSettings(window="40,400"), 1).note == ""
    assert load_image(path, ImageSettings(), 1).note == "NIfTI_images_without_window"
    own = save_volume(tmp_path / "own.nii", volume, cal_min=-160, cal_max=240)
    assert np.array_equal(slice_of(own, 1), shown) and load_image(own, ImageSettings(), 1).note == ""


def test_volumes_of_other_shapes(tmp_path):
    for shape, count, size in (((6, 5), 1, (5, 6)), ((1, 6, 5), 1, (5, 6)), ((6, 1, 5), 1, (5, 6))):
        path = save_volume(tmp_path / "flat.nii", volume_of(shape))
        opened = open_image(path, ImageSettings())
        assert (opened.count, slice_of(path).shape) == (count, size), shape
    thick = volume_of((3, 8, 6))
    for axis, slices in ((0, 3), (1, 8), (2, 6)):
        for size, count in ((3.5, slices), (3.0, 6)):
            sizes = np.ones(4)
            sizes[axis] = size
            path = save_volume(tmp_path / "thick.nii", thick, np.diag(sizes))
            assert open_image(path, ImageSettings()).count == count
            if size > 3:
                expected = np.take(thick, 2, axis)[::-1, ::-1].T
                assert np.array_equal(slice_of(path, 3), expected)
    series = volume_of((3, 4, 5, 6))  # 6 volumes of 5 slices
    path = save_volume(tmp_path / "series.nii", series)
    opened = open_image(path, ImageSettings())
    assert opened.count == 30 and opened.middle == 3 * 5 + 2
    for index in (0, 4, 5, 29):
        volume = series[..., index // 5]
        low, high = int(volume.min()), int(volume.max())
        expected = np.rint((as_seen(volume, index % 5) - low) / (high - low) * 255)
        assert np.array_equal(slice_of(path, index + 1), expected)


def test_color_and_numbers_that_are_none(tmp_path):
    colors = np.random.default_rng(0).integers(0, 256, (4, 3, 2, 3), dtype=np.uint8)
    packed = colors.copy().view([("R", "u1"), ("G", "u1"), ("B", "u1")]).reshape(4, 3, 2)
    path = save_volume(tmp_path / "colors.nii", packed)
    assert np.array_equal(slice_of(path, 2), colors[::-1, ::-1, 1].transpose(1, 0, 2))
    volume = volume_of((3, 3, 3)).astype(np.float32)
    volume[1, 1, 1], volume[0, 1, 1] = np.nan, np.inf
    assert slice_of(save_volume(tmp_path / "nan.nii", volume), 2)[1].tolist()[1:] == [0, 255]


def test_unusable_volumes_have_a_reason(tmp_path):
    good = save_volume(tmp_path / "good.nii", volume_of((9, 9, 9))).read_bytes()
    files = {"cut.nii": good[:-40], "head.nii": good[:200], "text.nii": b"no volume", "text.nii.gz": b"no volume"}
    packed = gzip.compress(good)
    files |= {"cut.nii.gz": packed[: len(packed) // 2], "damaged.nii.gz": packed[:60] + b"????" + packed[64:]}
    bomb = bytearray(good[:352])
    bomb[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    files["bomb.nii.gz"] = gzip.compress(bytes(bomb) + bytes(10**6))
    files["flat.nii"] = good[:312] + bytes(16) + good[328:]  # the third axis of the affine is zero
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    save_volume(tmp_path / "complex.nii", np.ones((3, 3, 3), np.complex64))
    expected = {
        "cut.nii": "truncated", "head.nii": "not_an_image", "text.nii": "not_an_image", "text.nii.gz": "not_an_image",
        "cut.nii.gz": "truncated", "damaged.nii.gz": "truncated", "bomb.nii.gz": "too_large",
        "complex.nii": "unsupported", "flat.nii": "unsupported",
    }  # fmt: skip
    assert {name: reason_of(tmp_path / name) for name in expected} == expected
    assert reason_of(tmp_path / "good.nii", max_pixels=80) == "too_large"
    assert slice_of(tmp_path / "good.nii", max_pixels=81).shape == (9, 9)  # a limit of the image, not of the volume
    assert reason_of(tmp_path / "good.nii", frames=None) == "several_frames"


def test_a_damaged_volume_is_one_rejection_and_prints_nothing(tmp_path, capfd):
    data = save_volume(tmp_path / "cut.nii", volume_of((9, 9, 20))).read_bytes()
    (tmp_path / "cut.nii").write_bytes(data[:-1])
    (tmp_path / "size.nii").write_bytes(b"\0\0" + data[2:])  # nibabel corrects it, and says so
    images = FolderImages(tmp_path, ImageSettings(frames="all"))
    assert images.frames_of("cut.nii") == ["cut.nii"] and len(images.frames_of("size.nii")) == 20
    with pytest.raises(ImageProblem, match="truncated"):
        images.load("cut.nii")
    assert capfd.readouterr() == ("", "")


def test_a_volume_is_recognized_without_its_suffix(tmp_path):
    volume = volume_of((4, 3, 2))
    for name, kind in (("a.nii", "Nifti1Image"), ("b.nii.gz", "Nifti1Image"), ("c.nii.gz", "Nifti2Image")):
        path = save_volume(tmp_path / name, volume, kind=kind).rename(tmp_path / name[0])
        assert np.array_equal(slice_of(path, 1), as_seen(volume, 0))


def test_the_slices_of_a_volume_are_a_group_wherever_the_file_is(tmp_path):
    path = save_volume(tmp_path / "a.nii", volume_of((4, 3, 5)))
    first, last = (load_image(path, ImageSettings(), frame).groups for frame in (1, 5))
    moved = path.rename(tmp_path / "b.nii")
    other = save_volume(tmp_path / "a.nii", volume_of((4, 3, 5), seed=1))
    assert first == last == load_image(moved, ImageSettings(frames="middle")).groups
    assert first.keys() == {"patient", "study", "series"} and first != load_image(other, ImageSettings(), 1).groups


def test_the_error_for_missing_nibabel_names_the_extra(tmp_path, monkeypatch):
    path = save_volume(tmp_path / "a.nii", volume_of((4, 3, 2)))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(UserError, match=r"medst_trl\[nifti\]"):
        load_image(path)
