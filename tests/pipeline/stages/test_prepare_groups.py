# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The stage `prepare` with patients in tables, in DICOM headers and in directories."""

import json
import random
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from jsonl import read_jsonl
from PIL import Image
from tables import write_table

from medst_trl.base.errors import UserError
from medst_trl.data.groups import GroupIds, salt_of
from medst_trl.data.loading import load_records
from medst_trl.data.overlap import hash_images
from medst_trl.evaluation.scoring import score_vqa
from medst_trl.evaluation.vqa import questions_of
from medst_trl.hub.cards import steps_to
from medst_trl.pipeline.stages.prepare import STAGE, PrepareArguments, check, main


@pytest.fixture(autouse=True)
def own_directories(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("MEDST_GROUP_SALT", str(tmp_path / "salt"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


def save(path, seed: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24), dtype=np.uint8)).save(path)


def prepare(tmp_path, to="out", **arguments):
    main(PrepareArguments(**{"output_dir": str(tmp_path / to), "source": "images"} | arguments))
    return tmp_path / to, json.loads((tmp_path / to / "stage.json").read_text())


def groups_of(directory) -> dict[str, set[str]]:
    """Return the group ids of each split."""
    found = {}
    for path in sorted(directory.glob("*/*.parquet")):
        split = path.name.partition("-")[0]
        found[f"{path.parent.name}/{split}"] = set(load_records(path.parent, split)["group_id"])
    return found


def patients(tmp_path, suffix=".csv", column="patient_id"):
    """Ten images of the patients P0 to P3; those of P0 and P1 are in train and in test."""
    for number in range(10):
        save(tmp_path / "img" / f"{number}.png", number)
    rows = [
        {"image": f"{n}.png", "question": "Is it normal?", "answer": "yes", "split": "train" if n < 8 else "test",
         column: f"P{n % 4}"}
        for n in range(10)
    ]  # fmt: skip
    table = write_table(tmp_path / f"patients{suffix}", rows)
    return {"data_path": str(table), "image_folder": str(tmp_path / "img")}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".xlsx"])
def test_patients_on_both_sides_are_reported_and_removed(tmp_path, suffix, capsys):
    table = patients(tmp_path, suffix, "Patient ID")
    _, record = prepare(tmp_path, "unaware", **table)
    assert "groups_in_train_and_test" not in record["counts"]["notes"]
    assert record["counts"]["notes"]["columns_not_used"] == "patient_id"
    directory, record = prepare(tmp_path, group_column="PATIENT-id", **table)
    assert record["counts"]["notes"] == {
        "images_in_train_and_test": 0, "near_copies_in_train_and_test": 0, "groups_in_train_and_test": 2,
    }  # fmt: skip
    assert record["counts"]["datasets"]["instruct/train"]["groups"] == 4
    assert "groups in train and test: 2" in capsys.readouterr().out
    ids = GroupIds(tmp_path / "salt")
    assert groups_of(directory) == {
        "benchmark/test": {ids.of_key("P0"), ids.of_key("P1")},
        "instruct/train": {ids.of_key(f"P{n}") for n in range(4)},
    }
    directory, record = prepare(tmp_path, "apart", group_column="patient_id", disjoint="group", **table)
    assert record["counts"]["rejected"] == {"group_in_test": 4}
    assert "groups in train and test: 2 before removal" in capsys.readouterr().out
    values = [row["value"].split(", ")[-1] for row in read_jsonl(directory / "rejected.jsonl")]
    assert set(values) == {ids.of_key("P0"), ids.of_key("P1")}
    assert groups_of(directory)["instruct/train"] == {ids.of_key("P2"), ids.of_key("P3")}


def test_no_file_names_a_patient_or_the_salt(tmp_path):
    table = patients(tmp_path)
    text = (tmp_path / "patients.csv").read_text().splitlines()
    names = ["id,link", *(f"P{n % 4}-{n},P{n % 4}" for n in range(10))]
    (tmp_path / "patients.csv").write_text("\n".join(map(",".join, zip(names, text))))
    directory, record = prepare(tmp_path, group_column="patient_id", group_salt=str(tmp_path / "my_salt"), **table)
    salt = (tmp_path / "my_salt").read_bytes()
    for path in directory.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert salt not in content and str(tmp_path / "my_salt").encode() not in content
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                names = [name for name in table.column_names if not name.startswith("image")]
                content = str(table.select(names).to_pylist()).encode()
            assert not re.search(rb"\bP[0-3]\b", content)
    assert record["settings"]["group_salt"] is None
    assert record["inputs"]["group_salt"] == [
        {"path": "group_salt", "sha256": salt_of(GroupIds(tmp_path / "my_salt").of_key(""))}
    ]
    assert "group_salt" not in STAGE.shown_settings({"group_salt": "StMarysHospital.key"})
    assert "salt" not in str(steps_to(directory))


