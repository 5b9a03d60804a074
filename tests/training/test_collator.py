# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
from io import BytesIO

import numpy as np
import pytest
import tiny_run
import torch
from datasets import Dataset
from families import FAMILIES, prepared_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from medst_trl.base.errors import UserError
from medst_trl.data.image_formats import to_8_bit
from medst_trl.training.collator import DataCollatorForSelfQuestioning, usable_conversations
from medst_trl.training.encoding import IGNORED


def _collator(family="vicuna", **kwargs):
    return DataCollatorForSelfQuestioning(prepared_processor(family), **kwargs)


def _long_conversation(turns, images=1):
    example = tiny_run.conversation(1, turns)
    example["images"] = example["images"] * images
    example["messages"][0]["content"][:1] = [{"type": "image", "text": None}] * images
    return example


def test_question_and_answer_tokens_are_distinguished():
    batch = _collator(sq_ratio=1.0)([tiny_run.conversation(0), tiny_run.conversation(3, turns=3)])
    labelled = batch["labels"] != IGNORED
    assert (batch["question_mask"] & ~labelled).sum() == 0
    assert batch["question_mask"].any() and (labelled & ~batch["question_mask"]).any()
    assert (batch["labels"] == batch["input_ids"])[labelled].all()
    assert not labelled[batch["attention_mask"] == 0].any()


def test_text_only_and_image_examples_share_a_batch():
    plain = {
        "messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}],
        "images": None,
    }
    mixed = _collator()([tiny_run.conversation(0), plain])
    assert len(mixed["pixel_values"]) == 1
    assert "pixel_values" not in _collator()([plain, plain])


def test_images_come_before_string_content():
    parts = tiny_run.conversation(0)
    strings = [{"role": m["role"], "content": m["content"][-1]["text"]} for m in parts["messages"]]
    from_parts, from_strings = (
        _collator(sq_ratio=0.0)([example])["input_ids"] for example in (parts, {**parts, "messages": strings})
    )
    assert torch.equal(from_parts, from_strings)
    tokenizer = prepared_processor("vicuna").tokenizer
    before, after = tokenizer.decode(from_strings[0]).rsplit("<image>", 1)
    assert "What about 0 in turn 0?" in after and "What about" not in before


def test_grey_and_palette_images_are_read_as_rgb():
    example = tiny_run.conversation(0)
    grey = example["images"][0].convert("L")
    palette = example["images"][0].convert("P", palette=Image.Palette.ADAPTIVE)
    assert (grey.mode, palette.mode) == ("L", "P")
    for image in (grey, palette):
        actual, expected = (
            _collator()([{**example, "images": [i]}])["pixel_values"] for i in (image, image.convert("RGB"))
        )
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA", "1"])
def test_images_of_other_modes_are_read_as_prepare_stores_them(mode):
    example = tiny_run.conversation(0)
    grey = example["images"][0].convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)
    image = deep if mode == "I;16" else grey.convert(mode)
    batches = [_collator()([example | {"images": [one]}])["pixel_values"] for one in (image, to_8_bit(image))]
    assert torch.equal(*batches) and batches[0].std() > 0.1


def test_the_error_for_a_wrong_number_of_images_names_the_record():
    with pytest.raises(UserError, match="'r0'.*Number of images"):
        _collator()([{**tiny_run.conversation(0), "images": []}])


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"GIF89a"])
def test_an_unreadable_image_rejects_only_its_example(damage):
    good, bad = tiny_run.conversation(0), tiny_run.conversation(1)
    stored = BytesIO()
    bad["images"][0].save(stored, "PNG")
    bad["images"] = [{"bytes": damage(stored.getvalue()), "path": None}]
    batch = _collator()([good, bad])
    assert batch.pop("rejected") == {"r1": "unreadable_image"}
    expected = _collator()([good])
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in expected)
    alone = _collator()([bad])
    assert alone["rejected"] == {"r1": "unreadable_image"} and (alone["labels"] == IGNORED).all()


@pytest.mark.parametrize("family", ["qwen2.5-vl", "vicuna"])
@pytest.mark.parametrize("size", [(2, 600), (900, 3), (1, 4000)])
def test_an_image_of_extreme_aspect_ratio_rejects_only_its_example(size, family):
    """LLaVA's processor would make 336 x 1,344,000 pixels of 1 x 4,000."""
    good, bad = tiny_run.conversation(0), {**tiny_run.conversation(1), "images": [Image.new("RGB", size)]}
    batch = _collator(family)([bad, good])
    assert batch.pop("rejected") == {"r1": "extreme_aspect_ratio"}
    expected = _collator(family)([good])
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in expected)
    usable = usable_conversations(Dataset.from_list([bad, good]), _collator(family))
    assert usable.rejected_records == {"r1": "extreme_aspect_ratio"} and usable.lengths[0] > 0


