# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The examples run and produce what they describe."""

import json
import runpy
from pathlib import Path

import pytest

from medst_trl.pipeline.recipe import read_recipe


EXAMPLES = Path(__file__).parents[2] / "examples"


def _main(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_train_self_questioning_saves_an_adapter_and_asks_a_question(tmp_path):
    question = _main("train_self_questioning")(None, None, str(tmp_path), 2)
    assert question
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "chat_template.jinja").is_file()


def test_collate_questions_samples_new_questions_in_each_epoch(capsys):
    trained = _main("collate_questions")()
    assert trained["questions"][0] != trained["questions"][1]  # sampled again
    assert trained["answers"][0] == trained["answers"][1]
    assert "<vusr>" in capsys.readouterr().out


def test_score_predictions_scores_its_examples_and_a_file(tmp_path, capsys):
    scores = _main("score_predictions")()
    assert (
        scores["strict"]["closed"]["accuracy"]["value"] == 50
        and scores["llava_med"]["closed"]["accuracy"]["value"] == 100
    )
    row = {"id": "1", "answer": "yes", "answer_type": "closed", "prediction": "no"}
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert _main("score_predictions")(str(path))["strict"]["closed"]["accuracy"]["value"] == 0
    assert "no verdict" in capsys.readouterr().out


def test_train_preferences_learns_a_margin(tmp_path):
    last = _main("train_preferences")(None, None, str(tmp_path), 15)
    assert last["rewards/margins"] > 0.05
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_phantom_study_averages_over_seeds(tmp_path):
    study = runpy.run_path(str(EXAMPLES / "phantom_study.py"))
    steps = {step.label: step for step in read_recipe("phantom_study").steps()}
    assert {label.removeprefix("evaluate/") for label in steps if label.startswith("evaluate/")} == set(study["ARMS"])
    assert {f"dpo/{arm}" for arm in study["ARMS"]} - {label for label in steps if label.startswith("dpo/")} == {
        "dpo/stage_1", "dpo/all_labels",
    }  # fmt: skip
    assert {arm for arms in study["BARS"].values() for arm in arms} == set(study["ARMS"])
    directories = {}
    for seed, shift in ((1, 0.0), (2, 2.0), (3, 4.0)):
        directories[seed] = tmp_path / str(seed)
        for arm in study["ARMS"]:
            gain = 0 if arm == "stage_1" else 5 + shift
            value = {"value": 70 + 10 * shift + gain}
            scores = {"exact_match": value, "open": {"f1": value, "recall": value}, "closed": {"accuracy": value}}
            _write(directories[seed] / "evaluate" / arm / "scores.json", {"scores": {"strict": scores}})
            _write(directories[seed] / f"questions_{arm}.json", {"asked_well": 0.9, "asked_answerable": 0.8})
            log = [{"loss": 1.0} | ({"logratios/chosen": 1, "logratios/rejected": -1} if gain else {})]
            _write(study["adapter"](directories[seed], arm) / "trainer_state.json", {"log_history": log})
    results = study["collect"](directories)
    change = results["arms"]["with_sft"]["against_stage_1"]["exact_match"]
    assert change == {"mean": 7, "standard_error": pytest.approx(2 / 3**0.5), "seeds": 3}  # paired: 5, 7 and 9
    assert "chosen" not in results["arms"]["stage_1"]["values"]
    study["write_page"](results, tmp_path / "index.html")
    assert "7.0 ± 1.2" in (tmp_path / "index.html").read_text()


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_example_is_short(path):
    # A whole experiment, and the writers of several formats.
    longer = {"phantom_study": 230, "convert_predictions": 160, "convert_preferences": 160}
    assert len(path.read_text().splitlines()) <= longer.get(path.stem, 100)
