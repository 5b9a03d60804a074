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

from medst_trl.base.errors import UserError
from medst_trl.data.loading import load_records
from medst_trl.interop.preference_files import read_preference_file, write_preference_file, write_preferences
from medst_trl.selftrain.preferences import select_preferences


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
