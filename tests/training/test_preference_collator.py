# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows of a preference batch read as in stage 1, and only the answers are scored."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset, List
from datasets.features.image import Image as ImageFeature
from families import FAMILIES, prepared_processor
from PIL import Image
from tiny_dpo import pair
from tiny_run import text

from medst_trl.base.errors import UserError
from medst_trl.policy.vusr import tokenizer_of
from medst_trl.training.encoding import TOKEN_INPUTS, encode
from medst_trl.training.preference_collator import (
    DataCollatorForMultimodalPreference,
    pair_as_conversation,
    usable_pairs,
)


def examples() -> list[dict]:
    rows = [pair(number) for number in range(3)]
    rows[1]["prompt"] += [
        {"role": "assistant", "content": text("A <vusr> turn ASSISTANT: is not one.")},
        {"role": "user", "content": text("And then?")},
    ]
    rows[2]["chosen"][0]["content"] = text("Naïve – ½ 心臓 \n\n  ok")
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_both_rows_equal_their_conversations_encoded_alone(family):
    processor = prepared_processor(family)
    rows = examples()
    shared = DataCollatorForMultimodalPreference(processor, share_prefix=True)(rows)
    separate = DataCollatorForMultimodalPreference(processor)(rows)
    conversations = [pair_as_conversation(example, key) for key in ("chosen", "rejected") for example in rows]
    alone = encode(processor, conversations)  # every image goes through the processor
    is_text = alone.batch["attention_mask"].bool()
    for name in separate.keys() - {"completion_mask", "neutralised"}:
        ours, expected = separate[name], alone.batch[name]
        if name == "cross_attention_mask":  # Llama 3.2-Vision's processor lets padding see the image
            ours, expected = ours[is_text], expected[is_text]
        assert torch.equal(ours, expected), name
    for name in separate:
        if name in TOKEN_INPUTS:
            assert torch.equal(shared[name], separate[name]), name
    answers = [tokenizer_of(processor).decode(ids[mask.bool()]) for ids, mask in zip(
        separate["input_ids"], separate["completion_mask"]
    )]  # fmt: skip
    for answer, conversation in zip(answers, conversations, strict=True):
        said = conversation.messages[-1]["content"][0]["text"].strip()
        assert answer.strip().startswith(said) and len(answer) <= len(said) + 20
    assert shared["neutralised"] == separate["neutralised"] == alone.neutralised > 0


@pytest.mark.parametrize("family", ["vicuna", "qwen3-vl"])
def test_the_prefix_is_the_prompt_and_the_longest_pair_sets_the_shared_length(family):
    processor, rows = prepared_processor(family), examples()
    batch = DataCollatorForMultimodalPreference(processor, share_prefix=True)(rows)
    pairs = []
    for place, prefix in enumerate(batch["prefix_length"].tolist()):
        one, other = batch["input_ids"][place], batch["input_ids"][place + 3]
        assert torch.equal(one[:prefix], other[:prefix])
        for row in (place, place + 3):  # nothing that is scored is shared, and nothing else is left
            assert batch["completion_mask"][row].nonzero()[0] == prefix
        pairs.append(int(batch["attention_mask"][[place, place + 3]].sum()) - prefix + 1)
    assert batch["shared_length"] == max(pairs)


def test_a_long_answer_is_truncated_and_a_prompt_without_room_is_refused():
    processor, rows = prepared_processor("vicuna"), examples()
    whole = DataCollatorForMultimodalPreference(processor)(rows)
    longest = int(whole["attention_mask"].sum(1).max())
    cut = DataCollatorForMultimodalPreference(processor, max_length=longest - 4, share_prefix=True)(rows)
    assert cut["input_ids"].shape[1] == longest - 4
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, : longest - 4])
    assert cut["shared_length"] <= 2 * (longest - 4)
    with pytest.raises(UserError, match=r"'p\d'.*no answer fits into max_length=20"):
        DataCollatorForMultimodalPreference(processor, max_length=20)(rows)


def test_the_images_of_a_pair_are_converted_once_and_counted_for_both_answers(monkeypatch):
    counts, convert = Counter(), Image.Image.convert

    def counted(self, mode=None, *args, **kwargs):
        counts[self.mode, mode] += 1
        return convert(self, mode, *args, **kwargs)

    collator, rows = DataCollatorForMultimodalPreference(prepared_processor("vicuna")), examples()
    for row in rows:
        row["images"] = [image.convert("L") for image in row["images"]]
    rows[2]["image"] = rows[2].pop("images")[0]
    monkeypatch.setattr(Image.Image, "convert", counted)
    collator(rows)
    assert counts["L", "RGB"] == 3
    rows[1]["rejected"][0]["content"] = [{"type": "image"}, *text("no")]
    with pytest.raises(UserError, match=r"Record 'p1' cannot be collated.*image placeholders \(2\)"):
        collator(rows)
    with pytest.raises(UserError, match="Record 'p0' cannot be collated"):
        collator([rows[0] | {"images": []}])


