# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test that exactly those images and questions of a benchmark are counted that occur in training data."""

import json

import pytest
from datasets import Dataset, Features
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from random_images import random_image

from medst_trl.data.groups import NEAR_COPY_BITS
from medst_trl.data.images import store_image
from medst_trl.data.overlap import Inventory
from medst_trl.data.schema import dialogue, features_of
from medst_trl.evaluation.contamination import CONTAMINATION_FILE, FIGURES, Contamination, count_shared


NOTHING = {name: {"n": 0, "of": 0} for name in FIGURES}


def picture(seed: int, side: int = 96):
    """Return an image with coarse structure, as photographs and scans have it."""
    return random_image(seed, (24, 24)).resize((side, side), Image.Resampling.BICUBIC)


def stored(image) -> tuple[str, dict]:
    made = store_image(image)
    return made.image_id, {"bytes": made.bytes, "path": None}


def benchmark(images, questions=("What is this?",), groups=None) -> Dataset:
    """Make a benchmark with the same questions about each image."""
    rows = []
    for number, image in enumerate(images):
        name, file = stored(image)
        keys = dict.fromkeys(("id", "answer", "answer_type", "question_type", "link"), "x")
        asked = [keys | {"question": question} for question in questions]
        group = groups[number] if groups else None
        rows.append({"image_id": name, "image": file, "questions": asked, "group_id": group})
    return Dataset.from_list(rows, features=features_of("benchmark"))


def conversations(images, questions=("Other?",), groups=None) -> Dataset:
    rows = []
    for number, image in enumerate(images):
        name, file = stored(image)
        messages = dialogue([(question, "Yes.") for question in questions], 1)
        row = {"id": str(number), "images": [file], "image_ids": [name], "messages": messages}
        rows.append(row | {"group_id": groups[number] if groups else None})
    return Dataset.from_list(rows, features=features_of("instruct"))


def inventory(dataset, **options) -> Inventory:
    made = Inventory()
    made.add(dataset, {}, **options)
    return made


def shared(tested: Dataset, *trained: Dataset, bits: int = NEAR_COPY_BITS) -> dict[str, int]:
    training = [inventory(dataset) for dataset in trained]
    ids = {image for one in training for image in one.questions}
    return {name: figure["n"] for name, figure in count_shared(inventory(tested), training, ids, bits).items()}


def test_each_way_to_share_an_image_or_a_question_is_counted():
    one, two, three, four, other = map(picture, range(5))
    tested = benchmark([one, two, three, four], ["What is this?", "Where?"], [None, None, "aaaaaa-1", "aaaaaa-2"])
    assert shared(tested, conversations([other])) == dict.fromkeys(FIGURES, 0)
    # The same pixels; the question differs in case and spaces only.
    assert shared(tested, conversations([one], ["what  is THIS?"])) == {
        "exact": 1, "near": 0, "groups": 0, "questions": 1, "texts": 4,
    }  # fmt: skip
    # Half the size: another image id.
    assert shared(tested, conversations([two.resize((64, 64))], ["Where?", "Why?"])) == {
        "exact": 0, "near": 1, "groups": 0, "questions": 1, "texts": 4,
    }  # fmt: skip
    assert shared(tested, conversations([two.resize((64, 64))]), bits=0)["near"] == 0
    # Another image of the same patient.
    assert shared(tested, conversations([other], ["Where?"], ["aaaaaa-1"])) == {
        "exact": 0, "near": 0, "groups": 1, "questions": 1, "texts": 4,
    }  # fmt: skip
    # In two datasets, one of them with everything: each image is counted once.
    both = (
        conversations([one]),
        conversations([one, two.resize((64, 64)), other], ["Where?"], [None, None, "aaaaaa-2"]),
    )
    assert shared(tested, *both) == {"exact": 1, "near": 1, "groups": 1, "questions": 3, "texts": 4}


def test_groups_of_another_salt_are_told_apart():
    made = inventory(conversations([picture(0), picture(1), picture(2)], ["Why?"], ["aaaaaa-1", "bbbbbb-1", None]))
    assert made.salts == {"aaaaaa", "bbbbbb"} and len(set().union(*made.members.values())) == 2
    own = inventory(conversations([picture(0), picture(1)], ["Why?"], ["P1", "P2"]))
    assert own.salts == {""}  # never hashed, so they can be compared


def test_a_copy_of_one_test_image_says_nothing_about_the_questions_of_another():
    one, two = random_image(0), random_image(1)
    trained = conversations([one], ["Is it normal?"])
    assert shared(benchmark([one, two], ["Is it normal?"], None), trained)["questions"] == 1


def test_rows_of_other_images_are_left_out():
    images = [random_image(seed) for seed in range(3)]
    names = [stored(image)[0] for image in images]
    trained = inventory(conversations(images, ["A?"]), only={names[1]})
    assert set(trained.questions) == {names[1]} == set(trained.hashes)


def test_preference_pairs_and_text_without_images_are_compared():
    image = random_image(0)
    name, file = stored(image)
    [asked, answer] = dialogue([("Where?", "Left.")], 1)
    pair = {"image_ids": [name], "images": [file], "prompt": [asked], "chosen": [answer], "rejected": [answer]}
    figures = count_shared(
        inventory(benchmark([image], ["Where?", "Why?"])), [inventory(Dataset.from_list([pair]))], {name}, 0
    )
    assert figures["questions"] == {"n": 1, "of": 2} and figures["exact"] == {"n": 1, "of": 1}
    text = {"image_ids": [], "images": [], "messages": dialogue([("Why?", "So.")], 0)}
    features = {key: value for key, value in features_of("instruct").items() if key in text}
    trained = Dataset.from_list([text], features=Features(features))
    assert shared(benchmark([image], ["Why?"]), trained) | {"texts": 1} == dict.fromkeys(FIGURES, 0) | {"texts": 1}


