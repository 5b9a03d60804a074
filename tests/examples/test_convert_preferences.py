# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The example converts another project's file to a dataset for `medst dpo`, and back."""

import json
import runpy
from pathlib import Path

from PIL import Image

from medst_trl.data.conform import conform
from medst_trl.data.loading import load_records


def test_pairs_survive_a_round_trip(tmp_path, capsys):
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "convert_preferences.py"))
    records = []
    for number in range(40):
        Image.new("L", (4, 4), number).save(tmp_path / f"scan-{number}.png")
        question = {"from": "human", "value": "<image>\nIs it dark?"}
        both = [[question, {"from": "gpt", "value": answer}] for answer in ("Yes", "No, not at all")]
        records.append(
            {"id": number, "image": f"scan-{number}.png", "conversations": both[0], "rejected_conversations": both[1]}
            | {"weighted_score": number / 40}
        )
    records.append(records[0] | {"id": "gone", "image": "none.png"})
    (tmp_path / "pairs.json").write_text(json.dumps(records))

    counts = example["main"](str(tmp_path / "pairs.json"), str(tmp_path), str(tmp_path / "preferences"))
    train, validation = (load_records(tmp_path / "preferences", split) for split in ("train", "validation"))
    assert conform(train, "preferences") is train
    assert len(train) + len(validation) == 40 and counts["rejected"] == {"missing": 1}
    assert "longer_rejected" in capsys.readouterr().out

    example["back"](str(tmp_path / "preferences"), str(tmp_path / "back.json"), str(tmp_path / "out"), "mmedpo")
    back = {record["id"]: record for record in json.loads((tmp_path / "back.json").read_text())}
    assert len(back) == len(train)
    for name, record in back.items():
        assert record | {"id": int(name), "image": f"scan-{name}.png"} == records[int(name)]
        assert Image.open(tmp_path / "out" / record["image"]).getpixel((0, 0)) == int(name)