def test_an_error_about_data_with_a_column_of_groups_quotes_none_of_it(tmp_path):
    table = write_table(
        tmp_path / "t.csv", [{"id": "DOE", "image": "DOE.png", "question": "?", "answer": "", "mrn": "1"}]
    )
    with pytest.raises(UserError, match="1 no_answer. Correct") as raised:
        prepare(tmp_path, data_path=str(table), group_column="mrn")
    assert "DOE" not in str(raised.value)


def test_without_a_home_directory_only_a_salt_is_missing(tmp_path, monkeypatch):
    def getpwuid(uid):
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", getpwuid)
    for name in ("HOME", "XDG_DATA_HOME", "MEDST_GROUP_SALT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    table = patients(tmp_path)
    prepare(tmp_path, **table)
    with pytest.raises(UserError, match="no home directory. Set --group_salt"):
        prepare(tmp_path, "grouped", group_column="patient_id", **table)
    assert not (tmp_path / "~").exists()


def test_a_finished_run_with_dicom_patients_is_not_skipped_with_another_salt(tmp_path, capsys):
    (tmp_path / "img").mkdir()
    dicom(tmp_path / "img" / "0.dcm", "P", "1.2", 0)
    images = {"data_path": str(tmp_path / "img")}
    prepare(tmp_path, **images)
    prepare(tmp_path, **images)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="another group_salt"):
        prepare(tmp_path, group_salt=str(tmp_path / "other"), **images)


def test_a_salt_is_compared_by_its_content(tmp_path, capsys):
    table = patients(tmp_path) | {"group_column": "patient_id"}
    prepare(tmp_path, group_salt=str(tmp_path / "one"), **table)
    (tmp_path / "one").rename(tmp_path / "renamed")
    prepare(tmp_path, group_salt=str(tmp_path / "renamed"), **table)
    assert "nothing to do" in capsys.readouterr().out
    (tmp_path / "two").write_bytes(b"2" * 32)
    with pytest.raises(UserError, match="input group_salt: group_salt"):
        prepare(tmp_path, group_salt=str(tmp_path / "two"), **table)
    directory, _ = prepare(tmp_path, group_salt=str(tmp_path / "two"), overwrite=True, **table)
    ids = GroupIds(tmp_path / "two")
    assert groups_of(directory)["benchmark/test"] == {ids.of_key("P0"), ids.of_key("P1")}


@pytest.mark.parametrize("salt", ["out/salt", "out", "out/deep/salt", "~/out/salt"])
def test_a_salt_that_overwrite_would_delete_is_refused(tmp_path, monkeypatch, salt):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MEDST_GROUP_SALT", salt if salt.startswith("~") else str(tmp_path / salt))
    with pytest.raises(UserError, match="group_salt is inside output_dir"):
        check(PrepareArguments(str(tmp_path / "out"), "phantoms"))


def test_unlabeled_images_of_other_splits_are_no_training_data_and_keep_their_patients_out(tmp_path):
    for number in range(5):
        save(tmp_path / f"{number}.png", number)
    rows = [
        {"image": f"{image}.png", "question": "", "answer": "", "split": split, "patient": patient}
        for image, split, patient in [
            (0, "train", "A"), (1, "train", "B"), (2, "test", "B"), (3, "val", "C"), (4, "train", "D"),
            (0, "test", "A"),
        ]
    ]  # fmt: skip
    table = write_table(tmp_path / "t.csv", rows)
    for disjoint, patients_left in (("none", "ABD"), ("image", "BD"), ("group", "D")):
        directory, _ = prepare(tmp_path, disjoint, data_path=str(table), group_column="patient", disjoint=disjoint)
        ids = GroupIds(tmp_path / "salt")
        assert groups_of(directory) == {"images/train": {ids.of_key(name) for name in patients_left}}
        reasons = [row["reason"] for row in read_jsonl(directory / "rejected.jsonl")]
        assert reasons.count("unlabeled_test_image") == 2 and reasons.count("unlabeled_validation_image") == 1


