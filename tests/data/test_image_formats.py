# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""DICOM files become the image that a radiologist sees, and nothing of their header stays."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.data.image_formats import ImageProblem
from medst_trl.data.images import load_image, stored_bytes


pydicom = pytest.importorskip("pydicom")


def save(path, values: np.ndarray, photometric="MONOCHROME2", **tags):
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3"
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3"
    data.PatientName, data.PatientID = "Doe^Jane", "4711-SECRET"
    bits = values.dtype.itemsize * 8
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit, data.PixelRepresentation = bits - 1, int(values.dtype.kind == "i")
    frames = int(tags.get("NumberOfFrames", 1))
    data.Rows, data.Columns = values.shape[1:3] if frames > 1 else values.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = (3 if values.shape[-1] == 3 else 1), photometric
    if data.SamplesPerPixel == 3:
        data.PlanarConfiguration = 0
    data.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def picture(path) -> np.ndarray:
    stored = load_image(path)
    assert b"Doe" not in stored.bytes and b"4711" not in stored.bytes
    assert stored_bytes(path) == stored.bytes
    image = Image.open(io.BytesIO(stored.bytes))
    assert image.format == "PNG"
    return np.asarray(image)


RAMP = np.arange(0, 4096, 4096 // 64, dtype=np.int16).reshape(8, 8)


def test_the_window_is_applied_in_hounsfield_units(tmp_path):
    path = save(
        tmp_path / "a.dcm", RAMP, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=[40, 0], WindowWidth=[400, 9]
    )
    shown, hounsfield = picture(path).astype(int), RAMP.astype(float) - 1024
    assert (shown[hounsfield < 40 - 201] == 0).all() and (shown[hounsfield > 40 + 200] == 255).all()
    inside = np.abs(hounsfield - 39.5) < 199
    assert np.abs(shown[inside] - ((hounsfield[inside] - 39.5) / 399 + 0.5) * 255).max() <= 1


def test_a_window_that_the_pixels_do_not_fill_stays_absolute(tmp_path):
    path = save(tmp_path / "a.dcm", np.full((4, 4), 500, np.int16), WindowCenter=500, WindowWidth=1000)
    assert abs(int(picture(path)[0, 0]) - 128) <= 1


def test_a_negative_slope_does_not_invert_the_image(tmp_path):
    path = save(tmp_path / "a.dcm", RAMP, RescaleSlope=-1, RescaleIntercept=0, WindowCenter=-2000, WindowWidth=1000)
    shown = picture(path)
    assert shown[0, 0] == 255 and shown[-1, -1] == 0  # value 0 is the largest after the slope


def test_without_a_window_the_own_range_is_used(tmp_path):
    shown = picture(save(tmp_path / "a.dcm", RAMP))
    assert (shown[0, 0], shown[-1, -1]) == (0, 255) and (np.diff(shown.ravel().astype(int)) >= 0).all()


def test_monochrome1_is_inverted(tmp_path):
    plain, inverted = save(tmp_path / "a.dcm", RAMP), save(tmp_path / "b.dcm", RAMP, "MONOCHROME1")
    assert np.array_equal(picture(plain), 255 - picture(inverted))


def test_colour_is_kept(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(picture(save(tmp_path / "a.dcm", values, "RGB")), values)


def test_dicom_is_recognised_by_content_without_its_suffix(tmp_path):
    path = save(tmp_path / "a.dcm", RAMP)
    assert np.array_equal(picture(path.rename(tmp_path / "IM000001")), picture(save(tmp_path / "b.dcm", RAMP)))


def test_unusable_dicom_files_have_a_reason(tmp_path):
    whole = save(tmp_path / "whole.dcm", RAMP).read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-50])
    (tmp_path / "header.dcm").write_bytes(whole[:200])
    (tmp_path / "text.dcm").write_text("no DICOM at all")
    save(tmp_path / "film.dcm", np.zeros((2, 8, 8), np.uint8), NumberOfFrames=2)
    save(tmp_path / "bomb.dcm", RAMP, Rows=60000, Columns=60000)
    save(tmp_path / "window.dcm", RAMP, WindowCenter=1, WindowWidth=0)
    expected = {
        "cut.dcm": "truncated", "header.dcm": "not_an_image", "text.dcm": "not_an_image", "film.dcm": "several_frames",
        "bomb.dcm": "too_large", "window.dcm": "bad_window",
    }  # fmt: skip
    found = {}
    for name in expected:
        with pytest.raises(ImageProblem) as caught:
            load_image(tmp_path / name)
        found[name] = caught.value.reason
        assert "Doe" not in str(caught.value)
    assert found == expected


def test_without_pydicom_the_message_names_the_extra(tmp_path, monkeypatch):
    path = save(tmp_path / "a.dcm", RAMP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"medst_trl\[dicom\]"):
        load_image(path)
