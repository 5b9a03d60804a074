# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""DICOM files are converted to the image that a radiologist sees, without their header."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.data.image_formats import ImageProblem
from medst_trl.data.images import load_image


pydicom = pytest.importorskip("pydicom")


def save_dicom(path, values: np.ndarray, photometric="MONOCHROME2", **tags):
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


def load_pixels(path) -> np.ndarray:
    stored = load_image(path)
    assert b"Doe" not in stored.bytes and b"4711" not in stored.bytes
    assert load_image(path, identify=False).bytes == stored.bytes
    image = Image.open(io.BytesIO(stored.bytes))
    assert image.format == "PNG"
    return np.asarray(image)


RAMP = np.arange(0, 4096, 4096 // 64, dtype=np.int16).reshape(8, 8)


def test_the_window_is_applied_in_hounsfield_units(tmp_path):
    path = save_dicom(
        tmp_path / "a.dcm", RAMP, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=[40, 0], WindowWidth=[400, 9]
    )
    pixels, hounsfield = load_pixels(path).astype(int), RAMP.astype(float) - 1024
    assert (pixels[hounsfield < 40 - 201] == 0).all() and (pixels[hounsfield > 40 + 200] == 255).all()
    in_window = np.abs(hounsfield - 39.5) < 199
    assert np.abs(pixels[in_window] - ((hounsfield[in_window] - 39.5) / 399 + 0.5) * 255).max() <= 1


def test_a_window_is_not_stretched_to_the_range_of_the_pixels(tmp_path):
    path = save_dicom(tmp_path / "a.dcm", np.full((4, 4), 500, np.int16), WindowCenter=500, WindowWidth=1000)
    assert abs(int(load_pixels(path)[0, 0]) - 128) <= 1


def test_a_negative_slope_does_not_invert_the_image(tmp_path):
    path = save_dicom(
        tmp_path / "a.dcm", RAMP, RescaleSlope=-1, RescaleIntercept=0, WindowCenter=-2000, WindowWidth=1000
    )
    pixels = load_pixels(path)
    assert pixels[0, 0] == 255 and pixels[-1, -1] == 0  # the slope makes value 0 the largest


def test_without_a_window_the_range_of_the_pixels_is_used(tmp_path):
    pixels = load_pixels(save_dicom(tmp_path / "a.dcm", RAMP))
    assert (pixels[0, 0], pixels[-1, -1]) == (0, 255) and (np.diff(pixels.ravel().astype(int)) >= 0).all()


def test_monochrome1_is_inverted(tmp_path):
    monochrome2, inverted = save_dicom(tmp_path / "a.dcm", RAMP), save_dicom(tmp_path / "b.dcm", RAMP, "MONOCHROME1")
    assert np.array_equal(load_pixels(monochrome2), 255 - load_pixels(inverted))


def test_colors_are_kept(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(load_pixels(save_dicom(tmp_path / "a.dcm", values, "RGB")), values)


def test_dicom_is_recognized_without_its_suffix(tmp_path):
    path = save_dicom(tmp_path / "a.dcm", RAMP)
    assert np.array_equal(
        load_pixels(path.rename(tmp_path / "IM000001")), load_pixels(save_dicom(tmp_path / "b.dcm", RAMP))
    )


def test_unusable_dicom_files_have_a_reason(tmp_path):
    complete = save_dicom(tmp_path / "complete.dcm", RAMP).read_bytes()
    (tmp_path / "truncated.dcm").write_bytes(complete[:-50])
    (tmp_path / "header.dcm").write_bytes(complete[:200])
    (tmp_path / "text.dcm").write_text("not a DICOM file")
    save_dicom(tmp_path / "film.dcm", np.zeros((2, 8, 8), np.uint8), NumberOfFrames=2)
    save_dicom(tmp_path / "bomb.dcm", RAMP, Rows=60000, Columns=60000)
    save_dicom(tmp_path / "window.dcm", RAMP, WindowCenter=1, WindowWidth=0)
    expected = {
        "truncated.dcm": "truncated", "header.dcm": "not_an_image", "text.dcm": "not_an_image",
        "film.dcm": "several_frames", "bomb.dcm": "too_large", "window.dcm": "bad_window",
    }  # fmt: skip
    reasons = {}
    for name in expected:
        with pytest.raises(ImageProblem) as error:
            load_image(tmp_path / name)
        reasons[name] = error.value.reason
        assert "Doe" not in str(error.value)
    assert reasons == expected
    with pytest.raises(ImageProblem, match="not a DICOM file with pixels"):
        load_image(tmp_path / "text.dcm")


def test_the_error_for_missing_pydicom_names_the_extra(tmp_path, monkeypatch):
    path = save_dicom(tmp_path / "a.dcm", RAMP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"medst_trl\[dicom\]"):
        load_image(path)


def test_the_groups_of_a_file_are_those_of_its_header_and_what_it_lacks_is_the_smaller_group(tmp_path):
    ids = {"SeriesInstanceUID": "1.2.3", "StudyInstanceUID": "1.2", "PatientID": "4711"}
    assert load_image(save_dicom(tmp_path / "a.dcm", RAMP, **ids)).groups == {
        "series": "1.2.3", "study": "1.2", "patient": "4711"
    }  # fmt: skip
    anonymous = load_image(save_dicom(tmp_path / "b.dcm", RAMP, **ids | {"PatientID": " ", "StudyInstanceUID": ""}))
    assert anonymous.groups == dict.fromkeys(("series", "study", "patient"), "1.2.3")
    assert load_image(save_dicom(tmp_path / "c.dcm", RAMP, PatientID="")).groups == {}