def test_test_rows_that_no_benchmark_can_have_keep_their_patients_out(tmp_path):
    for number in range(6):
        save(tmp_path / f"{number}.png", number)
    rows = [
        {"image": image, "caption": "A scan.", "question": f"{image}?", "answer": "So.", "split": split, "p": patient}
        for image, split, patient in [
            ("0.png", "train", "A"), ("1.png", "train", "B"), ("2.png", "train", "C"), ("0.png|5.png", "test", "A"),
            ("3.png|4.png", "test", "B"),
        ]
    ]  # fmt: skip
    for source, reason in (("images", "several_test_images"), ("captions", "test_caption")):
        for disjoint, patients_left in (("none", "ABC"), ("image", "BC"), ("group", "C")):
            arguments = {"data_path": str(write_table(tmp_path / "t.jsonl", rows)), "group_column": "p"}
            directory, record = prepare(tmp_path, source + disjoint, source=source, disjoint=disjoint, **arguments)
            ids = GroupIds(tmp_path / "salt")
            assert groups_of(directory) == {"instruct/train": {*map(ids.of_key, patients_left)}}
            assert record["counts"]["rejected"][reason] == 2


def test_ids_of_files_with_a_patient_in_the_header_are_hashed(tmp_path):
    for number in range(2):
        dicom(tmp_path / "scans" / f"{number}.dcm", "HOSP-4711", "1.2", number)
    rows = [
        {"id": name, "image": f"{n}.dcm", "question": "Q?", "answer": "yes", "link": "HOSP-4711", "split": "test"}
        for n, name in enumerate(["q-HOSP-4711-a", "harmless"])
    ]
    table = write_table(tmp_path / "t.csv", rows)
    directory, _ = prepare(tmp_path, data_path=str(table), image_folder=str(tmp_path / "scans"))
    (first,), (second,) = sorted(load_records(directory / "benchmark", "test")["questions"], key=lambda q: q[0]["id"])
    ids = GroupIds(tmp_path / "salt")
    assert {first["id"], second["id"]} == {f"id-{ids.of_key(name)}" for name in ("harmless", "q-HOSP-4711-a")}
    assert first["link"] == second["link"] == f"id-{ids.of_key('HOSP-4711')}"


@pytest.mark.parametrize("source", ["images", "llava", "captions"])
def test_ids_and_links_of_records_with_a_group_are_hashed(tmp_path, source):
    for number in range(6):
        save(tmp_path / f"P{number // 2}0017" / f"{number}.png", number)
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A scan."}]
    rows = [
        {"id": f"MILLER-{n // 2}X-1960_{n}", "link": f"MILLER-{n // 2}X-1960", "patient": f"Miller {n // 2}x 1960",
         "image": f"P{n // 2}0017/{n}.png", "question": f"{n}?", "answer": "no", "caption": "A scan.",
         "split": "train" if n < 4 or source == "captions" else "test", "conversations": turns}
        for n in range(6)
    ]  # fmt: skip
    rows[0]["id"], rows[1]["id"] = "P00017-scan", "harmless"
    table = write_table(tmp_path / "t.jsonl", rows)
    directory, _ = prepare(tmp_path, source=source, data_path=str(table), group_column="patient")
    written = b"".join(path.read_bytes() for path in directory.rglob("*.parquet"))
    assert not any(name in written for name in (b"1960", b"P00017", b"harmless"))
    if source != "images":
        names = load_records(directory / "instruct", "train")["id"]
        salt = GroupIds(tmp_path / "salt")
        assert names[:3] == [f"id-{salt.of_key(row['id'])}" for row in rows[:3]]


def test_ids_of_two_runs_agree_if_their_salt_does(tmp_path):
    table = patients(tmp_path)
    one, two = (groups_of(prepare(tmp_path, name, group_column="patient_id", **table)[0]) for name in "ab")
    assert one == two
    other = groups_of(prepare(tmp_path, "c", group_column="patient_id", group_salt=str(tmp_path / "x"), **table)[0])
    assert {salt_of(group) for group in other["benchmark/test"]}.isdisjoint(map(salt_of, one["benchmark/test"]))


