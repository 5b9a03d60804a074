# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""OpenAI's Batch API: write requests as its input files, and read its result files into the cache."""

import json
import os
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import atomic_path
from medst_trl.data.image_formats import ImageProblem
from medst_trl.data.reading import read_text_file
from medst_trl.engines.calls import ReplyCache
from medst_trl.engines.responses import FIELDS, CallError, error_of_status, row_of_body

from .pairwise import PairwiseJudge


MAX_REQUESTS = 50_000  # OpenAI's limit per file
MAX_BYTES = 190_000_000  # OpenAI's limit is 200 MB


def write_batch(judge: PairwiseJudge, candidates: Iterable[Mapping], path: str | os.PathLike) -> list[Path]:
    """
    Write the calls that are still to be made as input files of the Batch API.

    If the server refused a field of earlier requests, it is left out or renamed.

    Args:
        judge ([`PairwiseJudge`]):
            A judge with the settings with which the results will be read.
        candidates (iterable of `dict`):
            Rows as for the judge.
        path (`str` or `os.PathLike`):
            The file. If OpenAI's limits require several, the others are `<name>-2.jsonl`, `<name>-3.jsonl` and so on.

    Returns:
        `list[Path]`: the files; empty if no request is left: all have replies, or were refused.
    """
    path, files, requests, size = Path(path), [], 0, 0
    candidates = candidates if isinstance(candidates, Sized) else list(candidates)
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for line in _lines(judge, candidates):
            if not files or requests == MAX_REQUESTS or size + len(line) > MAX_BYTES:
                requests = size = 0
                files.append(path.with_stem(f"{path.stem}-{len(files) + 1}") if files else path)
                file = stack.enter_context(open(stack.enter_context(atomic_path(files[-1])), "wb"))
            file.write(line)
            requests, size = requests + 1, size + len(line)
    return files


def _lines(judge: PairwiseJudge, candidates: Iterable[Mapping]) -> Iterator[bytes]:
    fields, refused = judge.batch_failures(candidates)
    seen = set(refused)
    for _, requests in judge.requests(candidates):
        for request in requests:
            if request.key not in seen and judge.cache.is_open(request.key, request.read):
                seen.add(request.key)
                name = _custom_id(request.key, fields.refused)
                line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions"}
                with suppress(ImageProblem):  # the judge drops such pairs
                    line["body"] = fields.apply(request.body())
                    yield json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _custom_id(key: str, without: Collection[str]) -> str:
    """
    Name a request by its key and the fields that it is sent without, in at most 64 characters: Batch APIs allow no
    more. If the server refuses the request, the result names these fields.
    """
    if not without:
        return key
    return ".".join([urlsafe_b64encode(bytes.fromhex(key)).decode(), *(field[0] for field in sorted(without))])


def read_batch(cache: ReplyCache, paths: Iterable[str | os.PathLike]) -> dict[str, int]:
    """
    Put the results of the Batch API (its output and its error files) into a judge's cache.

    A file may be read twice: replies that the cache already has are skipped.

    Returns:
        `dict`: number of results by content: `replies`, `content_filter` (which drop their pairs), `failed` (no reply)
        and `unreadable` lines (not JSON in UTF-8).

    Raises:
        UserError: if a file cannot be read, or if none of its lines is a result.
    """
    counts: Counter[str] = Counter()
    for path in paths:
        lines = read_text_file(Path(path), "results").split("\n")
        found = Counter(_read_line(cache, line) for line in lines if line.strip())
        if not found.total() - found["unreadable"]:
            raise UserError(f"{path} holds no results of the Batch API. Give its output file (and its error file).")
        counts += found
    return dict(counts)


def _read_line(cache: ReplyCache, line: str) -> str:
    """Keep one result in the cache, and return what it holds."""
    try:
        line.encode()  # fails if a byte is of another encoding
        result = json.loads(line)
        key, *initials = str(result["custom_id"]).split(".")
        key = urlsafe_b64decode(key).hex() if initials else key
        without = [name for name in FIELDS if name[0] in initials]
        row = _row(result)
    except CallError as error:
        failure = {"failed": error.kind, "status": error.status, "detail": error.detail, "without": without}
        cache.add({"key": key} | failure)
        return "content_filter" if error.kind == "content_filter" else "failed"
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return "unreadable"
    if row["reply"] not in [attempt["reply"] for attempt in cache.attempts(key)]:
        cache.add({"key": key} | row)
    return "replies"


def _row(result: dict[str, Any]) -> dict[str, Any]:
    """Return the reply of a result line as the cache keeps it, or raise the `CallError` that it reports."""
    response = result.get("response") or {}
    status, body = response.get("status_code"), response.get("body")
    if status == 200:
        return row_of_body(body)
    error = _error_in(result.get("error")) or _error_in(body)
    if status is None and not error:
        raise ValueError("no result")
    code = error.get("code")
    raise error_of_status(int(status or (code if isinstance(code, int) else 500)), error)


def _error_in(value: Any) -> dict[str, Any]:
    """Return the error of a result: an object, one inside another, or a text."""
    if isinstance(value, dict):
        return _error_in(value["error"]) if value.get("error") else value
    return {"message": str(value)} if value else {}
