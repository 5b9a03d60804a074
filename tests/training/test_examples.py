# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Images are checked as they are stored. Data of which nothing, or not much, can be trained on is noticed before the
first step. A batch without images still runs the vision tower and keeps its outputs.
"""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import tiny_dpo
import tiny_run
import torch
from datasets import Dataset
from datasets.features.image import Image as ImageFeature
from families import prepared_processor
from family_models import MODELS, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from medst_trl import SelfQuestioningConfig, SelfQuestioningTrainer
from medst_trl.base.errors import UserError
from medst_trl.policy.families import model_parts
from medst_trl.policy.loading import prepare_policy
from medst_trl.training.collator import DataCollatorForSelfQuestioning, usable_conversations
from medst_trl.training.encoding import IGNORED
from medst_trl.training.examples import UnreadableImage, check_image, usable_examples
from medst_trl.training.preference_collator import DataCollatorForMultimodalPreference, usable_pairs
from medst_trl.training.upstream import encode_blank_images


PIXELS = np.random.default_rng(0).integers(0, 255, (40, 24, 3), dtype=np.uint8)
FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "JPEG2000", "MPO"]
SHORT, LONG = "It is dark.", "It is " + "very " * 150 + "dark."


# --- Images ----------------------------------------------------------------------------------------------------------


def encoded_image(kind: str, orientation: int | None = None) -> dict:
    file, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x112] = orientation
    Image.fromarray(PIXELS).save(file, kind, exif=exif)
    return {"bytes": file.getvalue(), "path": None}


def saved_to_file(image: dict, directory) -> dict:
    (directory / "image").write_bytes(image["bytes"])
    return {"bytes": None, "path": str(directory / "image")}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_image_size_equals_the_size_of_the_decoded_image(tmp_path, kind, orientation):
    image = encoded_image(kind, orientation)
    decoded = ImageFeature().decode_example(image)
    assert check_image(image) == check_image(saved_to_file(image, tmp_path)) == check_image(decoded) == decoded.size
    assert decoded.size == ((40, 24) if orientation in (6, 8) and kind not in ("BMP", "JPEG2000") else (24, 40))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_size_of_common_formats_is_read_without_decoding(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    in_memory = encoded_image(kind)
    for image in (in_memory, saved_to_file(in_memory, tmp_path)):
        assert check_image(image) == (24, 40)


def test_exif_after_the_pixels_of_a_png_is_read():
    data, rotated = encoded_image("PNG")["bytes"], encoded_image("PNG", 6)["bytes"]
    start = rotated.index(b"eXIf") - 4
    chunk = rotated[start : start + 12 + int.from_bytes(rotated[start : start + 4])]
    image = {"bytes": data[:-12] + chunk + data[-12:], "path": None}
    assert check_image(image) == ImageFeature().decode_example(image).size == (40, 24)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fraction", [0.95, 0.5, 0.02])
def test_a_truncated_image_is_reported(tmp_path, kind, fraction):
    truncated = encoded_image(kind)
    check_image(truncated)
    truncated["bytes"] = truncated["bytes"][: int(len(truncated["bytes"]) * fraction)]
    for image in (truncated, saved_to_file(truncated, tmp_path)):
        try:
            ImageFeature().decode_example(image)
        except Exception:
            with pytest.raises(UnreadableImage, match="cannot be read"):
                check_image(image)
        else:
            assert kind == "JPEG2000"  # some versions of OpenJPEG decode a part of an image
            check_image(image)


def test_bytes_after_the_end_of_an_image_are_accepted():
    image = encoded_image("JPEG")
    check_image({**image, "bytes": image["bytes"] + b"a note of the scanner"})


@pytest.mark.parametrize(
    "image",
    [{"bytes": b"", "path": None}, {"bytes": None, "path": "/no/such.png"}, {"bytes": None, "path": None}, None],
)
def test_data_that_is_not_an_image_is_reported(image):
    with pytest.raises(UnreadableImage, match="cannot be read"):
        check_image(image)


def test_an_error_in_the_check_of_pairs_rejects_no_image(monkeypatch):
    def with_a_bug(image):
        raise TypeError("a bug")

    monkeypatch.setattr("medst_trl.training.examples.check_image", with_a_bug)
    monkeypatch.setattr("medst_trl.training.collator.with_decoded_images", with_a_bug)
    processor = prepared_processor("vicuna")
    example, pairs = tiny_run.conversation(0), Dataset.from_list([tiny_dpo.pair(0)])
    for run in (
        lambda: usable_conversations(Dataset.from_list([example]), DataCollatorForSelfQuestioning(processor)),
        lambda: usable_pairs(pairs, processor, None),
        lambda: DataCollatorForSelfQuestioning(processor)([example]),
    ):
        with pytest.raises(TypeError, match="a bug"):
            run()


@pytest.mark.parametrize("family", MODELS)
def test_every_family_encodes_a_blank_image_without_changing_its_outputs(family):
    model, processor = tiny_model(family)
    prepare_policy(model, processor).train()
    collator = DataCollatorForSelfQuestioning(processor)
    with_image, without = (collator([tiny_run.conversation(number, with_image=number == 0)]) for number in (0, 1))
    for batch in (with_image, without):
        batch.pop("question_mask")
    with torch.no_grad():
        expected = [model(**batch).logits for batch in (with_image, without)]
    encode_blank_images(model, processor)

    parts, calls = model_parts(model), []
    model.get_submodule(parts.vision_tower).register_forward_pre_hook(lambda *_: calls.append(True))
    for batch, logits in zip((with_image, without, without), [*expected, expected[1]]):
        model.zero_grad()
        output = model(**batch)
        assert torch.equal(output.logits, logits)
        output.loss.backward()
    assert len(calls) == 3  # once per batch, with or without an image
    gradients = {"vision": [], "projector": [], "language": []}
    for name, parameter in model.named_parameters():
        gradients[parts.part_of(name)].append(parameter.grad)
    assert all(gradient is not None and not gradient.any() for gradient in gradients["projector"])
    existing = [gradient for gradient in gradients["vision"] if gradient is not None]
    assert len(existing) > len(gradients["vision"]) / 2 and not any(gradient.any() for gradient in existing)
    assert any(gradient is not None and gradient.any() for gradient in gradients["language"])


# --- Rejected examples -----------------------------------------------------------------------------------------------


def conversation(number: int, answer: str) -> dict:
    row = tiny_run.conversation(number, turns=1)
    row["messages"][1]["content"] = tiny_run.text(answer)
    return row


@pytest.fixture(scope="module")
def pair_processor():
    return tiny_run.small_policy()[1]


def stream(rows: list[dict]):
    return Dataset.from_list(rows).to_iterable_dataset()


def trainer_of(output_dir: Path, train_dataset, eval_dataset=None, **options) -> SelfQuestioningTrainer:
    model, processor = tiny_run.small_policy()
    return SelfQuestioningTrainer(
        model=model,
        args=SelfQuestioningConfig(output_dir=str(output_dir), max_length=100, max_steps=1, **options),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
    )


@pytest.fixture(scope="module")
def collator():
    return DataCollatorForSelfQuestioning(tiny_run.small_policy()[1], max_length=100)


@pytest.mark.parametrize("kind", [Dataset.from_list, stream])
@pytest.mark.parametrize("options", [{}, {"pack_sequences": True}, {"train_sampling_strategy": "group_by_length"}])
def test_training_on_nothing_is_refused_before_the_first_step(tmp_path, kind, options):
    rows = [conversation(number, LONG) for number in range(6)]
    with pytest.raises(UserError, match="train dataset can be used: 6 too_long .*=100 tokens.*Raise max_length"):
        trainer_of(tmp_path, kind(rows), **options)


def test_an_evaluation_set_without_anything_to_evaluate_is_refused(tmp_path):
    good, bad = ([conversation(number, answer) for number in range(3)] for answer in (SHORT, LONG))
    with pytest.raises(UserError, match="the eval dataset can be used"):
        trainer_of(tmp_path, stream(good), stream(bad))
    with pytest.raises(UserError, match="the eval_late dataset can be used"):
        trainer_of(tmp_path, stream(good), {"early": stream(good), "late": stream(bad)})


@pytest.mark.parametrize("kind", [Dataset.from_list, stream])
def test_one_example_that_fits_is_enough(collator, kind):
    rows = [conversation(number, LONG) for number in range(130)]
    with pytest.raises(UserError, match="130 too_long"):
        usable_conversations(kind(rows), collator)
    usable_conversations(kind([*rows, conversation(130, SHORT)]), collator)


@pytest.mark.parametrize("rejected, warns", [(0, False), (2, False), (3, True)])
def test_more_than_a_fifth_rejected_is_a_warning(collator, caplog, rejected, warns):
    rows = [conversation(number, LONG if number < rejected else SHORT) for number in range(10)]
    with caplog.at_level(logging.WARNING):
        usable = usable_conversations(Dataset.from_list(rows), collator)
    assert len(usable.dataset) == len(usable.lengths) == 10 - rejected
    assert ("3 of the 10 examples in the train dataset are rejected: 3 too_long" in caplog.text) == warns


def test_repeated_records_count_each_time(collator):
    rows = [conversation(number, LONG if number < 2 else SHORT) for number in (0, 0, 1, 2)]
    usable = usable_conversations(Dataset.from_list(rows), collator)
    assert usable.rejected_records == {"r0": "too_long", "r1": "too_long"} and len(usable.dataset) == 1
    assert usable.counts()["set_aside"] == {"too_long": 3}


def test_few_conversations_near_the_limit_are_processed_with_blank_images(monkeypatch):
    rows = [tiny_run.conversation(number, turns=1) for number in range(4)]
    blank, processor = [], prepared_processor("vicuna")
    encode_fitting = DataCollatorForSelfQuestioning._encode_fitting
    monkeypatch.setattr(
        DataCollatorForSelfQuestioning,
        "_encode_fitting",
        lambda self, found: blank.append(found) or encode_fitting(self, found),
    )
    images = processor._get_num_multimodal_tokens(image_sizes=[(16, 16)])["num_image_tokens"][0]
    length = max(usable_conversations(rows, DataCollatorForSelfQuestioning(processor)).lengths)
    room = length - images  # text, by which the estimate may be wrong
    limit = length + room // 4 + 132
    usable_conversations(rows, DataCollatorForSelfQuestioning(processor, max_length=limit))
    assert not blank
    usable_conversations(rows, DataCollatorForSelfQuestioning(processor, max_length=length))
    assert len({found[0].id for found in blank if found[0]}) == 4  # one may be encoded again, shorter


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
    assert "3 of the 10 examples in the train dataset are rejected" in caplog.text


@pytest.mark.parametrize("options", [{}, {"share_prefix": False}, {"precompute_ref_log_probs": True}])
def test_stage_2_does_not_train_on_the_beginning_of_an_answer(tmp_path, options):
    rows = [answered(number, LONG if number == 0 else SHORT, "bright") for number in range(8)]
    trainer = tiny_dpo.make_trainer(tmp_path, rows=rows, max_length=100, max_steps=1, **options)
    assert trainer.rejected_records == {"p0": "too_long"} and len(trainer.train_dataset) == 7
    trainer.train()
    with pytest.raises(UserError, match="No example.*Raise max_length"):
        tiny_dpo.make_trainer(Path(tmp_path, "none"), rows=rows[:1], max_length=100, max_steps=1, **options)


def parts(text: str, images: int = 0) -> list[dict]:
    return [{"type": "image", "text": None}] * images + tiny_run.text(text)


@pytest.mark.parametrize(
    "family",
    ["vicuna", "qwen2.5-vl", "gemma-3", "idefics3", "llama-3.2-vision", "internvl", "smolvlm", "vuser-text-role"],
)
@settings(max_examples=25, deadline=None)
@given(
    turns=st.integers(1, 4), images=st.lists(st.integers(0, 1), min_size=4, max_size=4), asked=st.booleans(),
    max_length=st.integers(1, 600), words=st.integers(1, 40), size=st.tuples(*2 * [st.integers(28, 200)]),
)  # fmt: skip
def test_a_usable_conversation_is_never_rejected_by_the_collator(
    family, turns, images, asked, max_length, words, size
):
    """In no epoch, whichever turns are asked in it: nothing is missing in a step."""
    images = images[:turns]
    messages = [
        {"role": role, "content": parts("why " * words, image if role == "user" else 0)}
        for image in images
        for role in ("user", "assistant")
    ]
    example = {"id": "x", "images": [Image.new("RGB", size)] * sum(images), "messages": messages}
    processor = prepared_processor(family)
    collator = DataCollatorForSelfQuestioning(processor, max_length=max_length, sq_ratio=0.5 * asked)
    try:
        usable = usable_conversations([example], collator)
    except UserError:
        longest = DataCollatorForSelfQuestioning(processor, max_length=max_length, sq_ratio=float(asked))
        assert longest([example])["rejected"] == {"x": "too_long"}
        return
    truncated, unlimited = [], DataCollatorForSelfQuestioning(processor, sq_ratio=0.5 * asked)
    for epoch in range(6):
        collator.set_epoch(epoch)
        unlimited.set_epoch(epoch)
        batch, whole = collator([example]), unlimited([example])
        assert "rejected" not in batch
        truncated.append((batch["labels"] != IGNORED).sum() < (whole["labels"] != IGNORED).sum())
    assert usable.truncated or not any(truncated)


def test_a_conversation_that_is_none_is_rejected_alone():
    rows = [conversation(number, SHORT) for number in range(10)]
    rows[3]["messages"][0]["role"] = "human"
    rows[5]["messages"] = rows[5]["messages"][1:]  # its image has no place
    usable = usable_conversations(Dataset.from_list(rows), DataCollatorForSelfQuestioning(tiny_run.small_policy()[1]))
    assert usable.rejected_records == {"r3": "malformed", "r5": "malformed"} and len(usable.dataset) == 8
    with pytest.raises(UserError, match="1 malformed .*Record 'r3' cannot be collated: Invalid role"):
        usable_conversations([rows[3]], DataCollatorForSelfQuestioning(tiny_run.small_policy()[1]))


def test_steps_are_not_taken_on_nothing_if_most_of_the_data_is_rejected(tmp_path):
    rows = [conversation(number, SHORT if number == 17 else LONG) for number in range(20)]
    trainer = trainer_of(tmp_path, Dataset.from_list(rows), per_device_train_batch_size=2, report_to="none")
    assert len(trainer.train_dataset) == 1 and trainer.usable["train"].truncated == 0
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "train_loss" in entry]
    assert losses[0]["train_loss"] > 0
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 19


def test_rejected_examples_of_an_evaluation_set_are_listed(tmp_path):
    rows = [conversation(number, SHORT) for number in range(4)]
    evaluation = [conversation(number, LONG if number == 1 else SHORT) for number in range(4)]
    trainer = trainer_of(tmp_path, Dataset.from_list(rows), {"late": Dataset.from_list(evaluation)})
    assert trainer.rejected_records == {"eval_late/r1": "too_long"} and len(trainer.eval_dataset["late"]) == 3


def test_a_missing_image_is_named(collator):
    rows = [conversation(0, SHORT) | {"images": [{"bytes": None, "path": "none/scan_7.png"}]}]
    with pytest.raises(UserError, match=r"1 unreadable_image .*none/scan_7\.png"):
        usable_conversations(rows, collator)


def test_an_error_of_a_processor_is_not_one_about_the_settings():
    def check(example):
        raise ValueError("broken")

    with pytest.raises(RuntimeError, match="Record 'r0' of train cannot be checked: broken"):
        usable_examples(Dataset.from_list([{"id": "r0", "images": []}]), check, None)
