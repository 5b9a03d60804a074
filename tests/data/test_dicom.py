# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""DICOM files are converted to the image that a radiologist sees, without their header."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.data.image_formats import ImageProblem
from medst_trl.data.image_settings import ImageSettings
from medst_trl.data.images import load_image, open_image


pydicom = pytest.importorskip("pydicom")

from dicom_files import CT, save_ct, save_dicom  # noqa: E402 (needs pydicom)


def load_pixels(path, frame: int | None = None, **options) -> np.ndarray:
    stored = load_image(path, ImageSettings(**options), frame)
    assert b"Doe" not in stored.bytes and b"4711" not in stored.bytes
    assert load_image(path, ImageSettings(**options), frame, identify=False).bytes == stored.bytes
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
    save_dicom(tmp_path / "color.dcm", RAMP, "XYZ")
    save_dicom(tmp_path / "rows.dcm", RAMP, Rows=0)
    save_dicom(tmp_path / "frames.dcm", RAMP, NumberOfFrames=-3)
    save_dicom(tmp_path / "slope.dcm", RAMP, RescaleSlope=0, RescaleIntercept=3)
    expected = {
        "truncated.dcm": "truncated", "header.dcm": "not_an_image", "text.dcm": "not_an_image",
        "film.dcm": "several_frames", "bomb.dcm": "too_large", "color.dcm": "unsupported", "rows.dcm": "not_an_image",
        "frames.dcm": "not_an_image", "slope.dcm": "unsupported",
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


# --- Windows ---------------------------------------------------------------------------------------------------------

HOUNSFIELD = np.array([[-1000, 0, 40, 60], [80, 200, 300, 3000]])


def linear(low: float, high: float, values=HOUNSFIELD) -> np.ndarray:
    return np.clip(np.rint((np.asarray(values) - low) / (high - low) * 255), 0, 255)


@settings(max_examples=50, deadline=None)
@given(
    others=st.lists(st.integers(-1024, 3071), min_size=2, max_size=10),
    stored=st.sampled_from([(np.uint16, 1, -1024), (np.int16, 1, 0), (np.int16, 1, -1024), (np.uint16, 0.5, -1024)]),
    has_intercept=st.booleans(),
)
def test_organs_of_a_ct_without_a_window_stay_apart_whatever_else_it_shows(
    tmp_path_factory, others, stored, has_intercept
):
    kind, slope, intercept = stored
    values = ((np.array([[40, 80, *others]]) - intercept) / slope).astype(kind)
    tags = {"Modality": "CT"}
    if has_intercept or intercept or slope != 1:
        tags |= {"RescaleSlope": slope, "RescaleIntercept": intercept}
    path = save_dicom(tmp_path_factory.mktemp("ct") / "a.dcm", values, **tags)
    shown = load_pixels(path).astype(int)[0]
    assert np.array_equal(shown, linear(-160, 240, [40, 80, *others])) and shown[1] - shown[0] >= 25
    assert load_image(path).note == "CT_images_without_window"


def test_only_ct_in_hounsfield_units_is_shown_as_soft_tissue(tmp_path):
    values = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)
    for number, tags in enumerate(
        [
            {"Modality": "MR"},
            {"Modality": "CT"},
            {**CT, "RescaleType": "US"},
            {},
            {"Modality": "PT", "RescaleSlope": 2},
        ]
    ):
        path = save_dicom(tmp_path / f"{number}.dcm", values, **tags)
        assert np.array_equal(load_pixels(path), linear(0, values.max(), values)), tags
        assert load_image(path).note == f"{tags.get('Modality', 'DICOM')}_images_without_window"


def test_a_window_is_chosen(tmp_path):
    path = save_ct(
        tmp_path / "a.dcm", HOUNSFIELD, WindowCenter=[40, 600], WindowWidth=[400, 2000], VOILUTFunction="LINEAR_EXACT"
    )
    first, second = linear(-160, 240), linear(-400, 1600)
    assert np.array_equal(load_pixels(path), first) and np.array_equal(load_pixels(path, window="1"), first)
    assert np.array_equal(load_pixels(path, window="2"), second)
    assert np.array_equal(load_pixels(path, window="-600,1500"), linear(-1350, 150))
    assert load_image(path).note == load_image(path, ImageSettings(window="2")).note == ""
    assert np.array_equal(load_pixels(path, window="3"), first)  # it has two
    assert load_image(path, ImageSettings(window="3")).note == "CT_images_without_window_3"
    bare = save_ct(tmp_path / "b.dcm", HOUNSFIELD)
    assert np.array_equal(load_pixels(bare, window="600,2000"), second)
    assert load_image(bare, ImageSettings(window="600,2000")).note == ""
    # The values of other modalities are not in Hounsfield units.
    other = save_dicom(tmp_path / "c.dcm", RAMP, Modality="DX", WindowCenter=2000, WindowWidth=4000)
    assert np.array_equal(load_pixels(other, window="40,400"), load_pixels(other))


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowWidth": 0},
        {"WindowWidth": 0.5},  # at least 1 in a linear window
        {"WindowWidth": 0, "VOILUTFunction": "SIGMOID"},
        {"WindowWidth": 400, "VOILUTFunction": "CUBIC"},
        {"WindowWidth": ""},
    ],
)
def test_a_window_that_cannot_be_used_counts_as_none(tmp_path, tags):
    path = save_ct(tmp_path / "a.dcm", HOUNSFIELD, WindowCenter=600, **tags)
    for window in (None, "2"):
        assert np.array_equal(load_pixels(path, window=window), linear(-160, 240))
        assert load_image(path, ImageSettings(window=window)).note == "CT_images_without_window"