def test_no_image_is_decoded_if_its_hash_is_known(monkeypatch):
    image = random_image(0)
    name, _ = stored(image)
    monkeypatch.setattr("medst_trl.data.overlap.hash_images", None)
    made = Inventory()
    made.add(conversations([image]), {name: "ab" * 32})
    assert made.hashes == {name: "ab" * 32}


IDS, GROUPS, TEXTS = st.sampled_from("abcdef"), st.sampled_from(["1-g", "1-h", "2-g"]), st.sampled_from("xyz")


@st.composite
def inventories(draw):
    made = Inventory()
    for image in draw(st.sets(IDS)):
        made.questions[image] += draw(st.lists(TEXTS, max_size=3))
        made.texts.update(made.questions[image])
        for group in draw(st.sets(GROUPS, max_size=2)):
            made.members[group].add(image)
        if (bits := draw(st.none() | st.integers(0, 2**256 - 1) | st.integers(0, 255))) is not None:
            made.hashes[image] = f"{bits:064x}"
    return made


@given(inventories(), st.lists(inventories(), max_size=3), st.sets(IDS), st.integers(0, 20))
def test_the_figures_are_those_of_the_definition(tested, training, ids, bits):
    def is_near(one, other):
        return (
            bool(bits)
            and one is not None
            and other is not None
            and (int(one, 16) ^ int(other, 16)).bit_count() <= bits
        )

    found = dict.fromkeys(FIGURES, 0)
    for image, texts in tested.questions.items():
        near, grouped, related = False, False, {image}
        for one in training:
            for other in one.questions:
                is_copy = other != image and is_near(tested.hashes.get(image), one.hashes.get(other))
                shared = tested.members.keys() & one.members.keys()
                same_group = any(image in tested.members[name] and other in one.members[name] for name in shared)
                near, grouped = near or is_copy, grouped or same_group
                related |= {other} if is_copy or same_group else set()
        known = {text for one in training for other in related for text in one.questions.get(other, ())}
        found["exact"] += image in ids
        found["near"] += near and image not in ids
        found["groups"] += grouped
        found["questions"] += sum(text in known for text in texts)
        found["texts"] += sum(any(text in one.texts for one in training) for text in texts)
    figures = count_shared(tested, training, ids, bits)
    assert {name: figure["n"] for name, figure in figures.items()} == found
    assert all(figure["n"] <= figure["of"] for figure in figures.values())


def content(**figures) -> dict:
    figures = {name: {"n": 0, "of": 5} for name in FIGURES} | figures
    one = {"path": "runs/a", "sha256": "ab", "stage": "sft", "images": 1200, "not_checked": {"near": "it is gone"}}
    two = {"hub_id": "org/m", "stage": None, "images": 3, "not_checked": {"near": "it is gone", "groups": "salt"}}
    return {"figures": figures, "compared": [one, two]}


def test_the_result_is_described_for_readers(tmp_path):
    made = Contamination(content(near={"n": None, "of": 5}, exact={"n": 2, "of": 1500}))
    assert dict(made.rows()) == {
        "exact copies": "2 of 1,500 images",
        "near copies": "not checked",
        "same group": "0 of 5 images (not checked for 1 of 2 sources)",
        "same question and image": "0 of 5 questions",
        "same question alone": "0 of 5 questions",
    }
    assert list(made.sources(lambda source: source.get("hub_id", "a directory"))) == [
        "training data of sft, a directory: 1,200 images; not checked: near copies (it is gone)",
        "model org/m: 3 images; not checked: near copies (it is gone); not checked: same group (salt)",
    ]
    assert made.is_contaminated and str(made).startswith("Warning:") and "exact copies 2 of 1,500 images" in str(made)
    assert not str(made).count("\n")


def test_figures_that_leave_out_plain_images_say_so():
    rows = dict(Contamination(content(exact={"n": 0, "of": 12}, near={"n": 0, "of": 3})).rows())
    assert rows["near copies"] == "0 of 3 images (9 images too plain to compare) (not checked for 2 of 2 sources)"
    assert rows["same question and image"] == "0 of 5 questions (9 images too plain to compare)"
    assert "plain" not in rows["same question alone"] + rows["same group"]


def test_common_questions_alone_are_no_warning():
    made = Contamination(content(texts={"n": 5, "of": 5}))
    assert not made.is_contaminated and str(made).startswith("Contamination: exact copies 0 of 5 images")


def test_nothing_known_is_no_warning():
    figures = {name: {"n": None, "of": 0} for name in FIGURES}
    made = Contamination({"figures": figures, "compared": []})
    assert str(made) == "Contamination: not checked, no training data of the model is known."
    assert {text for _, text in made.rows()} == {"not checked"}


@pytest.mark.parametrize(
    "damaged",
    [
        "", "[]", "{}", '{"figures": {}, "compared": []}', json.dumps(content() | {"figures": 3}),
        json.dumps(content(exact={"n": 3})),
    ],
)  # fmt: skip
def test_a_damaged_file_counts_as_missing(tmp_path, damaged):
    (tmp_path / CONTAMINATION_FILE).write_text(damaged)
    assert Contamination.read(tmp_path / CONTAMINATION_FILE) is None
    assert Contamination.read(tmp_path / "missing.json") is None