def test_asked_turns_depend_only_on_seed_epoch_id_and_turn():
    examples = [tiny_run.conversation(i, turns=4) for i in range(60)]
    sample = lambda collator: [collator.asked_turns(e["id"], e["messages"]) for e in examples]  # noqa: E731
    first = _collator(seed=1)
    once = sample(first)
    assert sample(_collator(seed=1)) == once and sample(first) == once
    assert sample(_collator(seed=2)) != once
    first.set_epoch(1)
    assert sample(first) != once
    assert sample(first.for_evaluation()) == once
    assert (
        list(reversed([first.for_evaluation().asked_turns(e["id"], e["messages"]) for e in reversed(examples)]))
        == once
    )


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_sq_ratio_is_the_fraction_of_asked_turns(ratio):
    collator = _collator(sq_ratio=ratio)
    asked = [len(collator.asked_turns(str(i), tiny_run.conversation(i, turns=4)["messages"])) for i in range(500)]
    assert abs(sum(asked) / 2000 - ratio) < 0.04  # four standard errors at 0.5


def test_the_first_turn_can_be_excluded():
    examples = [tiny_run.conversation(i, turns=3)["messages"] for i in range(20)]
    assert all(_collator(sq_ratio=1.0, sq_first_turn=False).asked_turns("x", e) == {2, 4} for e in examples)
    assert all(_collator(sq_ratio=1.0).asked_turns("x", e) == {0, 2, 4} for e in examples)


def test_a_turn_marked_in_the_data_is_always_asked():
    messages = tiny_run.conversation(0, turns=2)["messages"]
    messages[0]["vusr"] = True
    assert _collator(sq_ratio=0.0, sq_first_turn=False).asked_turns("x", messages) == {0}


