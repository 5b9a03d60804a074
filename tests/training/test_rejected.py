# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Data of which nothing, or not much, can be trained on is noticed before the first step."""

import logging
from pathlib import Path

import pytest
import tiny_dpo
import tiny_run
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from medst_trl import SelfQuestioningConfig, SelfQuestioningTrainer
from medst_trl.base.errors import UserError
from medst_trl.training.collator import DataCollatorForSelfQuestioning
from medst_trl.training.preference_collator import DataCollatorForMultimodalPreference, usable_pairs
from medst_trl.training.rejected import check_conversations


SHORT, LONG = "It is dark.", "It is " + "very " * 150 + "dark."


def conversation(number: int, answer: str) -> dict:
    row = tiny_run.conversation(number, turns=1)
    row["messages"][1]["content"] = tiny_run.text(answer)
    return row


@pytest.fixture(scope="module")
def pair_processor():
    return tiny_run.small_policy()[1]


def stream(rows: list[dict]):
    return Dataset.from_list(rows).to_iterable_dataset()


def trainer_of(output_dir: Path, train_dataset, eval_dataset=None, **settings) -> SelfQuestioningTrainer:
    model, processor = tiny_run.small_policy()
    return SelfQuestioningTrainer(
        model=model,
        args=SelfQuestioningConfig(output_dir=str(output_dir), max_length=100, max_steps=1, **settings),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
    )


@pytest.fixture(scope="module")
def collator():
    return DataCollatorForSelfQuestioning(tiny_run.small_policy()[1], max_length=100)


@pytest.mark.parametrize("kind", [Dataset.from_list, stream])
@pytest.mark.parametrize("settings", [{}, {"pack_sequences": True}, {"train_sampling_strategy": "group_by_length"}])
def test_training_on_nothing_is_refused_before_the_first_step(tmp_path, kind, settings):
    rows = [conversation(number, LONG) for number in range(6)]
    with pytest.raises(UserError, match="train dataset can be used: 6 because.*=100 tokens. Raise max_length"):
        trainer_of(tmp_path, kind(rows), **settings)


def test_an_evaluation_set_without_anything_to_evaluate_is_refused(tmp_path):
    good, bad = ([conversation(number, answer) for number in range(3)] for answer in (SHORT, LONG))
    with pytest.raises(UserError, match="the eval dataset can be used"):
        trainer_of(tmp_path, stream(good), stream(bad))
    with pytest.raises(UserError, match="the eval_late dataset can be used"):
        trainer_of(tmp_path, stream(good), {"early": stream(good), "late": stream(bad)})


@pytest.mark.parametrize("kind", [Dataset.from_list, stream])
def test_one_example_that_fits_is_enough(collator, kind):
    rows = [conversation(number, LONG) for number in range(130)]
    with pytest.raises(UserError, match="130 because"):
        check_conversations(kind(rows), collator, "train")
    check_conversations(kind([*rows, conversation(130, SHORT)]), collator, "train")


@pytest.mark.parametrize("rejected, warns", [(0, False), (2, False), (3, True)])
def test_more_than_a_fifth_rejected_is_a_warning(collator, caplog, rejected, warns):
    rows = [conversation(number, LONG if number < rejected else SHORT) for number in range(10)]
    with caplog.at_level(logging.WARNING):
        check_conversations(Dataset.from_list(rows), collator, "train")
    assert ("30% of the conversations checked in the train dataset are rejected: 3 because" in caplog.text) == warns


def answered(number: int, chosen: str, rejected: str) -> dict:
    row = tiny_dpo.pair(number)
    row["chosen"][0]["content"], row["rejected"][0]["content"] = tiny_run.text(chosen), tiny_run.text(rejected)
    return row


@given(words=st.tuples(st.integers(1, 60), st.integers(1, 60)), max_length=st.integers(1, 130))
def test_a_pair_is_rejected_if_less_than_half_of_an_answer_fits(pair_processor, words, max_length):
    answers = "very " * words[0] + "dark", "so " * words[1] + "bright"
    dataset = Dataset.from_list([answered(0, *answers), answered(1, "a", "b")])
    assert usable_pairs(dataset, pair_processor, None).rejected_records == {}
    masks = DataCollatorForMultimodalPreference(pair_processor)([dataset[0]])["completion_mask"]
    fits = all(2 * mask[:max_length].sum() >= mask.sum() for mask in masks)
    try:
        rejected = usable_pairs(dataset, pair_processor, max_length).rejected_records
    except UserError as error:
        assert "Raise max_length" in str(error)
        rejected = {"p0": "too_long"}
    assert ("p0" in rejected) != fits


def test_pairs_with_too_little_room_are_warned_of(pair_processor, caplog):
    rows = [answered(number, LONG if number < 3 else SHORT, "bright") for number in range(10)]
    with caplog.at_level(logging.WARNING):
        pairs = usable_pairs(Dataset.from_list(rows), pair_processor, 100)
    assert pairs.rejected_records == dict.fromkeys(["p0", "p1", "p2"], "too_long")
    assert "30% of the preference pairs checked in the train dataset are rejected" in caplog.text


@pytest.mark.parametrize("settings", [{}, {"share_prefix": False}, {"precompute_ref_log_probs": True}])
def test_stage_2_does_not_train_on_the_beginning_of_an_answer(tmp_path, settings):
    rows = [answered(number, LONG if number == 0 else SHORT, "bright") for number in range(8)]
    trainer = tiny_dpo.make_trainer(tmp_path, rows=rows, max_length=100, max_steps=1, **settings)
    assert trainer.rejected_records == {"p0": "too_long"} and len(trainer.train_dataset) == 7
    trainer.train()
    with pytest.raises(UserError, match="No preference pair.*Raise max_length"):
        tiny_dpo.make_trainer(Path(tmp_path, "none"), rows=rows[:1], max_length=100, max_steps=1, **settings)
