# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The sources of VQA benchmarks have the counts that papers report, despite irregularities in their files."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from medst_trl.base.errors import UserError
from medst_trl.data.assemble import by_image, conversations_about_image, hold_out, linked_groups
from medst_trl.data.schema import text_of
from medst_trl.data.sources.vqa import SLAKE_FILES, read_pathvqa, read_slake, read_vqa_rad, read_vqa_rad_mevf


def test_counts_equal_those_that_papers_report(source, expected):
    test = [question for question in source.questions if question.split == "test"]
    kinds = Counter(question.answer_type for question in test)
    assert (len({question.images for question in test}), len(test), kinds["open"], kinds["closed"]) == expected
    assert len({question.id for question in source.questions}) == len(source.questions)
    assert all(isinstance(question.answer, str) and question.answer.strip() for question in source.questions)


# As in LLaVA-Med: images, records, open, closed.
VQA_RAD, SLAKE, PATHVQA = (203, 451, 179, 272), (96, 1061, 645, 416), (858, 6761, 3370, 3391)


@pytest.fixture(params=["vqa_rad", "vqa_rad_mevf", "slake", "pathvqa"])
def source(request, shared_data):
    directory = shared_data / request.param.removesuffix("_mevf")
    readers = {
        "vqa_rad": read_vqa_rad,
        "vqa_rad_mevf": read_vqa_rad_mevf,
        "slake": read_slake,
        "pathvqa": read_pathvqa,
    }
    return readers[request.param](directory, directory / "images")


@pytest.fixture
def expected(source):
    return {"vqa_rad": VQA_RAD, "vqa_rad_mevf": VQA_RAD, "slake": SLAKE, "pathvqa": PATHVQA}[source.name]


def test_every_record_is_accounted_for(shared_data):
    rad = read_vqa_rad(shared_data / "vqa_rad", shared_data)
    assert len(rad.questions) == 2248 and not rad.rejected
    assert sum(question.answer in ("2", "4", "12") for question in rad.questions) >= 5, (
        "numbers are not converted to text"
    )
    slake = read_slake(shared_data / "slake", shared_data)
    assert [(item.reason, item.value) for item in slake.rejected] == [("no_answer", "")]
    assert len(slake.questions) + 1 + slake.counts["questions_in_other_languages"] == 9835 + 2099 + 2094
    path = read_pathvqa(shared_data / "pathvqa", shared_data, "{split}/{img_id}.png")
    assert path.counts["images_without_questions"] == 422 + 160 + 133
    assert {question.images[0].partition("/")[0] for question in path.questions} == {"train", "val", "test"}


def test_mevf_questions_in_both_splits_are_removed_from_train(shared_data):
    source = read_vqa_rad_mevf(shared_data / "vqa_rad", shared_data)
    questions = [replace(question, image_ids=question.images) for question in source.questions]
    splits, counts, removed = hold_out(questions)
    assert counts["pairs_in_train_and_test"] == 14
    assert counts["images_in_train_and_test"] == 203
    assert len(splits["train"]) == 3064 - 22 == 3064 - len(removed) and len(splits["test"]) == 451
    disjoint, *_ = hold_out(questions, disjoint="image")
    test_images = {question.images for question in disjoint["test"]}
    assert len(test_images) == 203
    assert test_images.isdisjoint(question.images for question in disjoint["train"])


def test_mevf_links_come_from_the_release(shared_data, tmp_path):
    source = read_vqa_rad_mevf(shared_data / "vqa_rad", shared_data)
    assert source.counts["questions_without_link"] == 0
    for name in ("mevf_trainset.json", "mevf_testset.json"):
        (tmp_path / name).symlink_to(shared_data / "vqa_rad" / name)
    without_release = read_vqa_rad_mevf(tmp_path, shared_data)
    assert without_release.counts["questions_without_link"] == 0
    # Without the release, the questions that it links are linked as well if they have the same answer.
    by_id = {question.id: question for question in without_release.questions}
    missing_links = 0
    for group in _groups(question for question in source.questions if question.split == "train"):
        kinds = Counter((q.question_type, q.answer.lower()) for q in group)
        missing_links += len({by_id[q.id].link for q in group}) - len(kinds)
    assert missing_links == 0
    name = "VQA_RAD Dataset Public.json"
    (tmp_path / name).symlink_to(shared_data / "vqa_rad" / name)
    assert read_vqa_rad_mevf(tmp_path, shared_data).questions == source.questions