def test_a_column_that_no_record_has_is_refused_with_those_not_used(tmp_path):
    with pytest.raises(UserError, match=r"'pateint'.*not used: patient_id"):
        prepare(tmp_path, group_column="pateint", **patients(tmp_path))
    assert not (tmp_path / "out").exists()


def test_numbers_of_a_spreadsheet_are_the_same_patients_as_text(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.png", number)
    values = ["17", 17, 17.0, " 17 "]
    rows = [{"image": f"{n}.png", "question": "Q?", "answer": "yes", "mrn": value} for n, value in enumerate(values)]
    directory, _ = prepare(tmp_path, data_path=str(write_table(tmp_path / "t.jsonl", rows)), group_column="mrn")
    assert groups_of(directory)["instruct/train"] == {GroupIds(tmp_path / "salt").of_key("17")}


def test_a_group_that_is_no_text_is_rejected_without_its_value(tmp_path):
    save(tmp_path / "0.png", 0)
    rows = [
        {"image": "0.png", "question": f"{n}?", "answer": "yes", "mrn": value}
        for n, value in enumerate(["1", ["Doe"]])
    ]
    directory, _ = prepare(tmp_path, data_path=str(write_table(tmp_path / "t.jsonl", rows)), group_column="mrn")
    assert read_jsonl(directory / "rejected.jsonl") == [{"id": "row-000001", "reason": "bad_group", "value": None}]


def test_conversations_and_unlabeled_images_have_groups_too(tmp_path):
    for number in range(6):
        save(tmp_path / f"{number}.png", number)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A scan."}]
    talks = [
        {"id": f"talk {n}", "image": f"{n}.png", "conversations": turns, "Patient": f"P{n // 2}"} for n in range(6)
    ]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    directory, _ = prepare(tmp_path, source="llava", data_path=str(tmp_path / "talks.json"), group_column="patient")
    train = load_records(directory / "instruct", "train")
    ids = GroupIds(tmp_path / "salt")
    assert {row["id"]: row["group_id"] for row in train} == {
        f"id-{ids.of_key(f'talk {n}')}": ids.of_key(f"P{n // 2}") for n in range(6)
    }

    rows = [{"image": f"{n}.png", "caption": "A scan.", "patient": f"P{n // 2}"} for n in range(6)]
    table = write_table(tmp_path / "captions.csv", rows)
    directory, _ = prepare(tmp_path, "b", source="captions", data_path=str(table), group_column="patient")
    assert groups_of(directory)["instruct/train"] == {ids.of_key(f"P{n}") for n in range(3)}

    rows = [
        {"image": f"{n}.png", "question": "", "answer": "", "split": "", "patient": f"P{n // 2}"} for n in range(5)
    ]
    rows.append({"image": "5.png", "question": "Q?", "answer": "yes", "split": "test", "patient": "P2"})
    table = write_table(tmp_path / "mixed.csv", rows)
    directory, record = prepare(tmp_path, "c", data_path=str(table), group_column="patient", disjoint="group")
    assert groups_of(directory)["images/train"] == {ids.of_key("P0"), ids.of_key("P1")}
    assert record["counts"]["rejected"] == {"group_in_test": 1}


@pytest.mark.parametrize(("group_by", "groups"), [(None, {None}), ("directory", {"ward/P0", "ward/P1", None})])
def test_directories_are_groups_if_asked_for(tmp_path, group_by, groups):
    for number, name in enumerate(["ward/P0/a.png", "ward/P0/b.png", "ward/P1/a.png", "c.png"]):
        save(tmp_path / "img" / name, number)
    directory, _ = prepare(tmp_path, data_path=str(tmp_path / "img"), group_by=group_by)
    ids = GroupIds(tmp_path / "salt", "directory")
    assert groups_of(directory)["images/train"] == set(map(ids.of_key, groups))


def test_absolute_and_relative_names_of_a_directory_are_one_group(tmp_path):
    rows = []
    for number in range(8):
        save(tmp_path / "img" / f"P{number % 4}" / f"{number}.png", number)
        split, root = ("train", f"{tmp_path}/img/") if number < 4 else ("test", "")
        rows.append({"image": f"{root}P{number % 4}/{number}.png", "question": "Q?", "answer": "yes", "split": split})
    table = {"data_path": str(write_table(tmp_path / "t.csv", rows)), "image_folder": str(tmp_path / "img")}
    directory, record = prepare(tmp_path, group_by="directory:1", **table)
    ids = GroupIds(tmp_path / "salt", "directory:1")
    assert groups_of(directory)["instruct/train"] == {ids.of_key(f"P{n}") for n in range(4)}
    assert record["counts"]["notes"]["groups_in_train_and_test"] == 4


def test_a_table_whose_records_are_all_rejected_is_not_blamed_on_the_column(tmp_path):
    rows = [{"image": f"{n}.png", "question": "Q?", "answer": "", "patient": "P"} for n in range(3)]
    with pytest.raises(UserError, match="can be used: 3 no_answer"):
        prepare(tmp_path, data_path=str(write_table(tmp_path / "t.csv", rows)), group_column="patient")


def test_without_groups_no_salt_is_made_and_disjoint_groups_are_said_to_be_missing(tmp_path):
    _, record = prepare(tmp_path, disjoint="group", **patients(tmp_path))
    assert record["counts"]["notes"]["groups"].startswith("none. Set --group_column")
    assert not (tmp_path / "salt").exists()


def test_one_group_of_almost_everything_is_noted(tmp_path):
    """Files that were made anonymous often have one PatientID for all patients."""
    for number in range(12):
        save(tmp_path / "img" / ("anonymous" if number else "P1") / f"{number}.png", number)
    _, record = prepare(tmp_path, data_path=str(tmp_path / "img"), group_by="directory")
    assert record["counts"]["notes"]["images_kept_together"] == "11 of 12"


@pytest.mark.parametrize("words", [{"image_disjoint": True}, {"disjoint": "image"}])
@pytest.mark.parametrize("again", [{"image_disjoint": True}, {"disjoint": "image"}])
def test_image_disjoint_is_the_older_name_of_disjoint_image(tmp_path, words, again, capsys):
    table = patients(tmp_path)
    prepare(tmp_path, **table, **words)
    prepare(tmp_path, **table, **again)
    assert "unchanged, nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="image_disjoint: true before, false now"):
        prepare(tmp_path, **table, disjoint="none")
    with pytest.raises(UserError, match="disjoint"):
        prepare(tmp_path, **table, disjoint="group", image_disjoint=True)


@pytest.mark.parametrize(
    "change", [{"disjoint": "patient"}, {"group_by": "ward"}, {"group_by": "directory:0"}, {"near_copy_bits": -1}]
)
def test_unknown_values_are_refused(tmp_path, change):
    with pytest.raises(UserError, match=next(iter(change))):
        check(PrepareArguments("out", "images", "data", **change))


def test_near_copies_are_counted_and_removed_as_the_threshold_says(tmp_path):
    for number in range(4):
        image = Image.effect_noise((200, 160), 60)
        image.save(tmp_path / f"{number}.png")
        image.resize((100, 80)).save(tmp_path / f"copy{number}.jpg", quality=95)
    rows = [{"image": f"{n}.png", "question": "Held?", "answer": "yes", "split": "test"} for n in range(3)]
    rows += [{"image": f"copy{n}.jpg", "question": "Other?", "answer": "yes", "split": "train"} for n in range(4)]
    table = {"data_path": str(write_table(tmp_path / "t.csv", rows))}
    for to, bits, found, left in (("a", 10, 3, 1), ("b", 0, None, 4)):
        _, record = prepare(tmp_path, to, disjoint="image", near_copy_bits=bits, **table)
        assert record["counts"]["notes"].get("near_copies_in_train_and_test") == found
        index = {row["image_id"]: row["near_hash"] for row in read_jsonl(tmp_path / to / "image_index.jsonl")}
        held = hash_images(load_records(tmp_path / to / "benchmark", "test"))
        assert len(held) == 3 and held.items() <= index.items()  # other commands find the same copies
        assert record["counts"]["datasets"]["instruct/train"]["images"] == left


# --- A hospital: 40 patients, 3 studies each, a series of 2 files per study ------------------------------------------


def dicom(path, patient: str, study: str, seed: int):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset

    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = pydicom.uid.CTImageStorage, f"1.2.{seed}"
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.CTImageStorage, f"1.2.{seed}"
    data.PatientID, data.StudyInstanceUID, data.SeriesInstanceUID = patient, study, f"{study}.1"
    data.Modality, data.SamplesPerPixel, data.PhotometricInterpretation = "MR", 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation, data.Rows, data.Columns = 7, 0, 24, 24
    data.PixelData = np.random.default_rng(seed).integers(0, 256, (24, 24), dtype=np.uint8).tobytes()
    data.save_as(path, enforce_file_format=True)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """DICOM files and a table whose splits were drawn by file: every patient can be on both sides."""
    directory, rows, rng = tmp_path_factory.mktemp("hospital"), [], random.Random(0)
    for number in range(240):
        patient, study = f"Doe{number // 6:03d}", f"1.2.3.{number // 2}"
        name = f"{patient}/{study}/{number}.dcm"
        dicom(directory / "scans" / name, patient, study, number)
        split = "test" if rng.random() < 0.3 else "train"
        rows.append({"image": name, "question": "Is it normal?", "answer": "yes", "split": split, "patient": patient})
    return {
        "data_path": str(write_table(directory / "table.csv", rows)), "image_folder": str(directory / "scans"),
        "validation_fraction": 0.25, "disjoint": "group",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "number"),
    [
        ({}, 40),
        ({"group_column": "patient"}, 40),
        ({"group_by": "directory:1"}, 40),
        ({"group_by": "study"}, 120),
        ({"group_by": "directory"}, 120),
    ],
    ids=["dicom", "table", "first level", "study", "directory"],
)
def test_no_patient_of_a_hospital_is_on_two_sides(tmp_path, hospital, groups, number):
    directory, record = prepare(tmp_path, **hospital | {"disjoint": "none"} | groups)
    assert record["counts"]["notes"]["groups_in_train_and_test"] > 20
    assert len(set().union(*groups_of(directory).values()) - {None}) == number
    directory, record = prepare(tmp_path, "apart", **hospital | groups)
    sides = groups_of(directory)
    assert sides.keys() == {"benchmark/test", "instruct/train", "instruct/validation"} and all(sides.values())
    assert sum(map(len, sides.values())) == len(set().union(*sides.values())), "a group is on two sides"
    # Each line of the index names the file and, in it, the patient; so it can be checked without any of our hashes.
    key = {number: -1 if number == 120 else 1 for number in (40, 120)}[number]
    names = {
        row["image_id"]: "/".join(row["image"].split("/")[:key]) for row in read_jsonl(directory / "image_index.jsonl")
    }
    shown = {}
    for name in sides:
        kind, split = name.split("/")
        rows = load_records(directory / kind, split)
        images = rows["image_id"] if kind == "benchmark" else [image for ids in rows["image_ids"] for image in ids]
        shown[name] = {names[image] for image in images}
    assert sum(map(len, shown.values())) == len(set().union(*shown.values())), "a patient is on two sides"


