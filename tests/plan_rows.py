# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Read what `medst run RECIPE --dry_run` and `medst recipes validate` print."""

import re


def read_plan(text: str) -> dict[str, dict[str, list[str]]]:
    """Return the printed lines by step and label. Lines before and after the steps belong to the step ""."""
    steps, step, label = {"": {"": []}}, "", ""
    for line in text.splitlines():
        if match := re.fullmatch(r"  (\w* *)\s(.+)", line):
            label = match[1].strip() or label
            steps[step].setdefault(label, []).append(match[2].strip())
        elif re.match(r"(Plan|Results|Note:|.* is valid\.$)", line):
            steps[""][""].append(line)
        elif line:
            step = line.partition(" ")[0].rstrip(":")
            steps[step] = {"": [line]}
    return steps
