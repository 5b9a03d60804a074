# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Write tables of records, as `medst prepare` reads them."""

import csv
import json
from pathlib import Path

import pytest


def write_table(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSON lines, a workbook or text, according to the suffix of the path, and return the path."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".xlsx":
        book = pytest.importorskip("openpyxl").Workbook()
        for row in ([*rows[0]], *([*row.values()] for row in rows)):
            book.active.append(row)
        book.save(path)
    elif path.suffix == ".tsv":
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in ([*rows[0]], *map(dict.values, rows))))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path
