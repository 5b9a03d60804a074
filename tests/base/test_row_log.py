# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from medst_trl.base.errors import UserError
from medst_trl.base.row_log import RowLog


def test_rows_of_several_ranks_are_merged_into_one_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": str(number), "prediction": "Straße"} for number in range(7)]
    for rank in range(3):
        RowLog(path, rank).append(rows[rank::3])
    assert len(list(RowLog(path).rows())) == 7
    with pytest.raises(UserError, match="1 of 8 rows are missing"):
        RowLog(path).finish([str(number) for number in range(8)])
    RowLog(path).finish([row["id"] for row in rows])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
    assert [child.name for child in tmp_path.iterdir()] == ["rows.jsonl"]


def test_finished_rows_are_not_computed_again(tmp_path):
    path, ids, finished = tmp_path / "rows.jsonl", ["a", "b", "c"], []

    def compute(done):
        finished.append(done)
        return ({"id": key} for key in ids if key not in done)

    RowLog(path).append([{"id": "b"}])
    with open(tmp_path / "rows.jsonl.incomplete", "ab") as file:
        file.write(b'{"id": "c')  # the last line was interrupted
    RowLog.fill(path, ids, compute)
    RowLog.fill(path, ids, compute)
    assert finished == [{"b"}]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ids
