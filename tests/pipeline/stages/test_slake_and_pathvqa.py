# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Real records of SLAKE and PathVQA with synthetic images, from `prepare` to the scores."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_dataset
from random_images import random_image

from medst_trl.base.files import write_json
from medst_trl.base.fingerprints import fingerprint
from medst_trl.data.loading import load_records
from medst_trl.data.sources.vqa import PATHVQA_FILES, SLAKE_FILES, PathVqaSettings, SlakeSettings
from medst_trl.evaluation.vqa import questions_of
from medst_trl.pipeline.lineage import check_contamination
from medst_trl.pipeline.stages import evaluate, prepare


def write_images(directory: Path, names) -> None:
    """Write a different image for each file name."""
    for number, name in enumerate(sorted(set(names))):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(number, (24, 24)).save(path)  # JPEG makes colors equal that are almost equal


@pytest.fixture(scope="module")
def slake(shared_data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("slake")
    records = {}
    for split, pattern in SLAKE_FILES.items():
        (source,) = (shared_data / "slake").glob(pattern)
        rows = json.loads(source.read_text(encoding="utf-8"))
        records[split] = rows[-20:] + rows[:40]  # Chinese questions follow the English ones
        (directory / f"{split}.json").write_text(json.dumps(records[split]))  # the file names of the copy on the Hub
    write_images(directory / "imgs", [record["img_name"] for rows in records.values() for record in rows])
    prepare.main(
        prepare.PrepareArguments(
            output_dir=str(directory / "out"),
            source="slake",
            data_path=str(directory),
            image_folder=str(directory / "imgs"),
        )
    )
    return directory, records["test"]


@pytest.fixture(scope="module")
def pathvqa(shared_data, tmp_path_factory):
    directory, names = tmp_path_factory.mktemp("pathvqa"), []
    for split, pattern in PATHVQA_FILES.items():
        (source,) = (shared_data / "pathvqa").glob(pattern)
        records = json.loads(source.read_text(encoding="utf-8"))[:12]
        (directory / source.name).write_text(json.dumps(records))
        short = "val" if split == "validation" else split
        names += [f"{short}/{record['img_id']}.png" for record in records]
    write_images(directory / "images", names)
    prepare.main(
        prepare.PrepareArguments(
            output_dir=str(directory / "out"), source="pathvqa", data_path=str(directory),
            image_folder=str(directory / "images"),
        ),
        PathVqaSettings(image_pattern="{split}/{img_id}.png"),
    )  # fmt: skip
    return directory


def scores_of(directory, predictions, **arguments):
    out = directory / predictions.stem
    arguments = {"benchmark": str(directory / "out" / "benchmark"), "bootstrap_samples": 20} | arguments
    evaluate.main(evaluate.EvaluateArguments(predictions=str(predictions), output_dir=str(out), **arguments))
    return json.loads((out / "scores.json").read_text())


def test_slake_predictions_of_medevalkit_are_scored(slake):
    """MedEvalKit asks the questions of both languages in file order. Our benchmark has only the English ones."""
    directory, records = slake
    keys = {"question": "question", "answer": "answer", "answer_type": "answer_type", "lang": "q_lang"}
    results = [
        {ours: record[theirs] for ours, theirs in keys.items()} | {"response": record["answer"].upper() + "."}
        for record in records
    ]
    (directory / "results.json").write_text(json.dumps(results, ensure_ascii=False))
    english = [record for record in records if record["q_lang"] == "en"]
    content = scores_of(directory, directory / "results.json")
    assert 0 < len(english) < len(records)
    assert content["counts"]["records"] == content["scores"]["strict"]["n"] == len(english)
    assert content["counts"]["rejected"] == {"not in English": len(records) - len(english)}
    assert content["scores"]["strict"]["exact_match"]["value"] == 100
    assert content["scores"]["strict"]["n_images"] == len({record["img_name"] for record in english})
    assert content["scores"]["strict"]["question_types"].keys() == {record["content_type"] for record in english}
    for kind in ("open", "closed"):
        of_kind = [record for record in english if record["answer_type"].lower() == kind]
        figure = content["scores"]["llava_med"][kind]["accuracy" if kind == "closed" else "recall"]
        assert figure["n"] == len(of_kind)


def test_pathvqa_predictions_of_vlmevalkit_are_scored(pathvqa):
    questions = questions_of(load_dataset(str(pathvqa / "out" / "benchmark"), split="test"))
    assert len(questions) > 10 and len({question["image_id"] for question in questions}) > 3
    path = pathvqa / "model_PathVQA_TEST.tsv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL)
        writer.writerow(["index", "question", "answer", "prediction"])
        for number, question in enumerate(questions):
            prediction = question["answer"] if question["answer_type"] == "closed" else "I do not know"
            writer.writerow([number, question["question"], question["answer"], prediction])
    content = scores_of(pathvqa, path)
    assert content["format"] == "vlmevalkit" and content["counts"]["rejected"] == {}
    assert content["scores"]["strict"]["closed"]["accuracy"]["value"] == 100
    answers = [question["answer"].lower() for question in questions if question["answer_type"] == "open"]
    assert content["scores"]["strict"]["open"]["exact_match"] == {
        "value": 0, "n": len(answers), "interval": [0, 0],
        "majority": pytest.approx(100 * Counter(answers).most_common(1)[0][1] / len(answers)),
    }  # fmt: skip
    # The scores are the same without the benchmark, because PathVQA's closed questions are its yes/no questions. Only
    # the images are unknown.
    path = path.rename(path.with_name("without_benchmark.tsv"))
    without_benchmark = scores_of(pathvqa, path, benchmark=[])
    assert without_benchmark["counts"]["answer_types_guessed"] == len(questions)
    assert (
        without_benchmark["scores"]["strict"]["closed"]["accuracy"]["n"]
        == content["scores"]["strict"]["closed"]["accuracy"]["n"]
    )
    assert without_benchmark["scores"]["strict"]["n_images"] is None


def test_english_test_images_in_chinese_training_questions_are_found(shared_data, tmp_path):
    """
    The halves of SLAKE share images, and each is prepared in a run of its own. The images are drawn, one per name.
    """
    data, images = tmp_path / "data", tmp_path / "imgs"
    data.mkdir()
    by_split = {}
    for split, pattern in SLAKE_FILES.items():
        (source,) = (shared_data / "slake").glob(pattern)
        by_split[split] = json.loads(source.read_text(encoding="utf-8"))
        shutil.copy(source, data / f"{split}.json")
    write_images(images, [record["img_name"] for rows in by_split.values() for record in rows])
    for language in ("zh", "en"):
        arguments = {"source": "slake", "data_path": str(data), "image_folder": str(images)}
        out = str(tmp_path / language)
        prepare.main(prepare.PrepareArguments(output_dir=out, **arguments), SlakeSettings(language=language))
    (tmp_path / "sft").mkdir()
    sources = {"dataset": [fingerprint(tmp_path / "zh" / "instruct")]}
    write_json(tmp_path / "sft" / "stage.json", {"stage": "sft", "status": "complete", "inputs": sources})

    place = tmp_path / "en" / "benchmark"
    [found] = check_contamination(str(tmp_path / "sft"), [(place, load_records(place, "test"))])
    names = {
        (language, split): {row["img_name"] for row in by_split[split] if row["q_lang"] == language}
        for language, split in (("en", "test"), ("zh", "train"))
    }
    assert len(names["en", "test"] & names["zh", "train"]) == 72
    assert found["figures"]["exact"] == {"n": 72, "of": 96}
    assert found["figures"]["questions"]["n"] == 0  # in another language