def test_a_window_in_hounsfield_units_is_only_used_for_values_in_hounsfield_units(tmp_path):
    values = np.array([[24, 1064], [1104, 4000]], np.uint16)  # 40 HU is 1064 here, but nothing says so
    for number, tags in enumerate([{"Modality": "CT"}, {**CT, "RescaleType": "US"}, {}]):
        path = save_dicom(tmp_path / f"{number}.dcm", values, **tags)
        assert np.array_equal(load_pixels(path, window="40,400"), load_pixels(path))
        note = f"{tags.get('Modality', 'DICOM')}_images_not_in_HU"
        assert load_image(path, ImageSettings(window="40,400")).note == note


def test_a_screen_shot_of_a_ct_is_not_in_hounsfield_units(tmp_path):
    values = np.array([[0, 100], [200, 255]], np.uint8)
    path = save_dicom(tmp_path / "a.dcm", values, Modality="CT", RescaleSlope=1, RescaleIntercept=0)
    assert np.array_equal(load_pixels(path), values)
    assert np.array_equal(load_pixels(path, window="40,400"), values)


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_a_header_is_not_quoted_on_the_terminal(tmp_path):
    path = save_dicom(tmp_path / "a.dcm", RAMP, StudyInstanceUID="SECRETUID")
    code = f"from medst_trl.data.images import load_image; load_image({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("window", ["40", "-2", "40,-400", "40,0", "a,b", "40,400,1", "0", "", "nan,4"])
def test_an_invalid_window_or_choice_of_frames_is_refused(window):
    if window != "40":
        with pytest.raises(UserError, match="window"):
            ImageSettings(window=window).check()
    with pytest.raises(UserError, match="frames"):
        ImageSettings(frames=window).check()
    for good in ("40,400", "-600, 1500", "40.5,.5", "2"):
        ImageSettings(window=good, frames="every:3").check()


# --- Padding ---------------------------------------------------------------------------------------------------------


def test_padding_is_black_and_does_not_count(tmp_path):
    values = np.array([[-2000, 10, 20, 25], [30, 35, 40, -2000]], np.int16)
    plain = linear(10, 40, values)
    for number, (photometric, expected) in enumerate((("MONOCHROME2", plain), ("MONOCHROME1", 255 - plain))):
        expected = np.where(values == -2000, 0, expected)
        for padding in (-2000, 63536):  # as a signed and, wrongly, as an unsigned number
            path = save_dicom(tmp_path / f"{number}.dcm", values, photometric, Modality="MR")
            header = pydicom.dcmread(path)
            header.add_new("PixelPaddingValue", "SS" if padding < 0 else "US", padding)
            header.save_as(path)
            assert np.array_equal(load_pixels(path), expected)
    high = save_dicom(tmp_path / "high.dcm", np.where(values < 0, 4095, values), Modality="MR", PixelPaddingValue=4095)
    assert np.array_equal(load_pixels(high), np.where(values < 0, 0, plain))


@settings(max_examples=30, deadline=None)
@given(ends=st.tuples(st.integers(0, 4095), st.integers(0, 4095)), kind=st.sampled_from([np.uint16, np.int16]))
def test_a_range_of_padding_has_two_ends_in_either_order(tmp_path_factory, ends, kind):
    values = np.arange(0, 4096, 16, dtype=kind).reshape(16, 16)
    path = tmp_path_factory.mktemp("padding") / "a.dcm"
    save_dicom(path, values, Modality="MR", PixelPaddingValue=ends[0], PixelPaddingRangeLimit=ends[1])
    padding = (values >= min(ends)) & (values <= max(ends))
    rest = values[~padding]
    expected = linear(rest.min(), rest.max(), values) if rest.size > 1 else np.zeros(values.shape)
    assert np.array_equal(load_pixels(path), np.where(padding, 0, expected))


def test_padding_of_a_ct_with_a_window_is_black(tmp_path):
    hounsfield = np.array([[-1000, 40], [80, 3071]])
    for tags in ({}, {"WindowCenter": 40, "WindowWidth": 400}):
        path = save_ct(tmp_path / "a.dcm", hounsfield, PixelPaddingValue=4095, **tags)
        assert load_pixels(path)[1, 1] == 0 and load_pixels(path, window="40,400")[1, 1] == 0


