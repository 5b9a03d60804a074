# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""OpenAI's Batch API: requests written as its files, result files read into the cache."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import explain_full_disk
from medst_trl.data.image_formats import ImageProblem
from medst_trl.engines.client_errors import Trouble, trouble_of_status
from medst_trl.engines.reply_cache import ReplyCache
from medst_trl.engines.requests import row_of_body

from .pairwise import PairwiseJudge


MAX_REQUESTS = 50_000  # of a file, as OpenAI has it
MAX_BYTES = 190_000_000  # under its 200 MB


def write_batch(
    judge: PairwiseJudge,
    candidates: Iterable[Mapping[str, Any]],
    path: str | os.PathLike,
    max_requests: int = MAX_REQUESTS,
    max_bytes: int = MAX_BYTES,
) -> list[Path]:
    """
    Write the calls that are still to be made as input files of the Batch API.

    Args:
        judge ([`PairwiseJudge`]):
            With the settings that the results will be read under.
        candidates (iterable of `dict`):
            As for the judge.
        path (`str` or `os.PathLike`):
            The file. Where the limits ask for several, the further ones are `<name>-2.jsonl`, `<name>-3.jsonl` ...
        max_requests, max_bytes (`int`, *optional*):
            Limits of a file.

    Returns:
        `list[Path]`: the files; none where every reply is there.

    Raises:
        UserError: if the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    file, requests, size = None, 0, 0
    try:
        with explain_full_disk(path.parent):
            for line in _lines(judge, candidates):
                if file is None or requests == max_requests or size + len(line) > max_bytes:
                    if file is not None:
                        file.close()
                    files.append(path.with_stem(f"{path.stem}-{len(files) + 1}") if files else path)
                    file, requests, size = open(_temporary(files[-1]), "wb"), 0, 0  # noqa: SIM115
                file.write(line)
                requests, size = requests + 1, size + len(line)
            if file is not None:
                file.close()
            for name in files:
                os.replace(_temporary(name), name)
    finally:
        if file is not None:
            file.close()
    return files


def read_batch(cache: ReplyCache, paths: Iterable[str | os.PathLike]) -> dict[str, int]:
    """
    Put the results of the Batch API (its output and its error files) into a judge's cache.

    Results that are there already are passed over, so reading a file twice does no harm.

    Returns:
        `dict`: how many results there were by what they hold: `replies`, `content_filter` and `image_refused` (which
        drop their pairs), `failed` (no reply: such calls are still to be made) and `unreadable` lines.

    Raises:
        UserError: if a file cannot be read, or if none of its lines is a result.
    """
    counts: Counter[str] = Counter()
    for path in paths:
        before = counts.total() - counts["unreadable"]
        for line in _read(path):
            try:
                result = json.loads(line)
                row = _row(result) | {"key": result["custom_id"], "attempt": 0}
            except Trouble as trouble:
                if trouble.reason == "request_failed":
                    counts["failed"] += 1
                    continue
                row = {"key": result["custom_id"], "attempt": 0, "error": trouble.reason, "detail": trouble.detail}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                counts["unreadable"] += 1
                continue
            counts[row.get("error", "replies")] += 1
            if not cache.attempts(row["key"]):
                cache.add(row)
        if counts.total() - counts["unreadable"] == before:
            raise UserError(f"{path} holds no results of the Batch API. Give its output file (and its error file).")
    cache.close()
    return dict(counts)


def _lines(judge: PairwiseJudge, candidates: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    seen = set()
    for _, requests in judge.requests(candidates):
        for request in requests:
            if request.key in seen or judge.cache.attempts(request.key):
                continue
            seen.add(request.key)
            try:
                body = request.body()
            except ImageProblem:  # judging will say so
                continue
            line = {"custom_id": request.key, "method": "POST", "url": "/v1/chat/completions", "body": body}
            yield json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _row(result: dict[str, Any]) -> dict[str, Any]:
    """A result line as the cache keeps it. Raises `Trouble` for an error."""
    response = result.get("response") or {}
    status, body = response.get("status_code"), response.get("body") or {}
    if status == 200:
        return row_of_body(body)
    error = result.get("error") or body.get("error") or {}
    if status is None and not error:
        raise ValueError("no result")
    raise trouble_of_status(int(status or 500), error)


def _read(path: str | os.PathLike) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from (line for line in file if line.strip())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Give a result file of the Batch API.") from None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
