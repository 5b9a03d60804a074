# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test how preference files of other projects are read and rejected, and how the example writes them."""

import json
import runpy
from pathlib import Path

import pytest
from PIL import Image
from random_images import random_image

from medst_trl.base.errors import UserError
from medst_trl.data.conform import conform
from medst_trl.data.images import FolderImages, image_id
from medst_trl.data.loading import load_records
from medst_trl.interop.preference_files import FORMATS, read_preference_file
from medst_trl.selftrain.preferences import select_preferences


EXAMPLE = Path(__file__).parents[2] / "examples" / "convert_preferences.py"
example = runpy.run_path(str(EXAMPLE))
write_preferences, write_preference_file = example["write_preferences"], example["write_preference_file"]


def small_image(seed: int) -> Image.Image:
    return random_image(seed, (8, 8))


@pytest.fixture
def images(tmp_path):
    directory = tmp_path / "images"
    (directory / "deeper").mkdir(parents=True)
    small_image(0).save(directory / "jones_1957.png")
    small_image(1).save(directory / "deeper" / "b.jpg", comment="Jane Jones")
    return directory


def record(
    id_, format="stllava_med", image="jones_1957.png", question="<image>\nWhat?", chosen="Yes", rejected="No", **more
):
    conversations = [
        [{"from": "human", "value": question}, {"from": "gpt", "value": answer}] for answer in (chosen, rejected)
    ]
    return {"id": id_, "image": image, **dict(zip(FORMATS[format], conversations, strict=True)), **more}


def read(tmp_path, records, images):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(records))
    return read_preference_file(path, images)


def without_file_names(pairs):
    return [{key: value for key, value in pair.items() if key != "images"} for pair in pairs]


