# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The stage `prepare` on small data, interrupted and resumed, and on the real VQA-RAD."""

import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from jsonl import read_jsonl
from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import fingerprint
from medst_trl.data.conform import conform
from medst_trl.data.image_settings import ImageSettings
from medst_trl.data.images import image_id
from medst_trl.data.loading import load_records
from medst_trl.data.schema import text_of
from medst_trl.data.source import SOURCES
from medst_trl.pipeline.options import convert, read_options
from medst_trl.pipeline.stage import Count
from medst_trl.pipeline.stages.prepare import STAGE, PrepareArguments, check, main, plan


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setenv("MEDST_GROUP_SALT", str(tmp_path / "salt"))


def save(path, seed: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def llava(tmp_path, records):
    (tmp_path / "data.json").write_text(json.dumps(records))
    return {"source": "llava", "data_path": str(tmp_path / "data.json"), "image_folder": str(tmp_path / "images")}


def conversation(name, images, question="<image>\nWhat?"):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"Answer {name}"}]
    return {"id": name, "image": images, "conversations": turns}


def prepare(tmp_path, **arguments):
    directory = tmp_path / arguments.pop("to", "out")
    settings = SOURCES.get(arguments["source"]).settings_from(arguments)
    for name in vars(settings) if settings else ():
        arguments.pop(name, None)
    main(PrepareArguments(**{"output_dir": str(directory), "num_workers": 2} | arguments), settings)
    return directory


