# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Convert preference pairs from other projects' JSON files for `medst dpo`, and back.

```bash
python examples/convert_preferences.py mmedpo_vqa-rad_dpo_weighted.json vqa_rad/images runs/mmedpo/preferences
medst dpo --dataset runs/mmedpo/preferences --model_name_or_path runs/vqa_rad/sft --output_dir runs/mmedpo/dpo

python examples/convert_preferences.py --back runs/mmedpo/preferences pairs.json pairs_images
```
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset

from medst_trl.base.errors import UserError
from medst_trl.base.files import atomic_path, write_jsonl, write_text
from medst_trl.base.settings import check_choice
from medst_trl.data.conform import conform
from medst_trl.data.images import publishable
from medst_trl.data.loading import load_records
from medst_trl.data.overlap import with_image_ids
from medst_trl.data.schema import features_of, with_stored_images, write_split
from medst_trl.data.source import list_reasons
from medst_trl.data.sources.llava import PLACEHOLDER
from medst_trl.interop.preference_files import FORMATS, PreferenceFile, read_preference_file
from medst_trl.selftrain.preferences import Preferences, select_preferences


def main(path: str, image_folder: str, directory: str, benchmark: str | None = None) -> dict:
    """Convert a file to a dataset. Use 5% of the images for validation, and drop images of the benchmark."""
    file = read_preference_file(path, image_folder)
    benchmarks = [load_records(benchmark, "test")] if benchmark else []
    preferences = select_preferences(
        file.pairs, file.rejected, benchmarks=benchmarks, near_hashes=file.near_hashes, validation_share=0.05
    )
    write_preferences(directory, preferences, file)
    for name, count in (file.notes | preferences.counts).items():
        print(f"{name}: {count}")
    return preferences.counts


def back(directory: str, path: str, image_folder: str, format: str = "stllava_med") -> None:
    """Convert a dataset to a file (`stllava_med` or `mmedpo`) and a directory of images."""
    dataset = load_records(directory, "train")
    write_preference_file(dataset, path, image_folder, format)
    print(f"{path}: {len(dataset)} pairs, with images in {image_folder}")


def write_preferences(folder: str | Path, preferences: Preferences, file: PreferenceFile) -> None:
    """
    Write the selected pairs of a file as a dataset with its images, for `medst dpo --dataset FOLDER`.

    Writes `{train,validation}-*.parquet` and `rejected.jsonl`. Files that exist are complete and stay.

    Raises:
        UserError: if there is no pair, with the number of dropped pairs by reason.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "rejected.jsonl", preferences.rejected)
    if not (preferences.train or preferences.validation):
        reasons = list_reasons(preferences.counts["rejected"])
        raise UserError(f"No preference pair is left ({reasons or 'there was none'}). See {folder}/rejected.jsonl.")

    def row(pair: dict) -> dict:
        stored = (file.images.load(name, identify=False).bytes for name in pair["images"])
        return pair | {"images": [{"bytes": data, "path": None} for data in stored]}

    for split in ("train", "validation"):
        write_split(folder, split, getattr(preferences, split), row, features_of("preferences"), rows_per_shard=512)


def write_preference_file(
    dataset: Dataset, path: str | Path, image_folder: str | Path, format: str = "stllava_med"
) -> None:
    """
    Write preference pairs for other projects' code: a JSON array, and a directory of images named by `image_id`.

    Args:
        dataset (`datasets.Dataset`):
            Preference columns, see [`load_records`].
        path (`str` or `Path`):
            The file to write.
        image_folder (`str` or `Path`):
            Directory for the images, byte for byte, as `<image_id>.png` or `.jpg`. The records use these names.
        format (`str`, *optional*, defaults to `"stllava_med"`):
            `"stllava_med"` or `"mmedpo"`. The latter's `weighted_score` is that of the file read, 1.0 without one.
    """
    check_choice("format", format, FORMATS)
    dataset = with_image_ids(conform(dataset, "preferences"))
    path, image_folder = Path(path), Path(image_folder)
    image_folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [_record(row, image_folder, format) for row in with_stored_images(dataset)]
    write_text(path, json.dumps(records, ensure_ascii=False, indent=1) + "\n")


def _record(row: dict, image_folder: Path, format: str) -> dict:
    """Return one record, and write its images."""
    images = [_write_image(*item, image_folder) for item in zip(row["images"], row["image_ids"], strict=True)]
    record = {"id": row["id"], "image": images[0] if len(images) == 1 else images}
    for key, answer in zip(FORMATS[format], ("chosen", "rejected"), strict=True):
        record[key] = [_turn(message) for message in [*row["prompt"], *row[answer]]]
    if format == "mmedpo":
        record["weighted_score"] = json.loads(row["judge"] or "{}").get("weighted_score", 1.0)
    return record


def _write_image(image: dict, image_id: str, folder: Path) -> str:
    content = publishable(image)["bytes"]
    path = folder / (image_id + (".jpg" if content.startswith(b"\xff\xd8") else ".png"))
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return path.name


def _turn(message: dict) -> dict:
    # A placeholder in a text would count as another image.
    parts = [
        PLACEHOLDER if part["type"] == "image" else part["text"].replace(PLACEHOLDER, "image")
        for part in message["content"]
    ]
    return {"from": "human" if message["role"] == "user" else "gpt", "value": "\n".join(parts)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--back", action="store_true", help="convert a dataset to a file: DATASET FILE IMAGES [FORMAT]"
    )
    parser.add_argument("paths", nargs="+", help="FILE IMAGES DATASET [BENCHMARK]", metavar="PATH")
    args = parser.parse_args()
    if len(args.paths) not in (3, 4):
        parser.error("give three or four paths, see --help")
    try:
        (back if args.back else main)(*args.paths)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
