# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Run `transformers serve` on localhost during a test."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def serve(directory: str) -> Iterator[str]:
    """Yield the base URL for an OpenAI client. Skip the test if the packages of the server are missing."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"`transformers serve` needs {', '.join(missing)} (pip install 'transformers[serving]')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", directory]
    process = subprocess.Popen(
        [*program, "--host", "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                assert process.poll() is None, "transformers serve ended"
                time.sleep(0.2)
        else:
            pytest.fail("transformers serve did not become healthy within 2 minutes")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)