# --- Frames and other objects ----------------------------------------------------------------------------------------


def test_frames_are_chosen(tmp_path):
    film = np.random.default_rng(0).integers(0, 4096, (5, 8, 6), dtype=np.uint16)
    path = save_dicom(tmp_path / "film.dcm", film, NumberOfFrames=5, WindowCenter=2048, WindowWidth=4096)
    alone = [save_dicom(tmp_path / f"{n}.dcm", film[n], WindowCenter=2048, WindowWidth=4096) for n in range(5)]
    assert open_image(path, ImageSettings()).count == 5
    for number, one in enumerate(alone, start=1):
        assert np.array_equal(load_pixels(path, number), load_pixels(one))
    assert np.array_equal(load_pixels(path, frames="middle"), load_pixels(alone[2]))
    for options, frame, reason in (
        ({}, None, "several_frames"),
        ({"frames": "all"}, None, "several_frames"),
        ({}, 6, "missing"),
    ):
        with pytest.raises(ImageProblem) as error:
            load_pixels(path, frame, **options)
        assert error.value.reason == reason
    colors = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    path = save_dicom(tmp_path / "colors.dcm", colors, "RGB", NumberOfFrames=3, Rows=4, Columns=5)
    assert all(np.array_equal(load_pixels(path, number + 1), colors[number]) for number in range(3))


def test_each_frame_of_an_enhanced_object_has_its_own_scale_and_window(tmp_path):
    def item(**tags):
        item = pydicom.Dataset()
        for name, value in tags.items():
            setattr(item, name, value)
        return item

    def scale(intercept):
        return [item(RescaleSlope=1, RescaleIntercept=intercept, RescaleType="HU")]

    window = [item(WindowCenter=600, WindowWidth=2000, VOILUTFunction="LINEAR_EXACT")]
    values = np.broadcast_to((HOUNSFIELD + 1024).astype(np.uint16), (3, 2, 4))
    path = save_dicom(
        tmp_path / "a.dcm",
        values,
        NumberOfFrames=3,
        Modality="CT",
        SharedFunctionalGroupsSequence=[item(PixelValueTransformationSequence=scale(-1024))],
        PerFrameFunctionalGroupsSequence=[
            item(),
            item(FrameVOILUTSequence=window),
            item(PixelValueTransformationSequence=scale(-1000)),
        ],
    )
    assert np.array_equal(load_pixels(path, 1), linear(-160, 240))
    assert np.array_equal(load_pixels(path, 2), linear(-400, 1600))
    assert np.array_equal(load_pixels(path, 3), linear(-160, 240, HOUNSFIELD + 24))
    notes = [load_image(path, ImageSettings(), number).note for number in (1, 2, 3)]
    assert notes == ["CT_images_without_window", "", "CT_images_without_window"]


@pytest.mark.parametrize("value", ["YES", "yes ", "Yes"])
def test_burned_in_text_is_rejected_unless_it_is_accepted(tmp_path, value):
    path = save_dicom(tmp_path / "a.dcm", RAMP, BurnedInAnnotation=value)
    with pytest.raises(ImageProblem, match="burned_in_annotation: .*--accept_burned_in true"):
        load_image(path)
    clean = save_dicom(tmp_path / "b.dcm", RAMP, BurnedInAnnotation="NO")
    assert np.array_equal(load_pixels(path, accept_burned_in=True), load_pixels(clean))


def test_the_files_that_pydicom_is_tested_with_are_read_or_rejected():
    results = {}
    for path in Path(pydicom.__file__).parent.glob("data/test_files/*.dcm"):
        try:
            opened = open_image(path, ImageSettings(accept_burned_in=True))
            for index in {0, opened.middle, opened.count - 1}:
                image = opened.read(index).image
                assert image.mode in ("L", "RGB") and image.width * image.height > 0
            results[path.name] = opened.count
        except ImageProblem as problem:
            results[path.name] = problem.reason
    expected = {
        "CT_small.dcm": 1, "MR_small.dcm": 1, "MR_small_RLE.dcm": 1, "MR_truncated.dcm": "truncated",
        "SC_rgb_rle_2frame.dcm": 2, "rtdose.dcm": 15, "liver_1frame.dcm": 1, "rtplan.dcm": "not_an_image",
        "rtstruct.dcm": "not_an_image", "test-SR.dcm": "not_an_image", "waveform_ecg.dcm": "not_an_image",
    }  # fmt: skip
    assert expected.items() <= results.items()
    reasons = {value for value in results.values() if isinstance(value, str)}
    assert reasons <= {"truncated", "not_an_image", "unsupported"}
    assert sum(isinstance(value, int) for value in results.values()) > 40