@pytest.mark.parametrize("format", FORMATS)
def test_a_round_trip_changes_nothing(tmp_path, images, format):
    records = [
        record(0, format, chosen=" Yes", weighted_score=0.8),
        record("b", format, "deeper/b.jpg", "Look: <image>\nWhat is <vusr>?", "left </s> \U0001fac1", "<image> right"),
        record("c", format, ["jones_1957.png", "deeper/b.jpg"], "<image>\nand\n<image>\nWhich is\ndarker?"),
        record("d", format, None, "What is CT?"),
    ]
    for turns in (records[1][key] for key in FORMATS[format]):  # an earlier turn
        turns[:0] = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello."}]
    file = read(tmp_path, records, images)
    assert not file.rejected
    assert file.pairs[0]["image_ids"] == [image_id(small_image(0))]
    assert file.pairs[0]["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}]
    assert json.loads(file.pairs[0]["judge"]) == {"source": format, "weighted_score": 0.8}

    write_preferences(tmp_path / "dataset", select_preferences(file.pairs), file)
    dataset = load_records(tmp_path / "dataset", "train")
    assert conform(dataset, "preferences") is dataset
    assert [image_id(image) for image in dataset[2]["images"]] == dataset[2]["image_ids"]

    write_preference_file(dataset, tmp_path / "back.json", tmp_path / "images_back", format)
    reread = read_preference_file(tmp_path / "back.json", tmp_path / "images_back")
    assert not reread.rejected
    expected = without_file_names(file.pairs)
    # A placeholder in an answer is removed, because other projects insert an image for it.
    expected[1]["rejected"][0]["content"][0]["text"] = "image right"
    for pair in expected if format == "mmedpo" else ():
        pair["judge"] = json.dumps({"weighted_score": 1.0} | json.loads(pair["judge"]))
    assert [pair | {"judge": json.loads(pair["judge"])} for pair in without_file_names(reread.pairs)] == [
        pair | {"judge": {**json.loads(pair["judge"])} if format == "mmedpo" else {"source": format}}
        for pair in expected
    ]


@pytest.mark.parametrize("key", ["images", "Image", "IMAGE "])
def test_names_of_keys_are_read_as_by_prepare(tmp_path, images, key):
    other = record("a", note="x")
    file = read(tmp_path, [{key if name == "image" else name: value for name, value in other.items()}], images)
    assert file.pairs[0]["images"] == ["jones_1957.png"] and file.notes == {"columns_not_used": "note"}


def test_file_names_and_image_metadata_are_not_published(tmp_path, images):
    file = read(tmp_path, [record("jones_1957.png"), record("x", image="deeper/b.jpg")], images)
    write_preferences(tmp_path / "dataset", select_preferences(file.pairs, file.rejected), file)
    [parquet] = (tmp_path / "dataset").glob("*.parquet")
    assert b"ones" not in parquet.read_bytes() and b"b.jpg" not in parquet.read_bytes()


def test_unusable_records_are_rejected_with_a_reason(tmp_path, images):
    (images / "broken.png").write_bytes((images / "jones_1957.png").read_bytes()[:60])
    (images.parent / "secret.png").write_bytes((images / "jones_1957.png").read_bytes())
    other_prompt = record("prompt")
    other_prompt["reject_conversations"][0]["value"] = "<image>\nWho?"
    no_answer = record("cut")
    no_answer["chosen_conversations"].pop()
    records = [
        record("good"),
        record("equal", chosen=" Yes", rejected="Yes\n"),
        other_prompt,
        no_answer,
        record("gone", image="none.png"),
        record("broken", image="broken.png"),
        record("outside", image="../secret.png"),
        record("empty", rejected=" "),
        record("two", question="<image><image>What?"),
        record("score", "mmedpo", weighted_score="high"),
        record("infinite", "mmedpo", weighted_score=float("inf")),
        record("good"),
        {"id": "llava", "image": "jones_1957.png", "conversations": []},
        "text",
    ]
    file = read(tmp_path, records, images)
    assert [pair["id"] for pair in file.pairs] == ["good"]
    assert [(item.id, item.reason) for item in file.rejected] == [
        ("equal", "chosen_equals_rejected"), ("prompt", "different_prompts"), ("cut", "ends_with_question"),
        ("gone", "missing"), ("broken", "truncated"), ("outside", "outside_image_folder"), ("empty", "empty_turn"),
        ("two", "placeholder_mismatch"), ("score", "bad_score"), ("infinite", "bad_score"), ("good", "duplicate_id"),
        ("llava", "not_a_preference_pair"), ("pairs.json#13", "not_an_object"),
    ]  # fmt: skip


def test_each_image_is_read_once_whether_it_can_be_used_or_not(tmp_path, images, monkeypatch):
    (images / "broken.png").write_bytes((images / "jones_1957.png").read_bytes()[:60])
    read_images, load = [], FolderImages.load
    monkeypatch.setattr(FolderImages, "load", lambda self, name: read_images.append(name) or load(self, name))
    records = [record(f"{name} {n}", image=name) for name in ("broken.png", "jones_1957.png") for n in range(3)]
    file = read(tmp_path, records, images)
    assert [item.reason for item in file.rejected] == 3 * ["truncated"] and len(file.pairs) == 3
    assert read_images == ["broken.png", "jones_1957.png"]


def test_a_malformed_record_does_not_affect_others(tmp_path, images):
    text = json.dumps([record(name) for name in "abc"], indent=1)
    (tmp_path / "pairs.json").write_text(text.replace('"id": "b",', '"id": b",'))
    file = read_preference_file(tmp_path / "pairs.json", images)
    assert [pair["id"] for pair in file.pairs] == ["a", "c"]
    assert [item.reason for item in file.rejected] == ["malformed_json"]


def test_a_file_without_usable_pairs_is_refused(tmp_path, images):
    file = read(tmp_path, [record("equal", rejected="Yes"), record("gone", image="none.png")], images)
    with pytest.raises(UserError, match="1 chosen_equals_rejected, 1 missing"):
        write_preferences(tmp_path / "dataset", select_preferences(file.pairs, file.rejected), file)
    assert len((tmp_path / "dataset" / "rejected.jsonl").read_text().splitlines()) == 2


def test_invalid_arguments_are_refused(tmp_path, images):
    with pytest.raises(UserError, match="image_folder"):
        read_preference_file(tmp_path / "pairs.json", tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be read"):
        read_preference_file(tmp_path / "pairs.json", images)
    with pytest.raises(UserError, match="stllava_med, mmedpo"):
        write_preference_file(None, tmp_path / "x.json", images, "csv")


def test_pairs_of_mmedpo_are_unchanged_by_a_round_trip(tmp_path, shared_data):
    path = shared_data / "preference_pairs" / "mmedpo_vqa-rad_dpo_weighted.json"
    originals = json.loads(path.read_text())
    file = read_preference_file(path, shared_data / "vqa_rad" / "images")
    assert len(file.pairs) == len(originals) == 1797 and not file.rejected
    write_preferences(tmp_path / "dataset", select_preferences(file.pairs, duplicate_similarity=None), file)
    dataset = load_records(tmp_path / "dataset", "train")
    write_preference_file(dataset, tmp_path / "back.json", tmp_path / "images", "mmedpo")
    reread = read_preference_file(tmp_path / "back.json", tmp_path / "images")
    assert without_file_names(reread.pairs) == without_file_names(file.pairs)
    for written, original in zip(json.loads((tmp_path / "back.json").read_text()), originals, strict=True):
        for turn in (*original["conversations"], *original["rejected_conversations"]):
            turn["value"] = turn["value"].strip()
        assert written | {"image": None} == original | {"image": None, "id": str(original["id"])}
    assert len(list((tmp_path / "images").iterdir())) == len(
        {image for pair in file.pairs for image in pair["image_ids"]}
    )


def test_pairs_that_share_an_id_are_renamed_and_copies_rejected(tmp_path, images):
    """As in MMedPO's files, which were merged from several sources."""
    records = [record("1", "mmedpo", question=f"<image>\nWhat {n}?") for n in (0, 1, 0, 2)]
    file = read(tmp_path, records, images)
    assert [pair["id"] for pair in file.pairs] == ["1", "1-2", "1-3"]
    assert [(item.id, item.reason) for item in file.rejected] == [("1", "duplicate_id")]


def test_pairs_of_ones_own_are_written_from_their_files(tmp_path, images):
    small_image(0).save(images / "jones.tif", description="PATIENT JONES")
    pair = {"image": "images/jones.tif", "prompt": "What?", "chosen": "Yes", "rejected": "No"}
    (tmp_path / "own.jsonl").write_text(json.dumps(pair))
    dataset = load_records(tmp_path / "own.jsonl", "train", "preferences", identify=False)
    write_preference_file(dataset, tmp_path / "back.json", tmp_path / "images_back")
    [record] = json.loads((tmp_path / "back.json").read_text())
    assert record["image"] == f"{image_id(small_image(0))}.png"
    written = (tmp_path / "images_back" / record["image"]).read_bytes()
    assert written.startswith(b"\x89PNG") and b"JONES" not in written