SIZES = [(32, 16), (16, 48), (24, 40)]


def image(number: int, mode: str = "RGB") -> Image.Image:
    width, height = SIZES[number % 3]
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def rows(n: int = 6) -> list[dict]:
    """Pairs with images of unequal sizes and modes."""
    return [{**pair(i), "images": [image(i, "L" if i % 2 else "RGB")]} for i in range(n)]


def as_image_column(dataset: Dataset) -> Dataset:
    alone = Dataset.from_dict({"image": [images[0] for images in dataset["images"]]})
    dataset = dataset.remove_columns("images")
    return Dataset.from_list([{**row, **image} for row, image in zip(dataset, alone, strict=True)])


def as_files(dataset: Dataset, folder) -> Dataset:
    """The same pairs with images in files and rotated by EXIF."""
    exif = Image.Exif()
    exif[0x112] = 6
    paths = []
    for number, images in enumerate(dataset["images"]):
        paths.append([str(folder / f"{number}.jpg")])
        upright = images[0].convert("RGB").transpose(Image.Transpose.ROTATE_90)
        upright.save(paths[-1][0], exif=exif, quality=95)
    dataset = dataset.remove_columns("images").add_column("images", paths)
    return dataset.cast_column("images", List(ImageFeature()))


@pytest.fixture
def decoded(monkeypatch):
    """Number of images that `datasets` has decoded."""
    count, decode = Counter(), ImageFeature.decode_example

    def counted(self, value, *args, **kwargs):
        count["decoded"] += isinstance(value, dict)
        return decode(self, value, *args, **kwargs)

    monkeypatch.setattr(ImageFeature, "decode_example", counted)
    return count


@pytest.mark.parametrize("kind", ["stored", "image column", "files", "in memory"])
@pytest.mark.parametrize("family", ["vicuna", "qwen3-vl", "idefics3"])
def test_lengths_of_pairs_match_the_batch_and_no_image_is_decoded(tmp_path, decoded, kind, family):
    processor, dataset = prepared_processor(family), Dataset.from_list(rows())
    if kind == "image column":
        dataset = as_image_column(dataset)
    elif kind == "files":
        dataset = as_files(dataset, tmp_path)
    elif kind == "in memory":
        pictures = {row["id"]: row["images"] for row in rows()}
        dataset = dataset.remove_columns("images").with_transform(
            lambda batch: {**batch, "images": [pictures[name] for name in batch["id"]]}
        )
    decoded.clear()
    found = usable_pairs(dataset, processor, None)
    assert not decoded and not found.rejected_records and len(found.dataset) == 6
    collator = DataCollatorForMultimodalPreference(processor, share_prefix=True)
    lengths = [collator([example])["shared_length"] for example in dataset]
    differences = {ours - theirs for ours, theirs in zip(found.lengths, lengths, strict=True)}
    assert len(differences) == 1  # what stands behind the answer


@pytest.mark.parametrize("what", ["no image", "a cut png", "a cut jpeg", "no file"])
def test_a_pair_whose_image_cannot_be_read_is_rejected(what):
    dataset = Dataset.from_list(rows())
    broken = [dict(row) for row in dataset.cast_column("images", List(ImageFeature(decode=False)))]
    if what == "no file":
        broken[2]["images"] = [{"bytes": None, "path": "/no/such/file.png"}]
    else:
        file = io.BytesIO()
        image(2).save(file, "JPEG" if what == "a cut jpeg" else "PNG")
        data = b"not an image" if what == "no image" else file.getvalue()[:-30]
        broken[2]["images"] = [{"bytes": data, "path": None}]
    dataset = Dataset.from_list(broken).cast_column("images", List(ImageFeature()))
    found = usable_pairs(dataset, prepared_processor("vicuna"), 512)
    assert found.rejected_records == {"p2": "unreadable_image"}
    assert [row["id"] for row in found.dataset] == ["p0", "p1", "p3", "p4", "p5"] and len(found.lengths) == 5
    with pytest.raises(UserError, match="1 because one of its images is missing, truncated"):
        usable_pairs(dataset.select([2]), prepared_processor("vicuna"), 512)