def test_no_conversation_reveals_an_answer(source):
    """No two turns of a conversation are paraphrases of a question, and every question is used once."""
    train = [replace(item, image_ids=item.images) for item in source.questions if item.split == "train"]
    for questions in by_image(train).values():
        conversations = conversations_about_image("x", questions)
        question_counts = Counter(
            text_of(m["content"])
            for conversation in conversations
            for m in conversation.messages
            if m["role"] == "user"
        )
        assert question_counts == Counter(question.question for question in questions)
        group_of = {q.question: n for n, group in enumerate(linked_groups(questions)) for q in group}
        for conversation in conversations:
            groups = [group_of[text_of(m["content"])] for m in conversation.messages if m["role"] == "user"]
            assert len(groups) == len(set(groups))
            images = [
                n for n, m in enumerate(conversation.messages) for part in m["content"] if part["type"] == "image"
            ]
            assert images == [0] and conversation.messages[0]["content"][0]["type"] == "image"


def _groups(questions):
    links = {}
    for question in questions:
        links.setdefault((question.images, question.link), []).append(question)
    return links.values()


def record(qid, **changes):
    return {
        "qid": qid, "image_name": "a.jpg", "question": f"Question {qid}?", "answer": "Yes", "answer_type": "CLOSED ",
        "phrase_type": "freeform", "qid_linked_id": str(qid), "question_type": "PRES",
    } | changes  # fmt: skip


def test_irregular_records_of_vqa_rad_are_read_and_bad_ones_rejected(tmp_path):
    records = [
        record(1, answer=4), record("2", phrase_type="test_para"), record(3, answer=" "), record(1),
        record(5, answer_type="MAYBE"), record(6, image_name=None), record(7, question=["x"]), {"question": "bare"},
        record(8, answer_type="  "), record(9, answer_type=None), record(10, split="test", link="own"),
        record(11, answer=float("nan")), record(12, answer=False, qid_linked_id=float("nan")),
        record(13, answer="inf"),
    ]  # fmt: skip
    (tmp_path / "VQA_RAD Dataset Public.json").write_text(json.dumps(records))
    source = read_vqa_rad(tmp_path, tmp_path)
    assert [(q.id, q.split, q.answer, q.answer_type, q.link) for q in source.questions] == [
        ("vqa_rad-1", "train", "4", "closed", "1"),
        ("vqa_rad-2", "test", "Yes", "closed", "2"),
        ("vqa_rad-10", "train", "Yes", "closed", "10"),
        ("vqa_rad-12", "train", "no", "closed", None),
    ]
    assert [item.reason for item in source.rejected] == [
        "no_answer", "duplicate_id", "bad_answer_type", "no_image", "not_text", "no_id", "bad_answer_type",
        "bad_answer_type", "no_answer", "no_answer",
    ]  # fmt: skip
    assert [item.value for item in source.rejected if item.reason == "bad_answer_type"] == ["MAYBE", "  ", None]


def test_malformed_pathvqa_entries_are_rejected(tmp_path):
    def entry(questions, labels):
        return {"img_id": "test_1", "sentf": {"pvqa": questions}, "labelf": {"pvqa": labels}}

    entries = [
        entry(["q?", " "], [{"no": 0.3, "yes": 1}, {"x": 1}]),
        entry(["q?"], []),
        {"img_id": "b"},
        entry(["q"], [{}]),
    ]
    for name in ("pvqa_train.json", "pvqa_val.json", "pvqa_test.json"):
        (tmp_path / name).write_text(json.dumps(entries))
    source = read_pathvqa(tmp_path, tmp_path)
    assert [(q.answer, q.answer_type, q.images) for q in source.questions] == [("yes", "closed", ("test_1.jpg",))] * 3
    assert Counter(item.reason for item in source.rejected) == {
        "no_question": 3, "questions_and_answers_differ_in_number": 3, "malformed_entry": 6,
    }  # fmt: skip


def test_the_error_for_a_missing_file_names_it(tmp_path):
    for reader in (read_vqa_rad, read_vqa_rad_mevf, read_slake, read_pathvqa):
        with pytest.raises(UserError, match="must hold one file"):
            reader(tmp_path, tmp_path)


def test_the_error_for_a_directory_one_level_off_names_the_right_one(tmp_path):
    for split in SLAKE_FILES.values():
        (tmp_path / "Slake1.0").mkdir(exist_ok=True)
        (tmp_path / "Slake1.0" / split.replace("*", "e")).write_text("[]")
    (tmp_path / "Slake1.0" / "imgs").mkdir()
    for given in (tmp_path, tmp_path / "Slake1.0" / "imgs"):
        with pytest.raises(UserError, match=rf"found none. Did you mean {tmp_path / 'Slake1.0'}\? Correct data_path"):
            read_slake(given, tmp_path)
