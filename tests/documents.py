# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The code blocks of README.md and docs/, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Blocks that start with such a comment do not run on every machine. Their commands are still checked by the parsers.
NEEDS = re.compile(r"# needs (a GPU|the Hub|a judge|a server|SLURM|data)")


@dataclass(frozen=True)
class Block:
    """A fenced code block: its page and line, its language and its text."""

    page: str
    line: int
    language: str
    text: str

    @property
    def runs_anywhere(self) -> bool:
        return not NEEDS.match(self.text)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page.name, text[: m.start()].count("\n") + 1, m[1], m[2]) for m in found]


def commands(block: Block) -> list[list[str]]:
    """Split the commands of a shell block into words. Join lines, remove comments and expand the block's variables."""
    variables, found = {}, []
    for line in block.text.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = re.sub(rf"\$({name}\b|{{{name}}})", value.replace("\\", r"\\"), line)
        for part in re.split(r"\s(?:&&|\|)\s", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # MODEL=... on its own line or before a command
                name, _, value = words.pop(0).partition("=")
                variables[name] = value
            if words:
                found.append(words)
    return found
