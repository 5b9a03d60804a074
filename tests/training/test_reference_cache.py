# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The file of one reference: what was written for something else, or is damaged, is never read as a number."""

import copy
import json

import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_dpo import pair, text

from medst_trl.base.errors import UserError
from medst_trl.training.reference_cache import ReferenceCache, ReferenceLogProbs, pair_key


SETTINGS = {"weights": "ab" * 32, "max_length": 2048}


def rows(*numbers: int) -> dict[str, ReferenceLogProbs]:
    return {pair_key(pair(number)): ReferenceLogProbs(f"p{number}", -number - 0.5, -1.25) for number in numbers}


def append(cache: ReferenceCache, known: dict[str, ReferenceLogProbs]) -> None:
    with cache.append() as file:
        cache.write_lines(file, known)


def changed(**changes) -> dict:
    return {**copy.deepcopy(pair(1)), **changes}


def other_image() -> Image.Image:
    image = pair(1)["images"][0].copy()
    image.putpixel((3, 3), (1, 2, 3))
    return image


@pytest.mark.parametrize(
    "other",
    [
        changed(chosen=[{"role": "assistant", "content": text("It is bright.")}]),
        changed(rejected=[{"role": "assistant", "content": text("bright.")}]),
        changed(prompt=[*pair(1)["prompt"], *pair(2)["chosen"], *pair(2)["prompt"]]),
        changed(chosen=pair(1)["rejected"], rejected=pair(1)["chosen"]),
        changed(images=[other_image()]),
        changed(images=[pair(1)["images"][0].resize((17, 15))]),
        changed(images=pair(1)["images"] * 2),
        changed(images=[]),
    ],
)
def test_another_content_is_another_pair_whatever_its_id(other):
    assert other["id"] == "p1" and pair_key(other) != pair_key(pair(1))


def test_the_same_content_is_the_same_pair():
    grey = Image.new("L", (5, 4), 77)
    assert pair_key(changed(id="another", score_chosen=3.0)) == pair_key(pair(1))
    assert pair_key(changed(images=[grey])) == pair_key(changed(images=[grey.convert("RGB")]))
    without = {key: value for key, value in pair(1).items() if key != "images"}
    assert pair_key({**without, "image": pair(1)["images"][0]}) == pair_key(pair(1))


def test_numbers_come_back_and_a_person_can_read_what_they_are(tmp_path):
    cache = ReferenceCache(tmp_path / "new", SETTINGS, {"base_model": "org/model"})
    assert cache.read() == {}
    cache.write(rows(1, 2))
    cache.write(rows(3))
    assert ReferenceCache(tmp_path / "new", SETTINGS).read() == rows(1, 2, 3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"{cache.key}.parquet"]
    table = pq.read_table(cache.path)
    assert table["id"].to_pylist() == ["p3", "p1", "p2"]
    metadata = json.loads(table.schema.metadata[b"medst_trl"])
    assert "Log-probabilities" in metadata["what"] and metadata["about"]["base_model"] == "org/model"
    assert metadata["settings"].items() >= SETTINGS.items()


def test_other_settings_are_another_file(tmp_path):
    ReferenceCache(tmp_path, SETTINGS).write(rows(1))
    for other in ({"weights": "cd" * 32}, {"max_length": 1024}, {"max_length": None}, {"ld_alpha": 0.5}):
        assert ReferenceCache(tmp_path, SETTINGS | other).read() == {}
    assert ReferenceCache(tmp_path, dict(reversed(SETTINGS.items()))).read() == rows(1)


def test_a_renamed_file_of_another_reference_is_set_aside(tmp_path, caplog):
    other, cache = ReferenceCache(tmp_path, {"weights": "cd" * 32}), ReferenceCache(tmp_path, SETTINGS)
    other.write(rows(1))
    other.path.rename(cache.path)
    assert cache.read() == {} and not cache.path.exists()
    assert len(caplog.records) == 1 and "written for another reference" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "no_metadata", "other_columns"])
def test_a_damaged_file_is_set_aside_in_one_line_and_written_again(tmp_path, caplog, damage):
    cache = ReferenceCache(tmp_path, SETTINGS)
    cache.write(rows(*range(20)))
    content, table = cache.path.read_bytes(), pq.read_table(cache.path)
    if damage == "cut":
        cache.path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        cache.path.write_bytes(b"")
    elif damage == "flipped":  # a bit of the numbers
        place = pq.ParquetFile(cache.path).metadata.row_group(0).column(2).data_page_offset + 60
        cache.path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif damage == "no_metadata":
        pq.write_table(table.replace_schema_metadata(None), cache.path)
    else:
        pq.write_table(table.drop_columns(["rejected"]), cache.path)
    assert cache.read() == {}
    assert len(caplog.records) == 1 and ".broken" in caplog.text
    assert [path.suffix for path in tmp_path.iterdir()] == [".broken"]
    cache.write(rows(4))
    assert cache.read() == rows(4)


def test_what_a_cut_run_has_left_is_known_but_for_a_damaged_line(tmp_path):
    cache = ReferenceCache(tmp_path, SETTINGS)
    cache.write(rows(1))
    append(cache, rows(2, 3))
    append(cache, rows(4))  # another rank
    append(ReferenceCache(tmp_path, {}), rows(8))  # another reference
    first = next(path for path in cache.parts() if '"p3"' in path.read_text())
    first.write_text(first.read_text()[:-4] + "\n" + '["x", "p9", 1.0, 2.0]\n["y"]\nnull\n\0\0\0')
    assert cache.read() == rows(1, 2, 4)
    cache.write(rows(5))
    assert not cache.parts() and cache.read() == rows(1, 2, 4, 5)
    assert ReferenceCache(tmp_path, {}).read() == rows(8)


def test_numbers_that_are_none_are_not_taken(tmp_path):
    cache, (key,) = ReferenceCache(tmp_path, SETTINGS), rows(1)
    with cache.append() as file:
        for value in ("NaN", "Infinity", "null", '"-1"'):
            file.write(f'["{key}", "p1", {value}, -1.0]\n')
    assert cache.read() == {}
    cache.write({key: ReferenceLogProbs("p1", float("nan"), -1.0)})
    assert cache.read() == {}


def test_nothing_computed_leaves_nothing(tmp_path):
    append(ReferenceCache(tmp_path / "new", SETTINGS), {})
    assert not list((tmp_path / "new").iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for cache in (ReferenceCache(tmp_path / "file", SETTINGS), ReferenceCache(tmp_path / "file" / "in", SETTINGS)):
        with pytest.raises(UserError, match="ref_log_probs_dir"):
            cache.write(rows(1))
        with pytest.raises(UserError, match="ref_log_probs_dir"):
            append(cache, rows(1))
