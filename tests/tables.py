# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Write tables of records, as `medst prepare` reads them."""

import csv
import json
from pathlib import Path


def write_table(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSON lines or with tabs or commas, according to the suffix of the path, and return the path."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path
