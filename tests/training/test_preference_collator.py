# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Preference batches are encoded as in stage 1, and only the answers are scored."""

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
def test_both_rows_equal_the_separately_encoded_conversations(family):
    processor = prepared_processor(family)
    rows = examples()
    shared = DataCollatorForMultimodalPreference(processor, share_prefix=True)(rows)
    separate = DataCollatorForMultimodalPreference(processor)(rows)
    conversations = [pair_as_conversation(example, key) for key in ("chosen", "rejected") for example in rows]
    alone, _, rendered = encode(processor, conversations)  # processes every image, even if two rows share it
    is_text = alone["attention_mask"].bool()
    for name in separate.keys() - {"completion_mask"}:
        ours, expected = separate[name], alone[name]
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
        expected = conversation.messages[-1]["content"][0]["text"].strip()
        assert answer.strip().startswith(expected) and len(answer) <= len(expected) + 20
    assert any("\u200c" in text.text for text in rendered)  # control tokens in data are neutralized


@pytest.mark.parametrize("family", ["vicuna", "qwen3-vl"])
def test_the_prefix_is_the_prompt_and_the_longest_pair_sets_the_shared_length(family):
    processor, rows = prepared_processor(family), examples()
    batch = DataCollatorForMultimodalPreference(processor, share_prefix=True)(rows)
    lengths = []
    for index, prefix in enumerate(batch["prefix_length"].tolist()):
        chosen, rejected = batch["input_ids"][index], batch["input_ids"][index + 3]
        assert torch.equal(chosen[:prefix], rejected[:prefix])
        for row in (index, index + 3):  # scores start right after the prefix
            assert batch["completion_mask"][row].nonzero()[0] == prefix
        lengths.append(int(batch["attention_mask"][[index, index + 3]].sum()) - prefix + 1)
    assert batch["shared_length"] == max(lengths)


def test_a_long_answer_is_truncated_and_a_prompt_without_room_is_refused():
    processor, rows = prepared_processor("vicuna"), examples()
    untruncated = DataCollatorForMultimodalPreference(processor)(rows)
    longest = int(untruncated["attention_mask"].sum(1).max())
    truncated = DataCollatorForMultimodalPreference(processor, max_length=longest - 4, share_prefix=True)(rows)
    assert truncated["input_ids"].shape[1] == longest - 4
    assert torch.equal(truncated["input_ids"], untruncated["input_ids"][:, : longest - 4])
    assert truncated["shared_length"] <= 2 * (longest - 4)
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
    """Pairs with images of different sizes and modes."""
    return [{**pair(i), "images": [image(i, "L" if i % 2 else "RGB")]} for i in range(n)]


def as_image_column(dataset: Dataset) -> Dataset:
    single_images = Dataset.from_dict({"image": [images[0] for images in dataset["images"]]})
    dataset = dataset.remove_columns("images")
    return Dataset.from_list([{**row, **image} for row, image in zip(dataset, single_images, strict=True)])


def as_files(dataset: Dataset, directory) -> Dataset:
    """The same pairs with images in files that EXIF rotates."""
    exif = Image.Exif()
    exif[0x112] = 6
    paths = []
    for number, images in enumerate(dataset["images"]):
        paths.append([str(directory / f"{number}.jpg")])
        upright = images[0].convert("RGB").transpose(Image.Transpose.ROTATE_90)
        upright.save(paths[-1][0], exif=exif, quality=95)
    dataset = dataset.remove_columns("images").add_column("images", paths)
    return dataset.cast_column("images", List(ImageFeature()))


@pytest.fixture
def decoded(monkeypatch):
    """Counter of the images that `datasets` decodes."""
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
        images_by_id = {row["id"]: row["images"] for row in rows()}
        dataset = dataset.remove_columns("images").with_transform(
            lambda batch: {**batch, "images": [images_by_id[name] for name in batch["id"]]}
        )
    decoded.clear()
    pairs = usable_pairs(dataset, processor, None)
    assert not decoded and not pairs.rejected_records and len(pairs.dataset) == 6
    collator = DataCollatorForMultimodalPreference(processor, share_prefix=True)
    lengths = [collator([example])["shared_length"] for example in dataset]
    differences = {ours - theirs for ours, theirs in zip(pairs.lengths, lengths, strict=True)}
    assert len(differences) == 1  # the number of tokens after an answer


@pytest.mark.parametrize("damage", ["not an image", "truncated png", "truncated jpeg", "missing file"])
def test_a_pair_whose_image_cannot_be_read_is_rejected(damage):
    dataset = Dataset.from_list(rows())
    broken = [dict(row) for row in dataset.cast_column("images", List(ImageFeature(decode=False)))]
    if damage == "missing file":
        broken[2]["images"] = [{"bytes": None, "path": "/no/such/file.png"}]
    else:
        file = io.BytesIO()
        image(2).save(file, "JPEG" if damage == "truncated jpeg" else "PNG")
        data = b"not an image" if damage == "not an image" else file.getvalue()[:-30]
        broken[2]["images"] = [{"bytes": data, "path": None}]
    dataset = Dataset.from_list(broken).cast_column("images", List(ImageFeature()))
    pairs = usable_pairs(dataset, prepared_processor("vicuna"), 512)
    assert pairs.rejected_records == {"p2": "unreadable_image"}
    assert [row["id"] for row in pairs.dataset] == ["p0", "p1", "p3", "p4", "p5"] and len(pairs.lengths) == 5
    with pytest.raises(UserError, match="1 unreadable_image .an image is missing, truncated"):
        usable_pairs(dataset.select([2]), prepared_processor("vicuna"), 512)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "vicuna"])
def test_a_pair_with_an_image_of_extreme_aspect_ratio_is_rejected(family):
    strip = {"images": [Image.new("RGB", (2, 600))]}
    dataset = Dataset.from_list([row | (strip if row["id"] == "p2" else {}) for row in rows()])
    pairs = usable_pairs(dataset, prepared_processor(family), 512)
    assert pairs.rejected_records == {"p2": "extreme_aspect_ratio"} and len(pairs.dataset) == 5


def test_a_pair_without_a_weight_counts_as_one_beside_others():
    first, *others = rows()
    collator = DataCollatorForMultimodalPreference(prepared_processor("vicuna"))
    batch = collator([first | {"weight": 0.5, "probability": None}, *others[:2], others[2] | {"weight": None}])
    assert batch["weight"].tolist() == [0.5, 1.0, 1.0, 1.0] and "probability" not in batch
