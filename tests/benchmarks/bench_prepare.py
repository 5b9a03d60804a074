# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Images per second of `medst prepare`, compared with reading and decoding the files only.

```bash
python tests/benchmarks/bench_prepare.py vqa_rad
```

The whole stage is timed (fingerprints of the input, decoding, hashing, writing), without Python's imports.
"""

import argparse
import contextlib
import hashlib
import io
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets  # noqa: F401  imported here so that the import is not timed
import pyarrow.parquet  # noqa: F401
from PIL import Image

from medst_trl.data.images import load_image
from medst_trl.pipeline.stages.prepare import PrepareArguments, main


def decode(path: Path) -> None:
    Image.open(io.BytesIO(path.read_bytes())).load()


def measure(name: str, work, num_images: int, repeats: int) -> None:
    """Print the best of `repeats` runs, because other work on the machine can only slow a run down."""
    best, best_cpu = float("inf"), float("inf")
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        work()
        best, best_cpu = min(best, time.perf_counter() - start), min(best_cpu, time.process_time() - cpu)
    print(f"{name:32} {num_images / best:8.0f} images/s   {best_cpu / num_images * 1e3:6.2f} ms CPU per image")


def prepare(arguments: dict) -> None:
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(None):
        main(PrepareArguments(output_dir=directory + "/prepare", **arguments))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="directory of VQA-RAD with its images in images/")
    parser.add_argument("--source", default="vqa_rad", choices=["vqa_rad", "vqa_rad_mevf"])
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    files = sorted(path for path in (args.data / "images").iterdir() if path.is_file())
    size = sum(path.stat().st_size for path in files)
    megapixels = sum(image.width * image.height for image in map(Image.open, files)) / 1e6
    print(f"{len(files)} images, {size / 1e6:.1f} MB, {megapixels:.0f} megapixels; {args.num_workers} threads, "
          f"{os.cpu_count()} cores, best of {args.repeats}")  # fmt: skip

    def run(work) -> None:
        with ThreadPoolExecutor(args.num_workers) as executor:
            list(executor.map(work, files))

    pixels = bytes(int(megapixels / len(files) * 3e6))
    stages = {
        "read (disk or file cache)": lambda: run(Path.read_bytes),
        "read, decode": lambda: run(decode),
        "SHA-256 of the same bytes": lambda: run(lambda _: hashlib.sha256(pixels)),
        "read, decode, hash, strip": lambda: run(load_image),
        "medst prepare --source images": lambda: prepare(
            {"source": "images", "data_path": str(args.data / "images"), "num_workers": args.num_workers}
        ),
        f"medst prepare --source {args.source}": lambda: prepare(
            {"source": args.source, "data_path": str(args.data), "num_workers": args.num_workers}
        ),
    }
    for name, work in stages.items():
        measure(name, work, len(files), args.repeats)