def contents(directory):
    """Return the SHA-256 of each file that a later stage can read."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in ("stage.json", ".stage.lock")
    }


def test_conversations_with_bad_images_are_rejected(tmp_path, capsys):
    for n in range(6):
        save(tmp_path / "images" / f"Doe_{n}.png", n)
    (tmp_path / "images" / "empty.png").write_bytes(b"")
    save(tmp_path / "secret.png", 99)
    records = [conversation(f"Doe_{n}", f"Doe_{n}.png") for n in range(6)]
    records += [
        conversation("two", ["Doe_0.png", "Doe_1.png"], "<image> or <image>?"),
        conversation("words", None, "What?"),
    ]
    records += [
        conversation("e", "empty.png"),
        conversation("m", "none.png"),
        conversation("s", "../secret.png"),
        conversation("two", ["Doe_0.png", "Doe_1.png"], "<image> or <image>?"),
    ]
    directory = prepare(tmp_path, **llava(tmp_path, records), validation_fraction=0.3)

    rejected = {(row["id"], row["reason"]) for row in read_jsonl(directory / "rejected.jsonl")}
    assert rejected == {("e", "empty"), ("m", "missing"), ("s", "outside_image_folder"), ("two", "duplicate_id")}
    train, validation = (load_records(directory / "instruct", split) for split in ("train", "validation"))
    assert conform(train, "instruct") is train
    assert len(train) + len(validation) == 8
    seen = [{image for row in dataset for image in row["image_ids"]} for dataset in (train, validation)]
    assert seen[0].isdisjoint(seen[1]) and sum(map(len, seen)) == 6
    for row in [*train, *validation]:
        assert [image_id(image) for image in row["images"]] == row["image_ids"]
    counts = json.loads((directory / "stage.json").read_text())["counts"]
    assert counts["rejected"] == {"duplicate_id": 1, "empty": 1, "missing": 1, "outside_image_folder": 1}
    assert "rejected: " in capsys.readouterr().out
    # No column of a published dataset contains a file name. The index next to it does.
    published = b"".join(path.read_bytes() for path in directory.rglob("*.parquet"))
    import pyarrow.parquet as pq

    cells = json.dumps([pq.read_table(path).drop(["images"]).to_pylist() for path in directory.rglob("*.parquet")])
    assert "Doe_" not in cells.replace("Answer Doe_", "") and b".png" not in published
    assert {row["image"] for row in read_jsonl(directory / "image_index.jsonl")} >= {"Doe_0.png", "empty.png"}


def test_a_run_interrupted_after_any_file_resumes_with_the_same_files(tmp_path, monkeypatch):
    for n in range(7):
        save(tmp_path / "images" / f"{n}.png", n)
    arguments = llava(tmp_path, [conversation(f"t{n}", f"{n % 7}.png") for n in range(20)])
    arguments |= {"rows_per_shard": 3, "validation_fraction": 0.4}
    uninterrupted = contents(prepare(tmp_path, to="uninterrupted", **arguments))
    os_replace, interruptions = os.replace, 0
    for stop_after in range(20):
        done = []

        def replace(source, target, done=done, stop_after=stop_after):
            os_replace(source, target)
            if not str(target).endswith("stage.json"):
                done.append(target)
                if len(done) > stop_after:
                    raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                prepare(tmp_path, to=f"interrupted_{stop_after}", **arguments)
            except KeyboardInterrupt:
                interruptions += 1
            else:
                break
        assert contents(prepare(tmp_path, to=f"interrupted_{stop_after}", **arguments)) == uninterrupted
    assert interruptions >= 8


def test_a_killed_run_resumes(tmp_path):
    arguments = ["--source", "phantoms", "--num_phantoms", "400", "--num_test_phantoms", "0", "--rows_per_shard", "10"]
    code = "from medst_trl.pipeline.stages.prepare import *; main(*STAGE.make_parser().parse_args_and_config())"
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", code, *arguments, "--output_dir", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(killed.glob("instruct/*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "finished before it was killed"
    assert json.loads((killed / "stage.json").read_text())["status"] == "running"
    shared = {"source": "phantoms", "num_phantoms": 400, "num_test_phantoms": 0, "rows_per_shard": 10}
    assert len(contents(prepare(tmp_path, to="killed", **shared))) == 42
    visible = {
        name: digest for name, digest in contents(killed).items() if not name.rpartition("/")[2].startswith(".")
    }
    assert visible == contents(prepare(tmp_path, to="uninterrupted", **shared))


def test_a_finished_run_is_skipped_and_a_changed_one_is_refused(tmp_path, capsys):
    save(tmp_path / "images" / "a.png", 0)
    arguments = llava(tmp_path, [conversation("t", "a.png")])
    before = contents(prepare(tmp_path, **arguments))
    assert contents(prepare(tmp_path, **arguments)) == before
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="seed"):
        prepare(tmp_path, **arguments, seed=1)
    save(tmp_path / "images" / "a.png", 1)
    with pytest.raises(UserError, match="image_folder"):
        prepare(tmp_path, **arguments)
    assert contents(prepare(tmp_path, **arguments, overwrite=True)) != before


def test_a_run_resumes_after_a_full_disk(tmp_path, monkeypatch):
    save(tmp_path / "images" / "a.png", 0)
    arguments = llava(tmp_path, [conversation(f"t{n}", "a.png") for n in range(5)])

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("medst_trl.data.schema._write_shard", disk_full)
        with pytest.raises(OSError, match="No space left on device"):
            prepare(tmp_path, **arguments)
    assert len(load_records(prepare(tmp_path, **arguments) / "instruct", "train")) == 5


def test_invalid_settings_are_refused(tmp_path):
    save(tmp_path / "images" / "a.png", 0)
    good = llava(tmp_path, [conversation("t", "a.png")])
    for changes, match in (
        ({"data_path": str(tmp_path / "none.json")}, "data_path"),
        ({"data_path": None}, "data_path"),
        ({"image_folder": str(tmp_path / "none")}, "image_folder"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"max_records": 0}, "max_records"),
        ({"num_workers": -1}, "num_workers"),
    ):
        with pytest.raises(UserError, match=match):
            prepare(tmp_path, **good | changes)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="image_folder .* has none of the images that the data names. Correct one"):
        prepare(tmp_path, **llava(tmp_path, [conversation("t", "x.png"), conversation("u", "y.png")]))
    assert not (tmp_path / "out").exists()
    (tmp_path / "images" / "x.png").write_text("no image")
    with pytest.raises(
        UserError, match=r"can be used: 1 not_an_image, 1 missing, for example 'x\.png.*add --overwrite"
    ):
        prepare(tmp_path, **llava(tmp_path, [conversation("t", "x.png"), conversation("u", "y.png")]))
    assert len(read_jsonl(tmp_path / "out" / "rejected.jsonl")) == 2


def test_the_error_for_an_image_folder_one_level_off_names_the_right_one(tmp_path):
    for n in range(2):
        save(tmp_path / "images" / "train" / f"{n}.png", n)
    arguments = llava(tmp_path, [conversation(f"t{n}", f"train/{n}.png") for n in range(2)])
    meant = rf"Did you mean {tmp_path / 'images'}\?"
    for wrong in (tmp_path, tmp_path / "images" / "train"):
        with pytest.raises(UserError, match=rf"{wrong} has none of the images that the data names\. {meant} Correct"):
            prepare(tmp_path, **arguments | {"image_folder": str(wrong)})
    with pytest.raises(UserError, match=rf"image_folder is not a directory: .*/images/images. {meant}"):
        prepare(tmp_path, **arguments | {"image_folder": str(tmp_path / "images" / "images")})
    assert len(load_records(prepare(tmp_path, **arguments) / "instruct", "train")) == 2
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "0.png").symlink_to("nowhere")
    with pytest.raises(UserError, match="can be used: 1 missing, for example '0.png: missing"):
        prepare(tmp_path, to="links_out", source="images", data_path=str(tmp_path / "links"))


def test_each_image_of_a_directory_is_used_once(tmp_path):
    for name, seed in (("b.png", 1), ("a/c.bmp", 1), ("d.png", 2)):
        save(tmp_path / "images" / name, seed)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    directory = prepare(tmp_path, source="images", data_path=str(tmp_path / "images"))
    dataset = load_records(directory / "images", "train")
    assert conform(dataset, "instruct") is dataset
    assert len(dataset) == 2 and dataset["messages"][:] == [[], []]
    reasons = {row["id"]: row["reason"] for row in read_jsonl(directory / "rejected.jsonl")}
    assert reasons == {"a/c.bmp": "duplicate_image", "notes.txt": "not_an_image"}


def test_a_directory_of_images_is_read_whatever_image_folder_is(tmp_path):
    """A recipe may set image_folder for another `prepare` step."""
    for name, seed in (("scans/0.png", 0), ("scans/1.png", 1), ("other/0.png", 2)):
        save(tmp_path / name, seed)
    arguments = {"source": "images", "data_path": str(tmp_path / "scans")}
    folder = prepare(tmp_path, **arguments, image_folder=str(tmp_path / "other"))
    ids = {image_id(Image.open(tmp_path / "scans" / f"{number}.png")) for number in range(2)}
    assert {row["image_ids"][0] for row in load_records(folder / "images", "train")} == ids
    assert json.loads((folder / "stage.json").read_text())["inputs"]["image_folder"] == []


def test_settings_are_checked_where_the_data_is_not(tmp_path):
    elsewhere = {"output_dir": str(tmp_path / "out"), "source": "images", "data_path": str(tmp_path / "elsewhere")}
    check(PrepareArguments(**elsewhere))
    with pytest.raises(UserError, match="validation_fraction is 5"):
        check(PrepareArguments(**elsewhere, validation_fraction=5))
    here = PrepareArguments(str(tmp_path / "out"), "llava", str(tmp_path), image_folder=str(tmp_path / "later"))
    check(here)  # an earlier stage may make the images
    with pytest.raises(UserError, match="image_folder is not a directory"):
        main(here)


def test_a_source_without_records_says_so(tmp_path):
    (tmp_path / "table.csv").write_text("image,question,answer\n")
    with pytest.raises(UserError, match="The source 'images' found no records in .*table.csv"):
        prepare(tmp_path, source="images", data_path=str(tmp_path / "table.csv"))
    with pytest.raises(UserError, match=r"The source 'phantoms' found no records\. Correct"):
        prepare(tmp_path, source="phantoms", num_phantoms=0, num_test_phantoms=0)


def test_max_records_counts_for_every_source(tmp_path):
    numbers = {"num_phantoms": 40, "num_test_phantoms": 20, "max_records": 10}
    directory = prepare(tmp_path, source="phantoms", **numbers)
    rows = {
        kind: len(load_records(directory / kind, split))
        for kind, split in (("instruct", "train"), ("benchmark", "test"))
    }
    assert rows == {"instruct": 10, "benchmark": 10}
    planned = {item.kind: item.count({"source": "phantoms"} | numbers, "train", None) for item in STAGE.outputs}
    assert planned["instruct"] == Count(10, at_most=True)


def test_the_plan_of_a_source_without_counts_has_no_empty_row(tmp_path):
    class Unknown:
        def rows(self, directory, split):
            return Count(None)

    assert list(plan(Unknown(), PrepareArguments(output_dir=str(tmp_path), source="phantoms"))) == []


def test_a_table_with_questions_becomes_three_datasets(tmp_path):
    save(tmp_path / "a.png", 0)
    save(tmp_path / "b.png", 1)
    rows = [
        "image,question,answer,split",
        "a.png,What?,Liver,test",
        "a.png,What?,Liver,train",
        "a.png,Normal?,No,train",
    ]
    (tmp_path / "table.csv").write_text("\n".join([*rows, "b.png,,,"]))
    directory = prepare(tmp_path, source="images", data_path=str(tmp_path / "table.csv"))
    (row,) = load_records(directory / "benchmark", "test")
    assert [question["answer"] for question in row["questions"]] == ["Liver"]
    (conversation,) = load_records(directory / "instruct", "train")
    assert [text_of(message["content"]) for message in conversation["messages"]] == ["Normal?", "No"]
    assert len(load_records(directory / "images", "train")) == 1


def test_phantoms_become_three_datasets(tmp_path):
    numbers = {"num_phantoms": 60, "num_test_phantoms": 20, "num_unlabelled_phantoms": 10, "phantom_turns": 2}
    directory = prepare(tmp_path, source="phantoms", **numbers, validation_fraction=0.3)
    train, validation = (load_records(directory / "instruct", split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 60 and 5 < len(validation) < 35
    assert all(len(row["messages"]) == 4 for row in train)
    assert all(row["id"].startswith("phantom-") for row in train)
    benchmark = load_records(directory / "benchmark", "test")
    assert conform(benchmark, "benchmark") is benchmark
    assert len(benchmark) == 20 and len(load_records(directory / "images", "train")) == 10
    assert image_id(benchmark[0]["image"]) == benchmark[0]["image_id"]


@pytest.mark.parametrize("source", ["vqa_rad", "vqa_rad_mevf"])
def test_vqa_rad_has_the_published_counts_and_unchanged_pixels(tmp_path, shared_data, source, capsys):
    directory = prepare(tmp_path, source=source, data_path=str(shared_data / "vqa_rad"), image_disjoint=True)
    counts = json.loads((directory / "stage.json").read_text())["counts"]
    assert counts["datasets"]["benchmark/test"] == {"images": 203, "questions": 451, "open": 179, "closed": 272}
    assert counts["notes"]["images_in_train_and_test"] == (202 if source == "vqa_rad" else 203)
    assert counts["notes"]["pairs_in_train_and_test"] == (1 if source == "vqa_rad" else 14)
    assert "images in train and test: 20" in capsys.readouterr().out
    benchmark, train = load_records(directory / "benchmark", "test"), load_records(directory / "instruct", "train")
    test_images = set(benchmark["image_id"])
    assert test_images.isdisjoint(image for row in train for image in row["image_ids"])
    # The pixels equal those of the file on disk, and the format is still JPEG.
    from datasets import Image as ImageFeature

    names = {row["image_id"]: row["image"] for row in read_jsonl(directory / "image_index.jsonl")}
    for row in benchmark.cast_column("image", ImageFeature(decode=False)).select(range(0, 203, 20)):
        stored = Image.open(io.BytesIO(row["image"]["bytes"]))
        source_image = Image.open(shared_data / "vqa_rad" / "images" / names[row["image_id"]])
        assert stored.format == "JPEG" and np.array_equal(np.asarray(stored), np.asarray(source_image))


def test_mevf_without_the_release_publishes_no_file_name_as_link(tmp_path):
    save(tmp_path / "data" / "images" / "synpic1.png", 0)
    row = {"image_name": "synpic1.png", "question_type": "PRES", "answer": "yes", "answer_type": "CLOSED"}
    for qid, name in enumerate(("trainset", "testset")):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps([row | {"qid": qid, "question": f"Is it {qid}?"}]))
    directory = prepare(tmp_path, source="vqa_rad_mevf", data_path=str(tmp_path / "data"))
    (question,) = load_records(directory / "benchmark", "test")[0]["questions"]
    assert question["link"].startswith("id-")


def test_help_imports_no_heavy_package():
    code = (
        "import sys, medst_trl.pipeline.stages.prepare as p; p.STAGE.make_parser().format_help(); "
        "print([name for name in ('torch', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_parser_reads_settings():
    args, *_ = STAGE.make_parser().parse_args_and_config(
        ["--source", "slake", "--output_dir", "x", "--image_disjoint", "true", "--max_records", "5"]
    )
    assert (args.source, args.image_disjoint, args.max_records) == ("slake", True, 5)


@pytest.mark.parametrize("disjoint", [False, True])
def test_questions_about_several_images_are_conversations_held_out_by_each_image(tmp_path, disjoint):
    for n in range(6):
        save(tmp_path / f"{n}.png", n)
    lines = [
        "image,question,answer,split", "0.png,Is it dark?,yes,test", "0.png|1.png,Changed?,no,train",
        "2.png|3.png,Changed?,no,train", "2.png|3.png,Alike?,yes,train", "2.png,Dark?,no,train",
        "4.png|5.png,Alike?,yes,test",
    ]  # fmt: skip
    (tmp_path / "table.csv").write_text("\n".join(lines))
    directory = prepare(
        tmp_path, source="images", data_path=str(tmp_path / "table.csv"), image_disjoint=disjoint, near_copy_bits=0
    )
    shown = [(len(row["images"]), len(row["messages"])) for row in load_records(directory / "instruct", "train")]
    assert sorted(shown) == ([(1, 2), (2, 4)] if disjoint else [(1, 2), (2, 2), (2, 4)])
    assert len(load_records(directory / "benchmark", "test")) == 1
    rejected, *removed = read_jsonl(directory / "rejected.jsonl")
    assert rejected == {"id": "row-000005", "reason": "several_test_images", "value": "4.png|5.png"}
    assert removed == [{"id": "row-000001", "reason": "image_in_test", "value": "0.png, 1.png, 0.png"}] * disjoint


# --- Images as hospitals keep them -----------------------------------------------------------------------------------


def prepared(tmp_path, to="out", images=None, **arguments):
    """Run with `ImageSettings`, and return the directory, its record and the reasons of its rejected files."""
    arguments = {"source": "images", "num_workers": 2, "output_dir": str(tmp_path / to)} | arguments
    main(PrepareArguments(**arguments), ImageSettings(**images or {}))
    record = json.loads((tmp_path / to / "stage.json").read_text())
    rejected = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / to / "rejected.jsonl")}
    return tmp_path / to, record, rejected


def test_ct_slices_without_a_window_are_counted_and_stay_apart(tmp_path, capsys):
    pytest.importorskip("pydicom")
    from dicom_files import save_ct

    (tmp_path / "ct").mkdir()
    for number in range(3):
        window = {"WindowCenter": 40, "WindowWidth": 400} if number == 2 else {}
        save_ct(tmp_path / "ct" / f"{number}.dcm", [[-1000, 40], [80, 100 + 10 * number]], PatientID="4711", **window)
    save_ct(tmp_path / "ct" / "named.dcm", [[40, 80]], BurnedInAnnotation="YES")
    directory, record, rejected = prepared(tmp_path, data_path=str(tmp_path / "ct"))
    assert rejected == {"named.dcm": "burned_in_annotation"}
    assert record["counts"]["notes"] == {"CT_images_without_window": 2}
    assert "CT images without window: 2" in capsys.readouterr().out
    rows = load_records(directory / "images", "train")
    assert len(rows) == 3 and len(set(rows["group_id"])) == 1
    for row in rows:
        pixels = np.asarray(row["images"][0].convert("L")).astype(int)
        assert pixels[1, 0] - pixels[0, 1] >= 25
    assert "4711" not in "".join(path.read_text(errors="replace") for path in directory.rglob("*") if path.is_file())
    # A resumed run counts the same.
    (directory / "stage.json").write_text(json.dumps(record | {"status": "running"}))
    assert prepared(tmp_path, data_path=str(tmp_path / "ct"))[1]["counts"] == record["counts"]


def test_frames_of_a_directory_a_table_and_a_conversation(tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    for name in ("a", "b"):
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (4, 6, 5), dtype=np.uint8)
        frames = list(map(Image.fromarray, pixels))
        frames[0].save(folder / f"{name}.tif", save_all=True, append_images=frames[1:])
    save(folder / "still.png", 0)
    where = {"data_path": str(folder)}
    rejected = prepared(tmp_path, "none", **where)[2]
    assert rejected == {"a.tif": "several_frames", "b.tif": "several_frames"}
    for frames, count in (("middle", 3), ("all", 9), ("every:3", 5)):
        directory, _, rejected = prepared(tmp_path, frames.replace(":", ""), {"frames": frames}, **where)
        rows = load_records(directory / "images", "train")
        assert len(rows) == count and not rejected
        groups = [group for group in rows["group_id"] if group]
        assert frames == "middle" or (len(groups), len(set(groups))) == (count - 1, 2)
    with pytest.raises(UserError, match='frames: "middle" before, "all" now'):
        prepared(tmp_path, "middle", {"frames": "all"}, **where)
    assert prepared(tmp_path, "few", {"frames": "all"}, **where, max_records=3)[1]["counts"]["datasets"] == {
        "images/train": {"images": 3, "groups": 1}
    }

    table = ["image,question,answer,split"]
    names = ("a.tif", "b.tif#2", "still.png")
    table += [f"{name},What?,That.,{split}" for name in names for split in ("train", "test")]
    (tmp_path / "table.csv").write_text("\n".join(table))
    where = {"data_path": str(tmp_path / "table.csv"), "image_folder": str(folder), "disjoint": "none"}
    where["near_copy_bits"] = 0
    for frames, tests in ((None, 2), ("middle", 3), ("all", 2), ("every:2", 2)):
        directory, _, rejected = prepared(
            tmp_path, f"table-{frames}".replace(":", ""), frames and {"frames": frames}, **where
        )
        assert len(load_records(directory / "benchmark", "test")) == tests
        assert list(rejected.values()).count("several_frames") == (0 if frames == "middle" else 2)
        assert not (directory / "instruct").exists()  # its questions are also in test, or about several frames


def test_a_directory_of_links_pipes_and_devices(tmp_path):
    folder, store = tmp_path / "images", tmp_path / "blobs"
    save(store / "1.png", 1)
    save(store / "deep" / "2.png", 2)
    save(folder / "0.png", 0)
    for name, target in (("1.png", store / "1.png"), ("linked", store / "deep"), ("broken.png", store / "none.png")):
        (folder / name).symlink_to(target)
    (folder / "null.png").symlink_to("/dev/null")
    (folder / "circle").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(folder)  # names of sockets are short
        listening.bind("socket.png")
        outside = dict.fromkeys(("1.png", "linked", "broken.png", "null.png", "circle"), "outside_image_folder")
        special = dict.fromkeys(("pipe.png", "socket.png"), "not_a_file")
        directory, _, rejected = prepared(tmp_path, data_path=str(folder))
        assert rejected == outside | special and len(load_records(directory / "images", "train")) == 1
        directory, _, rejected = prepared(tmp_path, "all", {"follow_symlinks": True}, data_path=str(folder))
        assert rejected == special | {"broken.png": "missing", "null.png": "not_a_file"}
        assert len(load_records(directory / "images", "train")) == 3
    (store / "only.png").symlink_to(folder / "0.png")
    with pytest.raises(UserError, match="1 outside_image_folder, for example .*--follow_symlinks true follows it"):
        (store / "1.png").unlink()
        (store / "deep" / "2.png").unlink()
        prepared(tmp_path, "links", data_path=str(store))
    for path in (folder / "pipe.png", "/dev/null"):
        with pytest.raises(UserError, match="data_path is a pipe, a socket or a device"):
            prepared(tmp_path, "pipe", data_path=str(path))


def test_unused_files_beside_images_are_neither_read_nor_compared(tmp_path, capsys):
    folder = tmp_path / "everything"
    for n in range(3):
        save(folder / f"{n}.png", n)
    (folder / "table.csv").write_text("image,question,answer\n0.png,What?,That.\n1.png,What?,This.\nnone.png,Q?,A.\n")
    where = {"data_path": str(folder / "table.csv")}
    directory, record, _ = prepared(tmp_path, **where)
    os.mkfifo(folder / "pipe")
    (folder / "broken").symlink_to("nothing")
    (folder / "unreadable").write_bytes(b"x")
    (folder / "unreadable").chmod(0)
    (folder / "2.png").unlink()
    prepared(tmp_path, **where)
    assert "nothing to do" in capsys.readouterr().out

    # A record of an earlier version has the hash of everything in the directory.
    (folder / "unreadable").unlink()
    earlier = record | {"inputs": record["inputs"] | {"image_folder": [fingerprint(folder)]}}
    (directory / "stage.json").write_text(json.dumps(earlier))
    prepared(tmp_path, **where)
    assert "nothing to do" in capsys.readouterr().out
    for change in (record, earlier):
        (directory / "stage.json").write_text(json.dumps(change))
        save(folder / "1.png", 7)
        with pytest.raises(UserError, match="input image_folder"):
            prepared(tmp_path, **where)
        save(folder / "1.png", 1)


@pytest.mark.parametrize("inside", [True, False])
def test_of_a_benchmark_its_questions_and_images_are_compared(tmp_path, inside):
    data = tmp_path / "rad"
    images = data / "images" if inside else tmp_path / "elsewhere"
    for n in range(2):
        save(images / f"{n}.png", n)
    row = {"question": "Q?", "answer": "yes", "answer_type": "CLOSED", "phrase_type": "freeform"}
    rows = [row | {"qid": n, "image_name": f"{n}.png"} for n in range(2)]
    (data / "images").mkdir(parents=True, exist_ok=True)
    questions = data / "VQA_RAD Dataset Public.json"
    questions.write_text(json.dumps(rows))
    where = {"source": "vqa_rad", "data_path": str(data), "image_folder": str(images)}
    prepared(tmp_path, **where)
    os.mkfifo(data / "pipe")
    (data / "notes.txt").write_text("unrelated")
    save(images / "unused.png", 3)
    prepared(tmp_path, **where)
    for path, change in ((questions, json.dumps(rows[:1]).encode()), (images / "0.png", b"other")):
        before = path.read_bytes()
        path.write_bytes(change)
        with pytest.raises(UserError, match="input (data_path|image_folder)"):
            prepared(tmp_path, **where)
        path.write_bytes(before)


def test_a_window_may_be_below_zero_on_the_command_line_and_in_a_recipe():
    parser = STAGE.make_parser()
    for words in (["--window", "-600,1500"], ["--window=-600,1500"], ["--frames", "all", "--window", "-600,1500"]):
        given = read_options(words)[1][""]
        assert ImageSettings(**convert(parser, given, "medst prepare")).shown_range == (-1350, 150)
    for value, index in ((2, 1), ("2", 1), ("40,400", 0)):
        assert ImageSettings(**convert(parser, {"window": value}, "recipe")).window_index == index
    with pytest.raises(UserError, match="Unknown frames 'first'"):
        check(PrepareArguments("x", "images", data_path="y"), ImageSettings(frames="first"))