@pytest.mark.parametrize("workers", [0, 1])
def test_persistent_workers_see_the_next_epoch(workers):
    collator = _collator()
    loader = DataLoader(
        [tiny_run.conversation(i, turns=3) for i in range(8)], collate_fn=collator, batch_size=8, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    masks = []
    for epoch in range(2):
        collator.set_epoch(epoch)
        masks.append(next(iter(loader))["question_mask"])
    expected = []
    for epoch in range(2):
        collator.set_epoch(epoch)
        expected.append(collator([tiny_run.conversation(i, turns=3) for i in range(8)])["question_mask"])
    assert all(map(torch.equal, masks, expected))
    assert not torch.equal(*(mask[:, : min(m.shape[1] for m in masks)] for mask in masks))


@pytest.mark.parametrize("family", ["vicuna", "llava-1.5-hf", "qwen2.5-vl", "gemma-3", "idefics3", "llama-3.2-vision"])
@settings(max_examples=40, deadline=None)
@given(turns=st.integers(1, 6), images=st.integers(0, 2), max_length=st.integers(1, 400), asked=st.booleans())
def test_truncation_ends_after_an_answer_and_never_inside_an_image(family, turns, images, max_length, asked):
    example, ratio = _long_conversation(turns, images), float(asked)
    untruncated = _collator(family, sq_ratio=ratio)([example])
    batch = _collator(family, sq_ratio=ratio, max_length=max_length)([example])
    if "rejected" in batch:
        assert batch["rejected"] == {"r1": "too_long"} and (batch["labels"] == IGNORED).all()
        one_turn = {**example, "messages": example["messages"][:2]}
        first_answer_ends = int((_collator(family, sq_ratio=ratio)([one_turn])["labels"][0] != IGNORED).nonzero()[-1])
        assert first_answer_ends >= max_length
        return
    length = batch["input_ids"].shape[1]
    assert length <= max_length or length == untruncated["input_ids"].shape[1] <= max_length
    labels = batch["labels"][0]
    end = int((labels != IGNORED).nonzero()[-1]) + 1  # only the template's closing text follows
    assert batch["input_ids"][0, :end].tolist() == untruncated["input_ids"][0, :end].tolist()
    assert labels.tolist() == untruncated["labels"][0, :length].tolist()
    last = labels[labels != IGNORED][-1]
    assert last == untruncated["labels"][0][untruncated["labels"][0] != IGNORED][-1]  # a terminator
    assert not batch["question_mask"][0][labels != IGNORED][-1]
    if images:
        assert batch["pixel_values"].shape == untruncated["pixel_values"].shape


def test_truncation_keeps_all_turns_that_fit():
    example = _long_conversation(4)
    lengths = [
        _collator(sq_ratio=0.0)([{**example, "messages": example["messages"][: 2 * n]}])["input_ids"].shape[1]
        for n in (1, 2, 3, 4)
    ]
    for turns, length in enumerate(lengths, start=1):
        batch = _collator(sq_ratio=0.0, max_length=length)([example])
        assert batch["input_ids"].shape[1] == length, turns


def test_images_of_truncated_turns_are_removed():
    example = _long_conversation(3)
    example["messages"][4]["content"].insert(0, {"type": "image", "text": None})
    example["images"] = example["images"] * 2
    two_turns = _collator(sq_ratio=0.0)(
        [{**example, "messages": example["messages"][:4], "images": example["images"][:1]}]
    )
    batch = _collator(sq_ratio=0.0, max_length=two_turns["input_ids"].shape[1] + 3)([example])
    assert torch.equal(batch["input_ids"], two_turns["input_ids"])
    assert torch.equal(batch["pixel_values"], two_turns["pixel_values"])


def test_an_example_that_does_not_fit_does_not_affect_the_others():
    short = {
        "id": "short",
        "images": [],
        "messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}],
    }
    alone = _collator(max_length=30)([short])
    long = tiny_run.conversation(3)
    long["messages"][1]["content"][0]["text"] = "very " * 100
    batch = _collator(max_length=30)([long, short])
    assert batch["rejected"] == {"r3": "too_long"}
    assert torch.equal(batch["input_ids"], alone["input_ids"])
    empty = _collator(max_length=30)([long])
    assert empty["rejected"] == {"r3": "too_long"} and empty["input_ids"].shape == (1, 1)
    assert (empty["labels"] == IGNORED).all()


def test_an_example_without_a_target_is_rejected():
    example = tiny_run.conversation(0)
    question = {**example, "messages": example["messages"][:1]}
    batch = _collator(sq_ratio=0.0)([question, tiny_run.conversation(1)])
    assert batch["rejected"] == {"r0": "nothing_to_train"} and len(batch["input_ids"]) == 1
    assert "rejected" not in _collator(sq_ratio=1.0)([question])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_and_without_images_can_be_mixed(family):
    rows = [
        tiny_run.conversation(0, with_image=False),
        tiny_run.conversation(1),
        tiny_run.conversation(2, with_image=False),
    ]
    together = _collator(family, sq_ratio=0.0)(rows)
    for index, row in enumerate(rows):
        alone = _collator(family, sq_ratio=0.0)([row])["labels"][0]
        assert together["labels"][index][: len(alone)].tolist() == alone.tolist()


def test_a_processor_that_does_not_report_image_positions_is_refused(monkeypatch):
    processor = prepared_processor("vicuna")
    call = type(processor).__call__

    def without_offsets(self, *args, **kwargs):
        batch = call(self, *args, **kwargs)
        batch.pop("text_replacement_offsets")
        return batch

    monkeypatch.setattr(type(processor), "__call__", without_offsets)
    with pytest.raises(UserError, match="without reporting where"):
        DataCollatorForSelfQuestioning(processor)([tiny_run.conversation(0)])


def test_a_final_question_without_an_answer_is_removed():
    example = tiny_run.conversation(0)
    unanswered = {**example, "messages": [*example["messages"], {"role": "user", "content": tiny_run.text("And?")}]}
    assert torch.equal(*(_collator(sq_ratio=0.0)([e])["input_ids"] for e in (example, unanswered)))


def test_batches_are_padded_to_a_multiple():
    batch = _collator(pad_to_multiple_of=32)([tiny_run.conversation(0)])
    assert all(batch[name].shape[1] % 32 == 0 for name in ("input_ids", "labels", "question_mask"))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("turns", [1, 3])
def test_prompt_completion_examples_have_no_questions(ratio, turns):
    example = tiny_run.conversation(0, turns)
    messages, images = example["messages"], example["images"]
    batch = _collator(sq_ratio=ratio)([{"images": images, "prompt": messages[:-1], "completion": messages[-1:]}])
    assert not batch["question_mask"].any() and batch["question_mask"].shape == batch["labels"].shape
    whole = _collator(sq_ratio=0.0)([example])
    assert torch.equal(batch["input_ids"], whole["input_ids"])
    trained = (batch["labels"][0] != IGNORED).nonzero().flatten()  # the last answer alone
    last = (whole["labels"][0] != IGNORED).nonzero().flatten()[-len(trained) :]
    assert torch.equal(trained, last) and trained.tolist() == list(range(int(trained[0]), int(trained[-1]) + 1))
    assert ((whole["labels"] != IGNORED).sum() > len(trained)) == (turns > 1)


def test_a_completion_that_does_not_fit_rejects_its_example():
    example = tiny_run.conversation(0)
    prompt = [{"role": "user", "content": tiny_run.text("why " * 100)}]
    example = {"id": "p", "images": [], "prompt": prompt, "completion": example["messages"][1:2]}
    assert _collator(max_length=60)([example])["rejected"] == {"p": "too_long"}


def test_a_ratio_outside_zero_to_one_is_refused():
    with pytest.raises(UserError, match="sq_ratio"):
        _collator(sq_ratio=50)