def test_intervals_of_a_hospital_are_by_patient(tmp_path, hospital):
    directory, _ = prepare(tmp_path, **hospital)
    rows = [
        {key: question[key] for key in ("id", "image_id", "group_id", "question", "answer", "answer_type")}
        for question in questions_of(load_records(directory / "benchmark", "test"))
    ]
    patients = sorted({row["group_id"] for row in rows})
    right = set(patients[::2])  # the model is right about every second patient: answers of a patient are all alike
    rows = [row | {"prediction": "yes" if row["group_id"] in right else "no"} for row in rows]
    by_patient = score_vqa(rows)
    by_image = score_vqa([row | {"group_id": None} for row in rows])
    assert (by_patient["bootstrap"]["unit"], by_image["bootstrap"]["unit"]) == ("group", "image")
    assert by_patient["n_groups"] == len(patients) and by_patient["n_images"] == len(rows) == by_image["n_images"]
    one, other = (scores["closed"]["accuracy"] for scores in (by_patient, by_image))
    assert one["value"] == other["value"]
    widths = [leaf["interval"][1] - leaf["interval"][0] for leaf in (one, other)]
    # By hand: 1.96 standard errors on either side, of a ratio of sums over patients, and of a mean over images.
    p, sizes = one["value"] / 100, {name: sum(row["group_id"] == name for row in rows) for name in patients}
    spread = sum((sizes[name] * ((name in right) - p)) ** 2 for name in patients) ** 0.5 / len(rows)
    assert widths[0] == pytest.approx(2 * 196 * spread, rel=0.12)
    assert widths[1] == pytest.approx(2 * 196 * (p * (1 - p) / len(rows)) ** 0.5, rel=0.12)
    assert widths[0] > 1.2 * widths[1]
